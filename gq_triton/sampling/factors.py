"""The two factors of every sample's gradient of a layer's weight, seen in one backward pass.

A sample's gradient of a weight is ``sum_t D_t A_t^T``: A_t is the layer's input at position t, for
a convolution the patch under the kernel, and D_t the gradient at its output there. Shapes: B
samples, G groups of channels (1 but for grouped convolutions), T positions, I inputs, O outputs.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gq_triton.aside import aside
from gq_triton.sampling.scores import Loss, losses_of_samples
from gq_triton.sampling.watch import evaluation_mode

__all__ = ["Factors", "factors", "layers_of"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Names that a message offers at most.
_OFFERED = 4


class Factors(NamedTuple):
    """The factors of one layer: ``inputs`` A ``(B, G, T, I)``, ``outputs`` D ``(B, G, T, O)``.

    They have the types that the layer had them in, also half precision.
    """

    inputs: Tensor
    outputs: Tensor

    @property
    def wide(self) -> torch.dtype:
        """The type in which they are multiplied: float32, or float64 where one of them is."""
        both = torch.promote_types(self.inputs.dtype, self.outputs.dtype)
        return torch.promote_types(both, torch.float32)


def layers_of(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions of a model whose weights are trained.

    Args:
        model: the model.
        names: parts of names; a layer is taken if its name has one of them. None takes all.

    Raises:
        ValueError: there is no such layer.
    """
    known = {name: module for name, module in model.named_modules() if _is_trained(module)}
    found = {
        name: module
        for name, module in known.items()
        if names is None or any(part in name for part in names)
    }
    if not found:
        wanted = "" if names is None else f" with {' or '.join(map(repr, names))} in its name"
        has = ", ".join(map(repr, [*known][-_OFFERED:])) or "none"
        raise ValueError(
            f"the model must have a trained Linear or Conv layer{wanted}; it has {has}"
        )
    return found


def _is_trained(module: Any) -> bool:
    """Return whether a module is of a kind whose factors are known, and its weight is trained."""
    return _is_known(module) and module.weight.requires_grad


def _is_known(module: nn.Module) -> bool:
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return True
    return any(
        isinstance(module, known) and kind.forward is known.forward
        for known in (nn.Linear, *_CONVOLUTIONS)
    )


def factors(
    model: nn.Module,
    layers: dict[str, nn.Module],
    run: Callable[[nn.Module, Any], Any],
    inputs: Any,
    targets: Any,
    loss: Loss,
) -> dict[str, Factors]:
    """Return the factors of the layers that the model uses, without a graph.

    The model runs in evaluation mode, so that no sample depends on another. The gradients are those
    of the samples' own losses, not of their mean: how many samples a batch has changes nothing.

    Raises:
        ValueError: a layer's rows are not the samples, or the loss depends on none of the layers.
    """
    seen: list[tuple[str, Tensor, Any]] = []

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            # The edge, not the tensor: an activation may overwrite the tensor in place.
            edge = torch.autograd.graph.get_gradient_edge(output)
            seen.append((name, x.detach(), edge))

        return hook

    handles = [
        module.register_forward_hook(see(name), with_kwargs=True) for name, module in layers.items()
    ]
    try:
        with evaluation_mode(model), torch.enable_grad(), aside():
            losses = losses_of_samples(run(model, inputs), targets, loss)
            edges = [edge for _, _, edge in seen]
            if not edges or not losses.requires_grad:
                raise ValueError(
                    "the loss must depend on one of the chosen layers, and it does not"
                )
            grads = torch.autograd.grad(losses.sum(), edges, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Factors] = {}
    with torch.no_grad():
        for (name, x, _), grad in zip(seen, grads, strict=True):
            if grad is None:
                continue
            if len(x) != len(losses):
                raise ValueError(
                    f"the layer {name!r} saw {len(x)} rows for {len(losses)} samples, so it is not "
                    "known whose they are: choose other layers with layers="
                )
            one = _of_call(layers[name], x, grad)
            if name in found:  # used again: its positions add up
                pairs = zip(found[name], one, strict=True)
                one = Factors(*(torch.cat(pair, dim=2) for pair in pairs))
            found[name] = one
    return found


def _of_call(module: Any, x: Tensor, grad: Tensor) -> Factors:
    if not isinstance(module, _CONVOLUTIONS):
        shape = len(x), 1, x.shape[1:-1].numel()
        return Factors(x.reshape(*shape, x.shape[-1]), grad.reshape(*shape, grad.shape[-1]))
    patches = _patches(module, x, grad.shape[2:])  # (B, C, kernel, T)
    outputs = grad.flatten(2)  # (B, O, T)
    batch, groups, positions = len(x), module.groups, outputs.shape[2]
    inputs = patches.reshape(batch, groups, -1, positions)
    return Factors(inputs.mT, outputs.reshape(batch, groups, -1, positions).mT)


def _patches(module: Any, x: Tensor, out: torch.Size) -> Tensor:
    """Return what lies under the kernel at every position, ``(B, C, kernel, T)``."""
    apart = module.padding_mode != "zeros" or isinstance(module.padding, str)
    sides: Any = module._reversed_padding_repeated_twice
    if not apart:
        sides = [side for one in reversed(module.padding) for side in (one, one)]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, sides, mode=mode)
    places = itertools.product(*(range(size) for size in module.kernel_size))
    parts = []
    for place in places:
        window: list[Any] = [slice(None), slice(None)]
        for at, stride, dilation, size in zip(
            place, module.stride, module.dilation, out, strict=True
        ):
            begin = at * dilation
            window.append(slice(begin, begin + (size - 1) * stride + 1, stride))
        parts.append(x[tuple(window)].flatten(2))
    return torch.stack(parts, dim=2)
