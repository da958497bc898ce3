"""Linear regression with fewer samples than weights (Faghri et al. 2020, section 4)."""

import torch
from torch import Tensor, nn

from gq_triton.tasks.scored import Measures, ScoredTask, StudyTask

__all__ = ["LINEAR_REGRESSION", "linear_regression"]

SAMPLES, INPUTS = 500, 1000
# The authors' ratio of the teacher's norm, 1, to the standard deviation of the noise.
SIGNAL_TO_NOISE = 2.0


def linear_regression(seed: int) -> ScoredTask:
    """Return 500 samples ``x ~ N(0, I)`` in 1000 dimensions with ``y = x w + noise``.

    The teacher ``w`` has norm 1, the noise standard deviation 0.5. The student is ``x w`` too.

    Args:
        seed: seed of teacher, samples and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(INPUTS, generator=generator)
    teacher /= teacher.norm()

    def drawn() -> tuple[Tensor, Tensor]:
        x = torch.randn(SAMPLES, INPUTS, generator=generator)
        noise = torch.randn(SAMPLES, generator=generator) / SIGNAL_TO_NOISE
        return x, x @ teacher + noise

    train, validation, test = (drawn() for _ in range(3))
    return ScoredTask(
        train=train,
        validation=validation,
        test=test,
        model=lambda: nn.Linear(INPUTS, 1, bias=False),
        features="",
        classes=None,
        losses=_squared_errors,
        measure=_measure,
    )


def _squared_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets).square()


def _measure(outputs: Tensor, targets: Tensor, groups: Tensor | None = None) -> Measures:
    return {"loss": _squared_errors(outputs, targets).double().mean().item()}


LINEAR_REGRESSION = StudyTask(
    lambda seed, data: linear_regression(seed),
    "500 samples of a linear teacher in 1000 dimensions, with noise",
    score="loss",
    chance=1.0 + 1 / SIGNAL_TO_NOISE**2,
    target=1.0,
    higher=False,
    labels=False,
)
"""For ``gq-triton variance``; a study of optimizers has no use for it."""
