"""The communication hook of DistributedDataParallel that weights reduced gradients.

The module does without ``from __future__ import annotations``, and the hook has no annotations. DDP
checks a hook's annotations at registration, and would take their text for a wrong type.
"""

from typing_extensions import Unpack

from gq_triton.dist.options import NOT_ON_RANKS, HookOptions, StateKeywords
from gq_triton.dist.state import GradQueueState
from gq_triton.dist.wrappers import find_ddp
from gq_triton.keywords import takes
from gq_triton.options import ClusterOptions, LawOptions

__all__ = ["grad_queue_hook", "register"]


def grad_queue_hook(state, bucket):
    """Average a bucket over the ranks, weight it by its scarcity, and queue the raw mean.

    Register it with ``ddp.register_comm_hook(state, grad_queue_hook)``. The backward pass goes on
    while a bucket is reduced and weighted. Without clusters and slices the hook sends as many bytes
    as plain DDP, and its result is plain DDP's bit for bit with ``rho=1`` and until L gradients are
    queued. ``GradQueueState`` describes what clusters and slices change.

    Args:
        state: a ``GradQueueState``.
        bucket: a ``torch.distributed.GradBucket``.

    Returns:
        A future of the bucket's buffer ``(elements,)``, the weighted gradients.

    Raises:
        ValueError: a sparse gradient, or a parameter that the state does not know.
        RuntimeError: the ranks' options differ, or their queues (``verify_every``); or DDP's Python
            reducer calls the hook.
    """
    if isinstance(bucket, tuple):
        raise RuntimeError(_PYTHON_REDUCER)
    return state.route.start(state.begin(bucket), bucket.buffer())


@takes(ClusterOptions, LawOptions, HookOptions, without=NOT_ON_RANKS)
def register(model: object, **options: Unpack[StateKeywords]) -> GradQueueState:
    """Register the hook with the DDP module that ``model`` is or holds; return its new state.

    Args:
        model: the DDP module, or what a framework made of it: what ``torch.compile``,
            ``accelerator.prepare`` or ``fabric.setup`` returned, a Lightning ``trainer.strategy``,
            a Hugging Face ``Trainer``.
        **options: the options of ``GradQueueState``.

    Returns:
        The state, for ``record_loss``, ``metrics`` and checkpoints.

    Raises:
        ValueError: ``model`` has no DDP module, or more than one; the DDP module has a hook
            already, ``mixed_precision`` or the Python reducer; an option is out of its range; a
            ``GradQueue`` or one of this package's optimizers weights these parameters already.

    Examples:
        >>> import torch
        >>> from torch.nn.parallel import DistributedDataParallel
        >>> ddp = DistributedDataParallel(torch.nn.Linear(4, 2))  # the process group exists
        >>> state = register(ddp, rho=3.0)
        >>> ddp(torch.ones(8, 4)).square().mean().backward()
        >>> state.metrics()["mean_weight"]  # until queue_length gradients are queued
        1.0
    """
    ddp = find_ddp(model)
    if ddp is None:
        raise ValueError(
            f"there is no DistributedDataParallel module in {type(model).__name__}: register after "
            "the model is wrapped, and pass the wrapped one; on one device, where nothing is "
            "wrapped, use gq_triton.GradQueue(model, ...).attach(optimizer)"
        )
    if ddp.mixed_precision is not None:
        raise ValueError(
            "DistributedDataParallel(mixed_precision=...) needs the place of the hook: leave it "
            "out and use torch.autocast"
        )
    if ddp._use_python_reducer:
        raise ValueError(_PYTHON_REDUCER)
    if ddp._comm_hooks:
        raise ValueError(
            "this DistributedDataParallel has a communication hook already, and takes only one: "
            "wrap the model anew"
        )
    state = GradQueueState(ddp, **options)
    state.claim()
    ddp.register_comm_hook(state, grad_queue_hook)
    return state


_PYTHON_REDUCER = (
    "the Python reducer of DistributedDataParallel gives a hook no buckets: set "
    'torch._dynamo.config.optimize_ddp = "ddp_optimizer", the default, before wrapping the model'
)
