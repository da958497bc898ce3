"""A random-features student learns from a random teacher (Faghri et al. 2020, section 4)."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from gq_triton.tasks.scored import ScoredTask

__all__ = ["STUDENT", "load_random_features", "random_features"]

STUDENT = 1000  # features of the student
_HELD_OUT = 2000


def load_random_features(seed: int, data: Path | None = None) -> ScoredTask:
    """Return 500 samples in 100 dimensions; the student trains only its last layer."""
    return random_features(seed)


def random_features(
    seed: int, samples: int = 500, inputs: int = 100, teacher: int = 100, outputs: int = 2
) -> ScoredTask:
    """Return training samples of a random teacher, and a student of 1000 features.

    The inputs are ``x ~ N(0, I)``. The label says whether the teacher's output, ``relu(first x)``
    times ``second``, lies above its mean over the training set; the rows of ``first`` have norm 1.
    The student's fixed ReLU features have weights with norm 1.

    Args:
        seed: seed of teacher and samples.
        samples: size of the training set.
        inputs: dimensions of a sample.
        teacher: features of the teacher.
        outputs: outputs of the student: 2, as in the authors' code, or 1, as in the paper.
    """
    generator = torch.Generator().manual_seed(seed)
    first = _unit_rows(torch.randn(teacher, inputs, generator=generator))
    second = torch.randn(teacher, generator=generator)
    sizes = samples, _HELD_OUT, _HELD_OUT
    drawn = [torch.randn(size, inputs, generator=generator) for size in sizes]
    answers = [torch.relu(x @ first.T) @ second for x in drawn]
    mean = answers[0].mean()
    train, validation, test = ((x, (y > mean).long()) for x, y in zip(drawn, answers, strict=True))
    return ScoredTask(
        train=train,
        validation=validation,
        test=test,
        model=lambda: _student(inputs, outputs),
        features="relu",
        classes=2,
    )


def _unit_rows(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm(dim=1, keepdim=True)


def _student(inputs: int, outputs: int) -> nn.Module:
    fixed = nn.Linear(inputs, STUDENT, bias=False)
    with torch.no_grad():
        fixed.weight.copy_(_unit_rows(torch.randn(STUDENT, inputs)))
    fixed.weight.requires_grad_(False)
    return nn.Sequential(OrderedDict(fixed=fixed, relu=nn.ReLU(), head=nn.Linear(STUDENT, outputs)))
