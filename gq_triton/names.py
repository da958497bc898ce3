"""Names of a model's parameters, whatever is wrapped around the model."""

import sys
from collections.abc import Mapping

from torch import Tensor, nn

from gq_triton.divided import dtensor

__all__ = ["bare", "is_divided", "parameter_names"]

# What torch.compile and the wrapper of activation checkpointing put into names.
_WRAPPED = "_orig_mod", "_checkpoint_wrapped_module"


def bare(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or the module itself."""
    inner = getattr(model, "_orig_mod", None)
    return bare(inner) if isinstance(inner, nn.Module) else model


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by the name they have in the bare model.

    ``torch.compile`` and activation checkpointing put parts of their own into the names, and
    wrappers put ``module.`` before them. All are removed, so that a saved queue does not depend on
    how the model was wrapped.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    named = {
        ".".join(part for part in name.split(".") if part not in _WRAPPED): parameter
        for name, parameter in model.named_parameters()
    }
    while named and all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): parameter for name, parameter in named.items()}
    return named


def is_divided(model: nn.Module, params: Mapping[str, Tensor]) -> bool:
    """Return whether ``fully_shard`` or ``parallelize_module`` has divided a model's parameters.

    After a forward pass some modules of a model under ``fully_shard`` show whole parameters.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import; without it nothing is
    kind = () if fsdp is None else fsdp.FSDPModule
    return any(isinstance(param, dtensor()) for param in params.values()) or any(
        isinstance(module, kind) for module in model.modules()
    )
