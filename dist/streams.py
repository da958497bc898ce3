"""One CUDA stream per device for the work of the hook while the backward pass goes on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["SideStreams"]


class SideStreams:
    """CUDA streams, one per device, each of which does the work on all buckets in their order.

    torch takes another stream of a pool for every bucket's callback. The callbacks share tensors,
    such as the losses, which must be written before they are read.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def after_current(self, device: torch.device, wait: bool = True) -> Iterator[None]:
        """Work in the device's stream, after what the current stream was given so far.

        Args:
            device: the device of the work; on the CPU there are no streams and nothing to order.
            wait: whether the current stream then waits for the work. Without it the caller returns
                a future that marks the end of the work.
        """
        if device.type != "cuda":
            yield
            return
        stream, current = self.of(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        if wait:
            current.wait_stream(stream)

    def of(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream of a CUDA device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
