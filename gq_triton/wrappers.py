"""The wrappers that the plug-in looks through, and those that it refuses."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

__all__ = ["innermost", "refuse_wrappers"]


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside all wrappers that keep it under ``.optimizer``."""
    inner = getattr(optimizer, "optimizer", None)
    return innermost(inner) if isinstance(inner, Optimizer) else optimizer


def refuse_wrappers(model: nn.Module, args: Any) -> None:
    """Refuse a forward pass inside DDP or DataParallel where clusters are attached to the model."""
    if torch.compiler.is_compiling():
        return
    if getattr(model, "_is_replica", False):  # set by DataParallel on its copies of a model
        raise RuntimeError(
            "DataParallel runs copies of the model, whose samples GradQueue would not cluster: use "
            "DistributedDataParallel and gq_triton.dist.register(ddp, n_clusters=..., features=...)"
        )
    if DistributedDataParallel._get_active_ddp_module() is not None:
        raise RuntimeError(
            "the model was wrapped in DistributedDataParallel after GradQueue.attach, so every "
            "rank would queue its own gradients only: call remove() on the handle, and use "
            "gq_triton.dist.register(ddp, n_clusters=..., features=...)"
        )
