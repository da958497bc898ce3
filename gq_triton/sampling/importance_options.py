"""What is wrong with the options of an ``ImportanceLoader``, before any work."""

from collections.abc import Iterable
from typing import Any

from gq_triton.options import shown
from gq_triton.sampling.checks import count, number, one_of, raise_all
from gq_triton.sampling.presample import SCHEDULES

__all__ = ["SCORES", "check_loader_options", "check_options"]

SCORES = ("gradient", "loss", "norm")
# What DataLoader may be told besides num_workers; all else of it is the loader's own.
LOADER_OPTIONS = (
    "multiprocessing_context", "persistent_workers", "pin_memory", "prefetch_factor", "timeout",
    "worker_init_fn",
)  # fmt: skip


def check_options(
    *,
    batch_size: Any,
    presample: Any,
    tau_th: Any,
    schedule: Any,
    score: Any,
    weight_power: Any,
    power: Any,
    smooth: Any,
    smooth_mean: Any,
    steps: Any,
    seed: Any,
    num_workers: Any,
    gate: Any,
    forward: Any,
) -> None:
    """Raise one ValueError that names every invalid option; if all are valid, a conflict."""
    raise_all(
        count("batch_size", batch_size),
        number("presample", presample, 1, 1e6),
        None if tau_th is None else number("tau_th", tau_th, 0),
        one_of("schedule", schedule, SCHEDULES),
        one_of("score", score, SCORES),
        number("weight_power", weight_power, -1e6, 1),
        number("power", power, 0, 1),
        number("smooth", smooth, 0, 1e30),
        number("smooth_mean", smooth_mean, 0, 1e30),
        None if steps is None else count("steps", steps),
        count("seed", seed, 0),
        count("num_workers", num_workers, 0),
    )
    if gate is not None and not callable(gate):
        raise ValueError(f"gate must be a function of scores (S,), got {shown(gate)}")
    if gate is not None and tau_th is None:
        raise ValueError("gate needs tau_th, the value of its moving average that must be passed")
    if score == "norm" and (schedule != "constant_batch" or forward is not None):
        raise ValueError(
            'score="norm" runs the model itself, forward and backward: leave schedule and forward '
            "out"
        )
    if schedule != "constant_batch" and presample != 3.0:
        raise ValueError(f'schedule="{schedule}" sets the presample itself: leave presample out')
    if schedule == "constant_batch" and int(presample * batch_size) <= batch_size:
        raise ValueError(
            "int(presample * batch_size) must exceed batch_size, got "
            f"presample={presample} and batch_size={batch_size}"
        )


def check_loader_options(names: Iterable[str]) -> None:
    """Raise a TypeError for an option that neither this loader nor DataLoader takes here."""
    unknown = sorted(set(names) - set(LOADER_OPTIONS))
    if unknown:
        raise TypeError(
            f"got an unexpected keyword argument {unknown[0]!r}; of DataLoader this loader takes "
            f"num_workers, collate_fn, {', '.join(LOADER_OPTIONS)}"
        )
