"""The gradients of single samples, whole: exact, and as dear as training on them.

Shapes: B samples, P trained parameters.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from gq_triton.aside import aside
from gq_triton.sampling.checks import check_model
from gq_triton.sampling.scores import Loss, as_module, losses_of_samples
from gq_triton.sampling.watch import evaluation_mode, run_model, scorer

__all__ = ["NUMBERS", "gradient_norms", "together", "trained"]

# Numbers of the gradients that are computed at a time.
NUMBERS = 2**25


def gradient_norms(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Tensor:
    """Return the norm of every sample's gradient, which ``importance_score`` bounds.

    They are what drawing by score would be best with, and cost a forward and a backward pass of
    every sample. Compare them with ``importance_score`` on a few batches to see how well that
    follows. The model runs in evaluation mode; neither it nor its ``grad`` changes.

    Args:
        model: the model, also within DDP.
        loss: as in ``importance_score``.
        inputs: what the model takes: a tensor; arguments in a list or tuple; keywords in a dict.
            Its tensors begin with the samples.
        targets: what the loss takes as its second argument, likewise.

    Returns:
        ``(B,)``, over all trained parameters, without a graph.

    Raises:
        TypeError: the model is no module, or the loss no loss.
        ValueError: the model has no trained parameter, or there is no sample.

    Examples:
        >>> import torch
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> gradient_norms(model, lambda out, y: out[:, 0], x, x).tolist()
        [5.0, 0.0]
    """
    check_model(model)
    one = scorer(model)
    params, module = trained(one), as_module(loss)
    found = [leaf for leaf in pytree.tree_leaves((inputs, targets)) if isinstance(leaf, Tensor)]
    if not found or not found[0].dim() or not len(found[0]):
        raise ValueError("inputs and targets must have tensors of at least one sample, got none")
    samples = len(found[0])
    sizes = {len(one) if one.dim() else 0 for one in found}
    if len(sizes) > 1:
        raise ValueError(
            "all tensors of inputs and targets must begin with as many samples, got "
            f"{' and '.join(map(str, sorted(sizes)))}"
        )
    size = max(1, NUMBERS // sum(param.numel() for param in params.values()))
    norms = []
    with evaluation_mode(one), aside():
        for begin in range(0, samples, size):
            part = _cut((inputs, targets), begin, begin + size)
            rows = together(one, params, module, *part)
            if rows is None:
                ends = range(begin, min(begin + size, samples))
                parts = (_cut((inputs, targets), at, at + 1) for at in ends)
                rows = torch.stack([_alone(one, params, module, *part) for part in parts])
            norms.append(rows.norm(dim=1))
    return torch.cat(norms)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a model by name.

    Raises:
        ValueError: there is none.
    """
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not params:
        raise ValueError("the model must have a trained parameter, and it has none")
    return params


def together(
    model: nn.Module, params: Mapping[str, Tensor], loss: Any, inputs: Any, targets: Any
) -> Tensor | None:
    """Return the gradients ``(B, P)`` of all samples of a batch; None where vmap cannot."""

    def loss_of(params: dict[str, Tensor], inputs: Any, targets: Any) -> Tensor:
        inputs, targets = pytree.tree_map(lambda value: value[None], (inputs, targets))
        args, kwargs = (), {}
        if isinstance(inputs, Mapping):
            kwargs = dict(inputs)
        else:
            args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        outputs = functional_call(model, params, args, kwargs)
        return losses_of_samples(outputs, targets, loss).sum()

    values = {name: param.detach() for name, param in params.items()}
    try:
        with warnings.catch_warnings():
            # Of operations that it takes one by one, such as those of recurrent layers.
            warnings.filterwarnings("ignore", "There is a performance drop")
            found = vmap(grad(loss_of), (None, 0, 0))(values, inputs, targets)
        return torch.cat([found[name].flatten(1) for name in params], dim=1)
    except RuntimeError:
        # The model has what vmap does not follow; an error of its own comes again without it.
        return None


def _cut(batch: Any, begin: int, end: int) -> Any:
    return pytree.tree_map(lambda one: one[begin:end] if isinstance(one, Tensor) else one, batch)


def _alone(
    model: nn.Module, params: Mapping[str, Tensor], loss: Any, inputs: Any, targets: Any
) -> Tensor:
    """Return the gradient ``(P,)`` of one sample."""
    with torch.enable_grad():
        losses = losses_of_samples(run_model(model, inputs), targets, loss)
        found = torch.autograd.grad(losses.sum(), [*params.values()], allow_unused=True)
    pairs = zip(found, params.values(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
