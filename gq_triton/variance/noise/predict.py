"""The prediction of the noise scale: where larger batches stop saving steps."""

import math

__all__ = ["CONSTANT", "WITHIN", "check_batch_size", "steps_ratio"]

CONSTANT = 2.4
"""The critical batch in noise scales of whole runs, fitted to steps-to-target on six ladders."""

WITHIN = 3.0
"""The factor within which the critical batches of ten ladders lay of the predicted ones.

Six of them are those of the fit, within a factor of 2; of the four others one was 2.8 times the
prediction (docs/noise.md).
"""


def check_batch_size(name: str, value: object) -> None:
    """Raise a ValueError unless a batch size is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number of samples > 0, got {value!r}")


def steps_ratio(critical_batch: float, old: float, new: float) -> float:
    """Return the steps at batch size ``new`` over those at ``old``, to one and the same loss.

    By ``steps = least * (1 + critical_batch / batch)``, each batch with its own best learning rate.

    Args:
        critical_batch: the batch at which twice the least steps are needed; may be infinite.
        old: the batch size now.
        new: another batch size.

    Raises:
        ValueError: a batch size is not positive, or the critical batch is negative.

    Examples:
        >>> steps_ratio(64.0, 64, 128)
        0.75
    """
    check_batch_size("old", old)
    check_batch_size("new", new)
    if not critical_batch >= 0:
        raise ValueError(f"critical_batch must be >= 0, got {critical_batch!r}")
    if math.isinf(critical_batch):
        return old / new
    return (1 + critical_batch / new) / (1 + critical_batch / old)
