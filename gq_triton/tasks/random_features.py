"""A random-features student learns from a random teacher (Faghri et al. 2020, section 4)."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from gq_triton.tasks.scored import ScoredTask

__all__ = ["load_random_features"]

_INPUTS, _TEACHER, _STUDENT = 100, 100, 1000
_TRAIN, _HELD_OUT = 500, 2000


def load_random_features(seed: int, data: Path | None = None) -> ScoredTask:
    """Return 500 samples in 100 dimensions; the student trains only its last layer.

    The inputs are ``x ~ N(0, I)``. The label says whether the teacher's output, ``relu(first x)``
    times ``second``, lies above its mean over the training set; the rows of ``first`` have norm 1.
    The student has 1000 fixed ReLU features whose weights have norm 1.
    """
    generator = torch.Generator().manual_seed(seed)
    first = _unit_rows(torch.randn(_TEACHER, _INPUTS, generator=generator))
    second = torch.randn(_TEACHER, generator=generator)
    sizes = _TRAIN, _HELD_OUT, _HELD_OUT
    inputs = [torch.randn(size, _INPUTS, generator=generator) for size in sizes]
    outputs = [torch.relu(x @ first.T) @ second for x in inputs]
    mean = outputs[0].mean()
    train, validation, test = ((x, (y > mean).long()) for x, y in zip(inputs, outputs, strict=True))
    return ScoredTask(
        train=train, validation=validation, test=test, model=_student, features="relu", classes=2
    )


def _unit_rows(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm(dim=1, keepdim=True)


def _student() -> nn.Module:
    fixed = nn.Linear(_INPUTS, _STUDENT, bias=False)
    with torch.no_grad():
        fixed.weight.copy_(_unit_rows(torch.randn(_STUDENT, _INPUTS)))
    fixed.weight.requires_grad_(False)
    return nn.Sequential(OrderedDict(fixed=fixed, relu=nn.ReLU(), head=nn.Linear(_STUDENT, 2)))
