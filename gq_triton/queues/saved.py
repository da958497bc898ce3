"""Digests of what a model's queues hold."""

import ctypes
import hashlib
from collections.abc import Iterable, Iterator

from torch import Tensor

from gq_triton.ring import local

__all__ = ["LOSSES", "digests", "sha"]

# The key of the losses' digest, among the names of the parameters.
LOSSES = "(losses)"


def digests(
    names: Iterable[str], rings: Iterator[tuple[str, Tensor, Tensor]], losses: Tensor | None
) -> dict[str, bytes]:
    """Return the SHA-256 of each parameter's ring and counter by name, and that of the losses.

    Args:
        names: the parameters' names.
        rings: name, ring and counter of each parameter that has one.
        losses: the history of losses, or None.

    Returns:
        Digests by name; the losses come last, under ``LOSSES``. A ring that nothing was queued in
        counts as absent, allocated or not.
    """
    found = {name: sha(name) for name in (*names, LOSSES)}
    for name, queue, queued in rings:
        if int(local(queued)) > 0:
            found[name] = sha(name, queue, queued)
    if losses is not None and not bool(losses.isnan().all()):
        found[LOSSES] = sha(LOSSES, losses)
    return found


def sha(name: str, *contents: Tensor) -> bytes:
    """Return the SHA-256 of a name and of tensors."""
    sha = hashlib.sha256(name.encode())
    for tensor in contents:
        sha.update(_bytes(tensor))
    return sha.digest()


def _bytes(tensor: Tensor) -> bytes:
    """Return the content of a tensor in row-major order."""
    dense = local(tensor).detach().cpu().contiguous()
    return ctypes.string_at(dense.data_ptr(), dense.numel() * dense.element_size())
