"""The search for the DDP module inside the objects that frameworks wrap around it."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gq_triton.living import living

__all__ = ["carries", "ddp_carrying", "find_ddp"]

# Attributes in which trainers keep the wrapped model: Hugging Face, Lightning.
_HANDLES = "model_wrapped", "model"


def find_ddp(model: object) -> DistributedDataParallel | None:
    """Return the DDP module that ``model`` is, contains or hands out; None where there is none.

    Args:
        model: a module, which is searched with all its submodules (``torch.compile`` and Fabric
            wrap that way), or a trainer or strategy with an attribute ``model_wrapped`` or
            ``model``.

    Raises:
        ValueError: there are several DDP modules.
    """
    is_module = isinstance(model, nn.Module)
    handles = [model] if is_module else [getattr(model, name, None) for name in _HANDLES]
    found = {
        id(part): part
        for module in handles
        if isinstance(module, nn.Module)
        for part in module.modules()
        if isinstance(part, DistributedDataParallel)
    }
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} DistributedDataParallel modules: pass the "
            "one that is meant, with a state for each"
        )
    return next(iter(found.values()), None)


def carries(ddp: DistributedDataParallel, state: object) -> bool:
    """Return whether ``state`` was registered with ``ddp``."""
    return any(registered is state for _, registered in getattr(ddp, "_comm_hooks", ()))


def ddp_carrying(state: object, owned: set[int]) -> DistributedDataParallel | None:
    """Return the living DDP module that ``state`` was registered with; None where there is none.

    DDP passes a hook no reference to itself, and its process group is not always the default one.
    So this function looks through all living objects, which takes milliseconds: call it once per
    run.

    Args:
        state: the state given to ``register_comm_hook``.
        owned: the ``id`` of the parameters, which tells a module from its deep copies.
    """
    for candidate in living(DistributedDataParallel):
        if carries(candidate, state) and any(id(p) in owned for p in candidate.parameters()):
            return candidate
    return None
