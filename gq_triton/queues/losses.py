"""The effective length: the number of newest gradients that count, from the last steps' losses."""

import math

import torch
from torch import Tensor

from gq_triton.options import LawOptions
from gq_triton.replayed import refuse_replay

__all__ = ["effective_length", "length_of", "new_losses", "record_loss"]


def new_losses(window: int, longest: int, device: torch.device) -> Tensor:
    """Return an empty history of losses: ``(longest + window - 1,)`` NaN, newest first."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.full((longest + window - 1,), math.nan, dtype=dtype, device=device)


def record_loss(losses: Tensor, loss: Tensor | float) -> Tensor:
    """Return the history with ``loss`` as its newest entry, without waiting for the device."""
    if not isinstance(loss, Tensor) or loss.device != losses.device:
        refuse_replay(
            "record_loss gets a number of the host, which would stay the same", "give the tensor"
        )
    if not isinstance(loss, Tensor):
        # As a number of a launch: a copy from the host's memory could not be replayed.
        return torch.cat([losses.new_full((1,), float(loss)), losses[:-1]])
    value = loss.detach()
    if value.numel() != 1:
        raise ValueError(f"loss must be one number, got a tensor of shape {tuple(value.shape)}")
    value = value.to(losses, non_blocking=True)
    return torch.cat([value.reshape(1), losses[:-1]])


def effective_length(losses: Tensor, window: int, shortest: int, longest: int) -> Tensor:
    """Return how many of the newest gradients the statistics use, 0-d int64 on the device.

    Section 3.1 of the paper: a window slides back over the losses as far as its sum grows, that is,
    as long as the loss has been falling; ``docs/method.md`` has the exact reading. A loss that is
    not finite, or was never recorded, ends the scan.
    """
    sums = losses.unfold(0, window, 1).sum(dim=1)
    known = torch.isfinite(sums)
    falling = (sums[:-1] < sums[1:]) & known[:-1] & known[1:]
    steps = falling.long().cumprod(0).sum()
    return (steps + 1).clamp(shortest, longest)


def length_of(losses: Tensor | None, options: LawOptions, device: torch.device) -> Tensor | None:
    """Return the effective length that the options ask for, 0-d int64; None stands for L.

    Args:
        losses: the history, or None where no loss was recorded yet.
        options: options of the law.
        device: device of the result where no loss was recorded yet.
    """
    if options.loss_window is None:
        return None
    if losses is None:
        losses = new_losses(options.loss_window, options.queue_length, device)
    return effective_length(losses, options.loss_window, options.shortest, options.queue_length)
