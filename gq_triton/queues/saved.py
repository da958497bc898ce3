"""What a model's queues hold: digests, and the rule that a saved state must meet."""

import ctypes
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from gq_triton.options import LawOptions
from gq_triton.ring import local
from gq_triton.saved.rules import Also, Exactly, Maybe, Record, Rule
from gq_triton.saved.state import counter_rule, losses_rule, ring_rule

__all__ = ["LOSSES", "SHAPE_OPTIONS", "digests", "saved_rule", "sha"]

# Options that a saved state must share with the queues it is loaded into.
SHAPE_OPTIONS = "queue_length", "loss_window"

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


def saved_rule(params: Mapping[str, Tensor], options: LawOptions, highest: int) -> Rule:
    """Return the rule that a saved state must meet; further keys of it are not looked at.

    Args:
        params: the parameters of the queues by name.
        options: the options of the queues.
        highest: the largest number of gradients that a ring may have taken.
    """
    length, window = options.queue_length, options.loss_window
    rings = {name: ring_rule(param, length) for name, param in params.items()}
    counters = dict.fromkeys(params, counter_rule(highest))
    lacking = "that this model lacks"
    losses: Rule = Exactly(None)
    if window is not None:
        losses = Maybe(losses_rule(window, length))
    record = {
        "options": Record({name: Exactly(getattr(options, name)) for name in SHAPE_OPTIONS}),
        "losses": losses,
        "queue": Record({}, rings, unknown=lacking, named=False),
        "queued": Record({}, counters, unknown=lacking, named=False),
    }
    return Also(Record(record), _unpaired)


def _unpaired(state: Mapping[str, Any]) -> str | None:
    """Return a clause that names a saved ring without a counter, or a counter without a ring."""
    alone = sorted(state["queue"].keys() ^ state["queued"].keys())
    return (
        f"queue and queued must have the same names, {alone[0]!r} is in one only" if alone else None
    )
