"""The score of a sample, an upper bound of its gradient's norm, and what scores are worth.

Katharopoulos and Fleuret, "Not All Samples Are Created Equal" (2018). Shapes: B samples, C classes,
d the numbers of one sample's output.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gq_triton.grouping.features import first_tensor
from gq_triton.options import shown

__all__ = [
    "Loss",
    "as_module",
    "check_scores",
    "importance_score",
    "losses_of_samples",
    "sample_losses",
    "total_variation",
    "variance_reduction",
]

# A loss of outputs and targets: a module, a function, or one of the names below.
Loss = Callable[..., Tensor] | str
_NAMES: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
}


def importance_score(logits: Any, targets: Any, loss: Loss) -> Tensor:
    r"""Return the norm of each sample's gradient at the model's output.

    The norm of a sample's whole gradient is at most a constant times this score (equation 24 of the
    paper's supplement; for softmax and cross-entropy the score is ``||p - y||``). The loss of a
    sample is the mean over its elements, as torch's ``"mean"`` has it, or their sum for a loss with
    ``reduction="sum"``. Positions with ``ignore_index`` count as zeros.

    Args:
        logits: the model's output, of any floating type: ``(B, C, ...)`` for cross-entropy,
            ``(B, ...)`` for the squared error. For any other loss, what that loss takes; tensors in
            a tuple, list or dict count together, and all that the loss uses begin with B.
        targets: what the loss takes as its second argument.
        loss: ``torch.nn.CrossEntropyLoss`` (class weights, label smoothing, ``ignore_index`` and
            probabilities as targets are exact), ``torch.nn.MSELoss``, their functions in
            ``torch.nn.functional``, or ``"cross_entropy"`` or ``"mse"``; any other loss module of
            torch; or a function ``(outputs, targets) -> (B,)`` or ``(B, ...)``, a loss per sample,
            through which torch differentiates. No ``reduction`` is needed.

    Returns:
        ``(B,)``, at least 0, in float32, or float64 for float64 outputs; without a graph.

    Raises:
        TypeError: ``loss`` is none of these.
        ValueError: the shapes of outputs and targets disagree, or the loss returned a scalar.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0], [9.0, -9.0]])
        >>> score = importance_score(logits, torch.tensor([0, 0]), torch.nn.CrossEntropyLoss())
        >>> [round(s, 4) for s in score.tolist()]  # the second sample is learnt: ||p - y|| is 0
        [0.7071, 0.0]
    """
    module = as_module(loss)
    with torch.no_grad():
        if type(module) is nn.CrossEntropyLoss:
            grad = _cross_entropy_gradient(module, *_tensors(logits, targets))
        elif type(module) is nn.MSELoss:
            output, target = _tensors(logits, targets)
            _same_shape(output, target)
            grad = 2 * (_wide(output) - _wide(target))
        else:
            return _by_autograd(module, logits, targets)
        count = 1 if module.reduction == "sum" else _positions(module, grad)
        return _norm(grad) / count


def sample_losses(outputs: Any, targets: Any, loss: Loss) -> Tensor:
    """Return the loss of every sample, ``(B,)``, without a graph; arguments and errors as above."""
    with torch.no_grad():
        return losses_of_samples(outputs, targets, loss)


def losses_of_samples(outputs: Any, targets: Any, loss: Loss) -> Tensor:
    """Return what ``sample_losses`` does, with the graph of the outputs."""
    module = as_module(loss)
    if type(module) in (nn.CrossEntropyLoss, nn.MSELoss):
        outputs, targets = _tensors(outputs, targets)
        outputs = outputs.to(_wide_type(outputs))
    return _per_sample(module, outputs, targets)


def variance_reduction(scores: Tensor) -> float:
    r"""Return tau, the batch size that drawing by score is worth: ``sqrt(B sum_i g_i^2)``.

    ``g_i`` are the scores divided by their sum, the probabilities with which samples are drawn.
    tau is ``(1 - ||g - u||^2 / ||g||^2)^(-1/2)`` with ``u = 1/B``, the paper's form: 1 where all
    scores are equal, and ``sqrt(B)`` where one of them is all. Where scores are the norms of the
    samples' gradients, a uniform batch of ``tau^2`` times the size has at least the variance of a
    batch drawn by score; the paper takes ``tau``, which is careful. tau says nothing of how well
    scores follow those norms. Scores that are all zero give 1.

    Args:
        scores: ``(B,)``, finite, at least 0, B >= 1.

    Raises:
        ValueError: the scores have another shape, or one is negative, infinite or NaN.

    Examples:
        >>> import torch
        >>> round(variance_reduction(torch.tensor([1.0, 1.0, 1.0, 5.0])), 6)
        1.322876
    """
    scores = check_scores(scores)
    largest = float(scores.max())
    if largest == 0:
        return 1.0
    scaled = scores.double() / largest  # squares of scores below 1e-160 would vanish
    share = scaled / scaled.sum()
    # Rounding must not leave the range [1, sqrt(B)].
    return min(max(1.0, math.sqrt(len(share) * float(share @ share))), math.sqrt(len(share)))


def total_variation(scores: Tensor) -> float:
    r"""Return how far drawing by score is from uniform draws: ``sum_i |g_i - 1/B| / 2``.

    It is 0 where all scores are equal, and nearly 1 where one of many is all. A gate of
    ``ImportanceLoader``, which the authors open at 0.5.

    Args:
        scores: ``(B,)``, finite, at least 0, B >= 1; all zeros give 0.

    Raises:
        ValueError: as ``variance_reduction``.

    Examples:
        >>> import torch
        >>> total_variation(torch.tensor([1.0, 1.0, 1.0, 5.0]))
        0.375
    """
    scores = check_scores(scores).double()
    largest = float(scores.max())
    if largest == 0:
        return 0.0
    share = scores / largest
    return float((share / share.sum() - 1 / len(share)).abs().sum() / 2)


def check_scores(scores: Any, what: str = "scores") -> Tensor:
    """Return scores ``(B,)`` if they can be drawn by, else raise a ValueError in one sentence."""
    if not isinstance(scores, Tensor) or scores.dim() != 1 or len(scores) == 0:
        raise ValueError(
            f"{what} must be a tensor (B,) of at least one sample, got {shown(scores)}"
        )
    if not bool(((scores >= 0) & (scores < math.inf)).all()):
        bad = scores[~((scores >= 0) & (scores < math.inf))]
        raise ValueError(
            f"{what} must be finite and >= 0, got {float(bad[0])} ({len(bad)} of {len(scores)} are "
            "not): look at the model's outputs and the loss"
        )
    return scores


# --- losses


def as_module(loss: Any) -> Any:
    """Return a loss; one by its name or function as the module with the same defaults.

    Raises:
        TypeError: it is no loss.
    """
    if isinstance(loss, str) and loss in _NAMES:
        return _NAMES[loss]()
    if loss is F.cross_entropy:
        return nn.CrossEntropyLoss()
    if loss is F.mse_loss:
        return nn.MSELoss()
    if isinstance(loss, str) or not callable(loss):
        raise TypeError(
            "loss must be a loss module of torch, a function (outputs, targets) -> (B,), "
            f'"cross_entropy" or "mse", got {shown(loss)}'
        )
    return loss


def _wide_type(tensor: Tensor) -> torch.dtype:
    dtype = tensor.dtype if tensor.dtype.is_floating_point else torch.float32
    return torch.promote_types(dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_wide_type(tensor))


def _norm(grad: Tensor) -> Tensor:
    rows = grad.flatten(1) if grad.dim() > 1 else grad[:, None]
    return torch.linalg.vector_norm(rows, dim=1)  # pyright: ignore  (torch has no stub)


def _positions(module: nn.Module, grad: Tensor) -> int:
    """Return over how many losses of one sample a mean is taken."""
    first = 2 if isinstance(module, nn.CrossEntropyLoss) else 1
    return max(1, grad.shape[first:].numel())


def _tensors(output: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Return the first tensor of a model's output, and the targets, on its device."""
    found = first_tensor(output)
    if found is None or not isinstance(target, Tensor) or len(found) == 0:
        raise ValueError(
            "this loss needs outputs with at least one sample and targets that are tensors, got "
            f"{shown(output)} and {shown(target)}"
        )
    return found, target.detach().to(found.device)


def _same_shape(output: Tensor, target: Tensor) -> None:
    # torch would broadcast (B, 1) and (B,) to (B, B), with a warning.
    if output.shape != target.shape:
        raise ValueError(
            f"outputs and targets must have the same shape, got {tuple(output.shape)} and "
            f"{tuple(target.shape)}"
        )


def _cross_entropy_gradient(module: nn.CrossEntropyLoss, logits: Tensor, target: Tensor) -> Tensor:
    """Return the gradient ``(B, C, ...)`` of every sample's cross-entropy, summed over positions.

    With ``a_c`` the factor of ``-log p_c`` in the loss it is ``p * sum_c a_c - a``.
    """
    if logits.dim() < 2:
        raise ValueError(f"cross-entropy needs logits (B, C, ...), got {tuple(logits.shape)}")
    probs = _wide(logits).softmax(1)
    classes, smoothing = logits.shape[1], module.label_smoothing
    weight = module.weight
    if weight is not None:
        weight = weight.to(probs).view(-1, *[1] * (logits.dim() - 2))
    if target.dtype.is_floating_point:
        _same_shape(logits, target)
        factors = target.to(probs) * (1 - smoothing) + smoothing / classes
        factors = factors if weight is None else factors * weight
        return probs.mul_(factors.sum(1, keepdim=True)).sub_(factors)
    if target.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"targets must be classes {tuple(logits.shape[:1] + logits.shape[2:])} or "
            f"probabilities {tuple(logits.shape)}, got {tuple(target.shape)}"
        )
    target = target.unsqueeze(1).long()
    counted = target != module.ignore_index
    target = target.where(counted, 0)
    # On a GPU the host would wait for this answer, and torch's own check follows at once.
    if target.device.type == "cpu" and bool(((target < 0) | (target >= classes)).any()):
        raise ValueError(
            f"targets must be classes from 0 to {classes - 1}, got {int(target.min())} to "
            f"{int(target.max())}"
        )
    if weight is None:
        # All factors sum to 1. Most losses are this one, so no second tensor of this size is made.
        probs.scatter_add_(1, target, torch.full_like(target, -(1 - smoothing), dtype=probs.dtype))
        grad = probs.sub_(smoothing / classes) if smoothing else probs
    else:
        factors = (weight * (smoothing / classes)).expand_as(probs).clone()
        own = weight.expand_as(probs).gather(1, target) * (1 - smoothing)
        factors.scatter_add_(1, target, own)
        grad = probs.mul_(factors.sum(1, keepdim=True)).sub_(factors)
    return grad.mul_(counted)


def _by_autograd(loss: Any, outputs: Any, targets: Any) -> Tensor:
    """Return the score of any loss, by one backward pass through the loss alone."""
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            return value
        leaves.append(_wide(value).clone().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        losses = _per_sample(loss, pytree.tree_map(leaf, outputs), targets)
        if not leaves or not losses.requires_grad:
            raise ValueError("the loss must depend on the model's outputs, and it does not")
        grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    used = [grad for grad in grads if grad is not None]
    for grad in used:
        if grad.dim() == 0 or len(grad) != len(losses):
            raise ValueError(
                f"the outputs that the loss uses must begin with the {len(losses)} samples, got "
                f"{tuple(grad.shape)}"
            )
    norms = torch.stack([_norm(grad).to(losses) for grad in used])
    return torch.linalg.vector_norm(norms, dim=0)  # pyright: ignore  (torch has no stub)


def _per_sample(loss: Any, outputs: Any, targets: Any) -> Tensor:
    """Return the loss ``(B,)`` of every sample, whatever reduction the loss has."""
    summed = False
    if isinstance(loss, nn.Module) and isinstance(getattr(loss, "reduction", None), str):
        summed = loss.reduction in ("sum", "batchmean")
        loss = copy.copy(loss)
        loss.reduction = "none"
    try:
        losses = loss(outputs, targets)
    except IndexError as error:  # torch's, which knows the class but not how many there are
        if not isinstance(loss, nn.CrossEntropyLoss) or outputs.dim() < 2:
            raise
        raise ValueError(
            f"targets must be classes from 0 to {outputs.shape[1] - 1}: {error}"
        ) from error
    if not isinstance(losses, Tensor) or losses.dim() == 0 or len(losses) == 0:
        raise ValueError(
            "loss must return one loss per sample, (B,) or (B, ...), got "
            f'{shown(losses)}: give it with reduction="none", as in functools.partial(loss, '
            'reduction="none")'
        )
    wide = losses.flatten(1) if losses.dim() > 1 else losses[:, None]
    wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
    return wide.sum(1) if summed else wide.mean(1)
