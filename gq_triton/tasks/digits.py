"""1797 real handwritten digits of 8 x 8 pixels, which scikit-learn ships: nothing to download."""

from collections import OrderedDict
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.tasks.task import Task

__all__ = ["load_digits"]


def load_digits() -> Task:
    """Return the digits, 1437 to learn from and 360 held out, with a small convolutional net.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.model_selection import train_test_split

    images, labels = _all()
    # One split for every run: results of different seeds stay comparable.
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return Task(
        train=(_pixels(train_x), torch.as_tensor(train_y, dtype=torch.int64)),
        test=(_pixels(test_x), torch.as_tensor(test_y, dtype=torch.int64)),
        model=_model,
        features="hidden",
    )


@cache
def _all() -> Any:
    """Return images and labels. A study asks for them in each trial, and a read takes 0.1 s."""
    from sklearn import datasets

    return datasets.load_digits(return_X_y=True)


def _pixels(images: object) -> Tensor:
    """Return images ``(N, 1, 8, 8)`` between -1 and 1; the data set's pixels are 0 to 16."""
    return torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1


def _model() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            hidden=nn.Linear(32 * 4 * 4, 64),
            relu3=nn.ReLU(),
            dropout=nn.Dropout(0.2),
            head=nn.Linear(64, 10),
        )
    )
