"""Hugging Face Accelerate: one call after ``accelerator.prepare``."""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import Unpack

from gq_triton.dist.state import HookOptions
from gq_triton.dist.wrappers import find_ddp
from gq_triton.integrations.connect import (
    NOT_TAKEN,
    Connection,
    ConnectKeywords,
    Weighing,
    check_options,
    is_of,
    missing,
    scalars,
)
from gq_triton.keywords import takes
from gq_triton.options import ClusterOptions, LawOptions

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    if not is_of("accelerate", error):
        raise
    raise ModuleNotFoundError(missing("accelerate"), name="accelerate") from error

__all__ = ["attach", "log"]


@takes(ClusterOptions, LawOptions, HookOptions, without=NOT_TAKEN)
def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    **options: Unpack[ConnectKeywords],
) -> Weighing:
    """Weight the gradients of a prepared model; save and load the queue with the accelerator.

    On one process the queue is attached to the optimizer, under DDP the hook is registered.
    ``accelerator.save_state`` and ``load_state`` carry the queue from now on. Accumulation and loss
    scale follow the accelerator.

    Args:
        accelerator: what prepared the model and the optimizer.
        model: the prepared model.
        optimizer: the prepared optimizer.
        **options: those of ``ClusterOptions``, ``LawOptions`` and ``HookOptions``.

    Returns:
        The ``GradQueue``, or under DDP the ``GradQueueState``; the optimizer itself where it is a
        ``GQSGD`` or ``GQAdamW``, which weights and is saved without this call.

    Raises:
        ValueError: the options, the accelerator's settings or its kind of parallelism do not fit.

    For example:

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        queue = attach(accelerator, model, optimizer, rho=3.0)
    """
    check_options(options)
    ddp: DistributedDataParallel | None = find_ddp(model)
    passes = accelerator.gradient_accumulation_steps
    check_synchronization(accelerator, ddp, passes)
    connection = Connection(
        accelerator.unwrap_model(model),
        ddp,
        [optimizer],
        options,
        ranks=accelerator.num_processes,
        passes=passes,
        setting="gradient_accumulation_steps",
        scaler=accelerator.scaler,
    )
    if connection.saved_here:
        accelerator.register_for_checkpointing(connection.queue)
    return connection.queue


def check_synchronization(accelerator: Any, ddp: nn.Module | None, passes: int) -> None:
    """Raise a ValueError where DDP's hook would see every micro-batch."""
    settings = accelerator.gradient_state.plugin_kwargs
    if ddp is not None and passes > 1 and settings.get("sync_each_batch", False):
        raise ValueError(
            "sync_each_batch=True would weight and queue every micro-batch: leave it out, so that "
            "one backward pass of each step is synchronized"
        )


def log(
    accelerator: Accelerator,
    queue: Weighing,
    step: int | None = None,
    *,
    per_layer: bool = False,
) -> dict[str, float]:
    """Log the figures of the last step to the accelerator's trackers; every rank must call.

    Args:
        accelerator: its trackers receive the figures.
        queue: what ``attach`` returned.
        step: the step for the trackers.
        per_layer: log the figures of every parameter too.

    Returns:
        The figures: ``grad_queue/mean_weight`` and so on.
    """
    figures = scalars(queue, per_layer)
    accelerator.log(figures, step=step)
    return figures
