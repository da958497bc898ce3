"""The conversion of a model's layers, which then sum their gradients by cluster."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from gq_triton.cluster_grad.compiled_ops import use
from gq_triton.cluster_grad.copies import recorded
from gq_triton.cluster_grad.layers.registry import SITE, Layer, trains
from gq_triton.cluster_grad.passes import OUTSIDE
from gq_triton.cluster_grad.site import Collector, Site

__all__ = ["convert"]


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a layer, with clustered gradients if this forward pass will have a backward pass."""
    # The compiler of torch 2.8 does not know vars(module).
    site: Site | None = getattr(module, SITE, None)
    if site is None:  # undone while the layer was being called
        return type(module).forward(module, *args, **kwargs)
    collector, graded = site.collector, torch.is_grad_enabled()
    # In a copy of the model, a frozen layer, or a recording the layer is torch's own.
    if site.module is not module or not trains(module) or recorded():
        return type(module).forward(module, *args, **kwargs)
    token = collector.token
    if token is not None:
        use(collector.clock, token, site.key, graded)
    elif graded:
        raise RuntimeError(OUTSIDE.format(site.name))
    if token is None or not graded:
        return type(module).forward(module, *args, **kwargs)
    if site.input_name in kwargs:
        args = (*args, kwargs.pop(site.input_name))
    return site.family.forward(module, (token, site.key), *args, **kwargs)


def convert(layers: list[Layer], collector: Collector) -> Callable[[], None]:
    """Make layers compute clustered gradients; return a function that undoes it.

    Classes, names and ``state_dict`` keys stay: only ``forward`` and a site are set on the
    instance.

    Raises:
        ValueError: another plug-in has converted one of the layers.
    """
    for layer in layers:
        site = vars(layer.module).get(SITE)
        # A copy of a model has the sites of its original, which do not count.
        if site is not None and site.module is layer.module:
            raise ValueError(
                f"another GradQueue computes the clustered gradients of {layer.name or 'the model'}"
                " already: call remove() on its handle first"
            )
    changed: list[nn.Module] = []
    for layer in layers:
        if layer.family is not None:
            # One function for all layers: those of one kind share their compiled graph.
            vars(layer.module)[SITE] = Site(collector, layer.name, layer.module, layer.family)
            layer.module.forward = MethodType(_forward, layer.module)
            changed.append(layer.module)

    def undo() -> None:
        for module in changed:
            del module.forward, vars(module)[SITE]

    return undo
