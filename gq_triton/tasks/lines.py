"""Line detection with a rare orientation (section 3.2 of the paper), as this project reads it.

The images have 8 x 8 pixels: noise N(0, 0.1^2), plus 1 on one whole row or column, number 1 to 6.
The training set has 95 horizontal and 5 vertical lines. The paper's label is ambiguous, so there
are two tasks: ``lines-disc`` tells vertical from horizontal lines; ``lines-detect`` tells lines
from 100 images of noise.

The model has 21 parameters: two 3 x 3 filters, the largest response of each, and a linear layer
from these two to one logit. One filter starts slightly horizontal, the other slightly vertical.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from gq_triton.tasks.scored import ScoredTask

__all__ = ["load_detect", "load_disc"]

_NOISE, _HORIZONTAL, _VERTICAL = 0, 1, 2
_HELD_OUT = 300  # images per kind


def load_disc(seed: int, data: Path | None = None) -> ScoredTask:
    """Return the task of telling vertical lines (1) from horizontal ones (0)."""
    return _load(seed, [(_HORIZONTAL, 95), (_VERTICAL, 5)], positive=[_VERTICAL], dense=(-0.5, 0.5))


def load_detect(seed: int, data: Path | None = None) -> ScoredTask:
    """Return the task of telling lines (1) from noise (0); the groups are the three kinds."""
    kinds = [(_HORIZONTAL, 95), (_VERTICAL, 5), (_NOISE, 100)]
    return _load(seed, kinds, positive=[_HORIZONTAL, _VERTICAL], dense=(0.5, 0.5))


def _load(
    seed: int, kinds: list[tuple[int, int]], positive: list[int], dense: tuple[float, float]
) -> ScoredTask:
    generator = torch.Generator().manual_seed(seed)
    held_out = [(kind, _HELD_OUT) for kind, _ in kinds]
    sets = [_images(part, generator) for part in (kinds, held_out, held_out)]
    labelled = [
        (images, torch.isin(which, torch.tensor(positive)).long()) for images, which in sets
    ]
    return ScoredTask(
        train=labelled[0],
        validation=labelled[1],
        test=labelled[2],
        model=lambda: _model(dense),
        features="pool",
        classes=2,
        groups=(sets[1][1], sets[2][1]),
    )


def _images(kinds: list[tuple[int, int]], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images ``(N, 1, 8, 8)`` and their kinds ``(N,)``."""
    which = torch.cat([torch.full((count,), kind) for kind, count in kinds])
    images = 0.1 * torch.randn(len(which), 8, 8, generator=generator)
    at = torch.randint(1, 7, (len(which),), generator=generator)
    for image, kind, place in zip(images, which.tolist(), at.tolist(), strict=True):
        if kind == _HORIZONTAL:
            image[place, :] += 1
        elif kind == _VERTICAL:
            image[:, place] += 1
    return images[:, None], which


def _model(dense: tuple[float, float]) -> nn.Module:
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 2, 3, bias=False),
            pool=nn.MaxPool2d(6),  # the whole map; the adaptive one is not repeatable on a GPU
            flatten=nn.Flatten(),
            head=nn.Linear(2, 1),
        )
    )
    with torch.no_grad():
        conv, head = model.get_submodule("conv"), model.get_submodule("head")
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(head, nn.Linear)
        conv.weight.normal_(0, 0.1)
        conv.weight[0, 0, 1, :] += 0.1 / 3**0.5
        conv.weight[1, 0, :, 1] += 0.1 / 3**0.5
        head.weight.copy_(torch.tensor([dense]))
        head.bias.zero_()
    return model
