"""Tickets: counters on the device, by which the last of several programs knows that it is last."""

import torch
from torch import Tensor

__all__ = ["take_tickets"]

# Tickets that are made at a time.
TICKETS = 1 << 16
# Tickets of each stream, all 0 between its launches, and those that graphs will take.
_of_streams: dict[tuple[torch.device, int], Tensor] = {}
_for_graphs: dict[torch.device, Tensor] = {}


def take_tickets(device: torch.device, count: int) -> Tensor:
    """Return at least ``count`` tickets, int32, that are 0 when the launch begins.

    The launches of a stream follow each other and share their tickets. A launch in a captured graph
    has tickets of its own: graphs may be replayed beside each other. They were made before, because
    a captured filling with zeros would be a launch.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        left = _for_graphs.get(device)
        if left is None or len(left) < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _for_graphs[device] = left[count:]
        return left[:count]
    if device not in _for_graphs:
        _for_graphs[device] = torch.zeros(TICKETS, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    found = _of_streams.get(key)
    if found is None or len(found) < count:
        size = max(count, TICKETS)
        found = _of_streams[key] = torch.zeros(size, dtype=torch.int32, device=device)
    return found
