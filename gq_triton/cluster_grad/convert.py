"""Which layers compute clustered gradients, and the switch in the model that makes them do it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.conv import conv_forward
from gq_triton.cluster_grad.embedding import embedding_forward
from gq_triton.cluster_grad.linear import conv1d_forward, linear_forward
from gq_triton.cluster_grad.norm import (
    batch_norm_forward,
    group_norm_forward,
    layer_norm_forward,
    rms_norm_forward,
)
from gq_triton.cluster_grad.session import Session, in_backward

__all__ = ["Layer", "convert", "survey"]

# By the class whose forward() a layer runs: a subclass that overrides forward() is another layer.
_FORWARDS: dict[Any, Callable[..., Tensor]] = {
    nn.Linear: linear_forward,
    nn.Conv1d: conv_forward,
    nn.Conv2d: conv_forward,
    nn.Conv3d: conv_forward,
    nn.Embedding: embedding_forward,
    nn.LayerNorm: layer_norm_forward,
    nn.RMSNorm: rms_norm_forward,
    nn.GroupNorm: group_norm_forward,
    nn.BatchNorm1d: batch_norm_forward,
    nn.BatchNorm2d: batch_norm_forward,
    nn.BatchNorm3d: batch_norm_forward,
}
# Layers that read their children's weights behind the children's backs.
_OPAQUE = nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase, nn.RNNCellBase


class Layer(NamedTuple):
    """One layer with parameters of its own and how it computes clustered gradients."""

    name: str
    module: nn.Module
    forward: Callable[..., Tensor] | None  # None: it does not


def _forward_of(module: nn.Module) -> Callable[..., Tensor] | None:
    if isinstance(module, nn.Embedding) and (
        module.sparse or module.scale_grad_by_freq or module.max_norm is not None
    ):
        return None
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return conv1d_forward
    for known, forward in _FORWARDS.items():
        if isinstance(module, known) and kind.forward is known.forward:
            return forward
    return None


def survey(model: nn.Module) -> list[Layer]:
    """Return the layers of a model that hold trainable parameters of their own."""
    layers, hidden = [], set()
    for name, module in model.named_modules():
        if isinstance(module, _OPAQUE):
            hidden.update(id(child) for child in module.modules() if child is not module)
        params = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if isinstance(module, _OPAQUE) or id(module) in hidden:
            forward = None
        else:
            forward = _forward_of(module)
        if params:
            layers.append(Layer(name, module, forward))
    return layers


def _forward(module: nn.Module, original: Any, session: Session, name: str, *args: Any) -> Any:
    """Run a layer, with clustered gradients where this forward pass will have a backward pass."""
    if session.inside == 0 and torch.is_grad_enabled() and not in_backward():
        raise RuntimeError(
            f"{name} was called outside the model's own forward(), where its samples are not "
            'clustered: call the model, or use GradQueue(mode="microbatch")'
        )
    step = session.use(module.parameters(recurse=False))
    if step is None or not torch.is_grad_enabled():
        return type(module).forward(module, *args)
    return original(module, (session, step, name), *args)


def convert(layers: list[Layer], session: Session) -> Callable[[], None]:
    """Make layers compute clustered gradients; return what undoes it.

    Classes, names and ``state_dict`` keys stay: only ``forward`` is set on the instance.
    """
    changed: list[nn.Module] = []
    for layer in layers:
        if layer.forward is not None and "forward" not in vars(layer.module):
            run = partial(_forward, layer.module, layer.forward, session, layer.name)
            layer.module.forward = run
            changed.append(layer.module)

    def undo() -> None:
        for module in changed:
            del module.forward

    return undo
