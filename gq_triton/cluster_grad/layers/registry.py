"""The registry: the table of layers that can sum their gradients by cluster, by family.

A new family needs one new file, and here its import and a line of the table.
"""

from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from gq_triton.cluster_grad.layers.attention import shows_parameters
from gq_triton.cluster_grad.layers.conv import CONV, TRANSPOSED
from gq_triton.cluster_grad.layers.embedding import EMBEDDING
from gq_triton.cluster_grad.layers.linear import CONV1D, LINEAR
from gq_triton.cluster_grad.layers.norm import BATCH_NORM, GROUP_NORM, LAYER_NORM, RMS_NORM
from gq_triton.cluster_grad.layers.run import OPAQUE
from gq_triton.cluster_grad.layers.slices import SLICES, parameters_of
from gq_triton.cluster_grad.site import SITE, Family

__all__ = ["Layer", "is_called", "register_layer", "runs_whole", "survey"]

# By the class whose forward() a layer runs: a subclass that overrides forward() has no family.
_FAMILIES: dict[Any, Family] = {
    nn.Linear: LINEAR,
    nn.Conv1d: CONV,
    nn.Conv2d: CONV,
    nn.Conv3d: CONV,
    nn.ConvTranspose1d: TRANSPOSED,
    nn.ConvTranspose2d: TRANSPOSED,
    nn.ConvTranspose3d: TRANSPOSED,
    nn.Embedding: EMBEDDING,
    nn.LayerNorm: LAYER_NORM,
    nn.RMSNorm: RMS_NORM,
    nn.GroupNorm: GROUP_NORM,
    nn.BatchNorm1d: BATCH_NORM,
    nn.BatchNorm2d: BATCH_NORM,
    nn.BatchNorm3d: BATCH_NORM,
}


# Classes that were registered to be run again as a whole.
_WHOLE: set[type[nn.Module]] = set()


class Layer(NamedTuple):
    """One layer that holds parameters directly, with its family.

    Attributes:
        name: the layer's name in the model.
        module: the layer.
        family: the family that sums its gradients by cluster; None where stand-ins do.
        attributes: the names of the parameters that the family sums, weight and bias by default.
    """

    name: str
    module: nn.Module
    family: Family | None
    attributes: tuple[str, ...] = ()


def register_layer(cls: type[nn.Module], like: type[nn.Module] | None = None) -> None:
    """Say how clusters find the gradients of a class of modules.

    Most modules need no registration: their parameters are followed where operations use them.
    Register a class whose forward pass hides its operations from torch, as a kernel of your own
    does, or a class that computes what a layer of torch computes, to use that layer's fast sums.

    Args:
        cls: the class. Its subclasses with the same ``forward`` are meant, too.
        like: the class of torch whose ``forward`` takes the place of the module's own, with the
            module's attributes: ``weight``, ``bias``, ``eps`` and so on have their meaning there.
            None runs the module as it is, once more for each cluster's samples. Its samples lie
            along the first dimension of its arguments and results, and do not depend on each other.

    Raises:
        TypeError: ``cls`` is no subclass of ``torch.nn.Module``.
        ValueError: no family of layers is like ``like``.

    Examples:
        >>> import gq_triton, torch
        >>> class Doubled(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(3, 3))
        ...
        ...     def forward(self, x):
        ...         return x @ (2 * self.weight)
        >>> gq_triton.register_layer(Doubled)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), Doubled())
        >>> queue = gq_triton.GradQueue(model, n_clusters=2, features="0")
        >>> queue.report()["1.weight"]
        'clusters (Doubled run again)'
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        got = cls if isinstance(cls, type) else f"an object of {type(cls).__name__}"
        raise TypeError(f"register_layer needs a subclass of torch.nn.Module, got {got}")
    if like is None:
        _WHOLE.add(cls)
        return
    family = _FAMILIES.get(like)
    if family is None:
        known = ", ".join(kind.__name__ for kind in _FAMILIES)
        raise ValueError(f"like must be one of {known}, got {like!r}")
    _FAMILIES[cls] = family


def runs_whole(module: nn.Module) -> bool:
    """Return whether a module is run again as a whole."""
    registered = any(
        isinstance(module, cls) and type(module).forward is cls.forward for cls in _WHOLE
    )
    return registered or (isinstance(module, OPAQUE) and not shows_parameters(module))


def is_called(module: nn.Module) -> bool:
    """Return whether a module has a ``forward``, which a list of parameters has not."""
    return type(module).forward is not nn.Module.forward


def _family_of(module: nn.Module) -> Family | None:
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return CONV1D
    # A weight that is computed from other parameters (weight_norm) is no parameter of the layer. To
    # read it would compute it, which may change buffers (spectral_norm).
    if parametrize.is_parametrized(module):
        return None
    own = [getattr(module, name, None) for name in ("weight", "bias")]
    if any(value is not None and not isinstance(value, nn.Parameter) for value in own):
        return None
    if "forward" in vars(module) and SITE not in vars(module):
        return None  # this instance has another forward than its class
    for known, family in _FAMILIES.items():
        if isinstance(module, known) and kind.forward is known.forward:
            return family if family.accepts(module) else None
    return None


def survey(model: nn.Module) -> list[Layer]:
    """Return the layers of a model that hold parameters directly."""
    layers: list[Layer] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if runs_whole(module):
            inside.update(module.modules())
            layers.append(Layer(name, module, SLICES, parameters_of(module)))
        elif next(module.parameters(recurse=False), None) is not None:
            layers.append(Layer(name, module, _family_of(module)))
    return layers
