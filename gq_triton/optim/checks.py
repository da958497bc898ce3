"""Checks of the optimizers' own options; each returns what is wrong, in clauses."""

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gq_triton.options import shown

__all__ = [
    "beta_problems", "number_problems", "rate_problems", "switch_problems", "torch_problems",
]  # fmt: skip

# A step multiplies an option by others. From here on the product can leave float32, and torch would
# raise in the middle of the step.
_HIGHEST = 1e20


def rate_problems(options: Mapping[str, Any], *names: str) -> Iterator[str]:
    """Yield what is wrong with options that are numbers >= 0 or tensors of one element.

    Args:
        options: the options of a group.
        names: which of them to check.
    """
    for name in names:
        value = options[name]
        if not isinstance(value, Tensor):
            yield from _number(name, value, least=0)
        elif value.is_nested or value.numel() != 1:
            yield f"{name} must hold one element, got {shown(value)}"
        elif value.is_meta or value.layout != torch.strided or not _is_real(value):
            yield f"{name} must be a number, got {shown(value)}"
        else:
            yield from _number(name, value.item(), least=0)


def number_problems(
    options: Mapping[str, Any], *names: str, least: float = -_HIGHEST
) -> Iterator[str]:
    """Yield what is wrong with options that are numbers.

    Args:
        options: the options of a group.
        names: which of them to check.
        least: the smallest number that each may be.
    """
    for name in names:
        yield from _number(name, options[name], least)


def beta_problems(betas: Any) -> Iterator[str]:
    """Yield what is wrong with the decays of the two moments."""
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        yield f"betas must be two numbers, got {shown(betas)}"
        return
    for index, beta in enumerate(betas):
        if not _is_number(beta) or not 0 <= beta < 1:
            yield f"betas[{index}] must be in [0, 1), got {shown(beta)}"


def switch_problems(options: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield what is wrong with an option that is on or off."""
    if not isinstance(options[name], bool):
        yield f"{name} must be True or False, got {shown(options[name])}"


def torch_problems(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with options of torch's optimizers that these ones do not follow.

    ``foreach`` and ``fused`` choose how torch runs a step, and mean nothing here. A step can always
    be captured in a CUDA graph, whatever ``capturable`` says.

    Args:
        options: the options of a group; one that is absent is off.
    """
    for name in ("foreach", "fused", "capturable"):
        value = options.get(name)
        if not (value is None or isinstance(value, bool)):
            yield f"{name} must be None, True or False, got {shown(value)}"
    for name, why in _NOT_FOLLOWED.items():
        value = options.get(name)
        if not (value is None or value is False):
            yield f"{name} must be False, got {shown(value)}: {why}"


# Options of torch's optimizers that would change a step, and why they must be off here.
_NOT_FOLLOWED = {
    "amsgrad": "no maximum of the second moments is kept; use torch.optim.AdamW with GradQueue",
    "differentiable": "a step is not recorded by autograd; use torch's optimizer with GradQueue",
}


def _number(name: str, value: Any, least: float) -> Iterator[str]:
    if not _is_number(value):
        yield f"{name} must be a number, got {shown(value)}"
    elif not value >= least:
        yield f"{name} must be >= {least:g}, got {shown(value)}"
    elif value > _HIGHEST:
        yield f"{name} must be at most {_HIGHEST:g}, got {shown(value)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)


def _is_real(value: Tensor) -> bool:
    kinds = not value.is_complex() and not value.is_quantized
    return kinds and (value.dtype.itemsize > 1 or not value.is_floating_point())
