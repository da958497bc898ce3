"""What a converted module keeps: its sites, and how its parameters meet the samples."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gq_triton.cluster_grad.layers.attention import shows_parameters
from gq_triton.cluster_grad.layers.conv import CONV
from gq_triton.cluster_grad.layers.embedding import EMBEDDING
from gq_triton.cluster_grad.layers.linear import CONV1D, LINEAR
from gq_triton.cluster_grad.layers.registry import Layer, runs_whole
from gq_triton.cluster_grad.site import Collector, Family, Site
from gq_triton.cluster_grad.standins.meet import EXPANDED, LOOKED_UP

__all__ = ["Converted"]


class Converted:
    """The data of a converted module, which its ``forward`` reads.

    Args:
        collector: the receiver of the sums.
        layer: the module, its name and how its gradients are summed.
        inner: the ``forward`` that the instance had of its own, or None.
    """

    def __init__(
        self, collector: Collector, layer: Layer, inner: Callable[..., Any] | None
    ) -> None:
        self.collector, self.module, self.name = collector, layer.module, layer.name
        self.family, self.inner = layer.family, inner
        # Attention whose parameters are met by stand-ins, in a forward pass of our own.
        alone = layer.family is None and inner is None
        self.attends = alone and shows_parameters(layer.module)
        # A compiled graph ends before a module that runs again, and cannot take stand-ins along.
        self.broken = any(runs_whole(part) for part in layer.module.modules())
        # The attributes that show a stand-in to the whole model while its forward pass runs.
        self.shown: list[str] = []
        self.attributes = [name for name, _ in layer.module.named_parameters(recurse=False)]
        self.site: Site | None = None
        if layer.family is not None:
            names = layer.attributes or ("weight", "bias")
            self.site = Site(collector, layer.name, layer.module, layer.family, names)
        # By parameter, its sites: one for each kind of operation in which it may meet samples.
        self.alone: dict[str, list[Site]] = {}
        self.keys: dict[str, dict[str, Tensor]] = {}
        # By weight of a linear layer, the bias that goes with it.
        self.biases: dict[str, str] = {}
        for attribute in self.attributes:
            param = layer.module._parameters[attribute]
            kinds: dict[str, Family] = {"expanded": EXPANDED}
            if param is not None and param.dim() == 2:
                kinds |= {
                    "linear": LINEAR,
                    "product": CONV1D,
                    "embedding": EMBEDDING,
                    "looked up": LOOKED_UP,
                }
            if param is not None and param.dim() > 2:
                kinds |= {"convolution": CONV}
            sites = {
                kind: Site(collector, layer.name, layer.module, family, [attribute])
                for kind, family in kinds.items()
            }
            bias = _bias_of(attribute, layer.module)
            if "linear" in kinds and bias:
                self.biases[attribute] = bias
                both = [attribute, bias]
                sites["linear, bias"] = Site(collector, layer.name, layer.module, LINEAR, both)
            self.alone[attribute] = list(sites.values())
            self.keys[attribute] = {kind: site.key for kind, site in sites.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Converted":
        """Return the object itself: a copy of the model has no clusters."""
        return self


def _bias_of(attribute: str, module: nn.Module) -> str:
    """Return the name of the bias that goes with a weight; empty if there is none."""
    bias = attribute.removesuffix("weight") + "bias"
    return bias if module._parameters.get(bias) is not None else ""
