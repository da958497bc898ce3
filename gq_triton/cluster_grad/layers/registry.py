"""The registry: the table of layers that can sum their gradients by cluster, by family.

A new family needs one new file, and here its import and a line of the table.
"""

from typing import Any, NamedTuple

from torch import nn

from gq_triton.cluster_grad.layers.conv import CONV
from gq_triton.cluster_grad.layers.embedding import EMBEDDING
from gq_triton.cluster_grad.layers.linear import CONV1D, LINEAR
from gq_triton.cluster_grad.layers.norm import BATCH_NORM, GROUP_NORM, LAYER_NORM, RMS_NORM
from gq_triton.cluster_grad.site import Family

__all__ = ["SITE", "Layer", "survey", "trains"]

# By the class whose forward() a layer runs: a subclass that overrides forward() has no family.
_FAMILIES: dict[Any, Family] = {
    nn.Linear: LINEAR,
    nn.Conv1d: CONV,
    nn.Conv2d: CONV,
    nn.Conv3d: CONV,
    nn.Embedding: EMBEDDING,
    nn.LayerNorm: LAYER_NORM,
    nn.RMSNorm: RMS_NORM,
    nn.GroupNorm: GROUP_NORM,
    nn.BatchNorm1d: BATCH_NORM,
    nn.BatchNorm2d: BATCH_NORM,
    nn.BatchNorm3d: BATCH_NORM,
}
# The attribute of a layer that holds its site while the plug-in is attached.
SITE = "_gq_triton_site"
# Recurrent layers, and layers that use their children's weights without calling the children.
_OPAQUE = nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase, nn.RNNCellBase


class Layer(NamedTuple):
    """One layer that holds parameters directly, with its family.

    Attributes:
        name: the layer's name in the model.
        module: the layer.
        family: the family that sums its gradients by cluster; None if there is none.
    """

    name: str
    module: nn.Module
    family: Family | None

    @property
    def trainable(self) -> bool:
        """Whether a parameter of the layer itself needs a gradient."""
        return trains(self.module)


def trains(module: nn.Module) -> bool:
    """Return whether a parameter of the layer itself, not of its children, needs a gradient."""
    return any(param.requires_grad for param in module.parameters(recurse=False))


def _family_of(module: nn.Module) -> Family | None:
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return CONV1D
    # A weight that is computed from other parameters (weight_norm) is no parameter of the layer.
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
    layers, hidden = [], set()
    for name, module in model.named_modules():
        if isinstance(module, _OPAQUE):
            hidden.update(id(child) for child in module.modules() if child is not module)
        params = list(module.parameters(recurse=False))
        known = not isinstance(module, _OPAQUE) and id(module) not in hidden
        if params:
            layers.append(Layer(name, module, _family_of(module) if known else None))
    return layers
