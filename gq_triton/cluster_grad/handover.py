"""The parameters that a step took as one cluster's, and the modules that know them from then on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gq_triton.cluster_grad.install import Conversion
from gq_triton.cluster_grad.layers.registry import Layer, is_called
from gq_triton.cluster_grad.layers.slices import SLICES, parameters_of
from gq_triton.cluster_grad.outside import CALLED_OUTSIDE
from gq_triton.options import OUTPUT_GRADIENT

if TYPE_CHECKING:
    from gq_triton.cluster_grad.clusters import Clusters

__all__ = ["hand_over"]


def hand_over(clusters: "Clusters", conversion: Conversion, whole: list[str]) -> list[str]:
    """Run modules as a whole from now on, for parameters that were taken as one cluster's.

    Args:
        clusters: the clusters, whose owners of parameters change.
        conversion: the conversion of the model's modules.
        whole: the names of the parameters.

    Returns:
        The names for which no module can.
    """
    modules, left = dict(clusters.model.named_modules()), []
    reasons, chosen = clusters.accumulator.coverage.reasons, dict[str, Layer]()
    # Parameters of layers that other modules use, or code outside the model.
    past = [
        clusters.accumulator.params[name]
        for name in whole
        if name not in reasons and clusters.owners[name].family not in (None, SLICES)
    ]
    followed = [
        conversion.follow(layer.module)
        for layer in clusters.layers
        if any(own is param for own in layer.module.parameters(recurse=False) for param in past)
    ]
    if any(followed):
        return []  # what else is whole may come of it
    for name in whole:
        if reasons.get(name) == CALLED_OUTSIDE:
            left.append(name)
            continue
        owner = clusters.owners[name]
        path = owner.name
        known = owner.family is not None
        if owner.family is SLICES or (known and name in reasons) or not is_called(owner.module):
            path = _caller(path, modules)
        elif known:
            path = ""
        while path and _holds_results(modules[path]):
            path = _caller(path, modules)
        if path and not _is_trunk(clusters, path, modules[path]):
            chosen[path] = Layer(path, modules[path], SLICES, parameters_of(modules[path]))
        else:
            left.append(name)
    for path, layer in chosen.items():
        if not any(path.startswith(f"{other}.") for other in chosen):
            conversion.convert(layer)
            inside = [name for name in clusters.owners if name.startswith(f"{path}.")]
            clusters.owners.update(dict.fromkeys(inside, layer))
    return left


def _is_trunk(clusters: "Clusters", path: str, module: nn.Module) -> bool:
    """Return whether a module is most of the model, which is too dear to run again."""
    features = clusters.features
    named = features not in (None, OUTPUT_GRADIENT)
    if named and not features.startswith(f"{path}."):
        return False
    held = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return 2 * held > sum(p.numel() for p in clusters.model.parameters() if p.requires_grad)


def _caller(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the nearest module around one that is called itself; empty for the model."""
    while path:
        path = path.rpartition(".")[0]
        if path and is_called(modules[path]):
            break
    return path


def _holds_results(module: nn.Module) -> bool:
    """Return whether a module holds a tensor that was computed outside its ``forward``.

    A hook computes the weight of ``nn.utils.weight_norm`` so. Another run of ``forward`` would go
    back through the computation again.
    """
    values = vars(module).values()
    return any(isinstance(value, Tensor) and value.grad_fn is not None for value in values)
