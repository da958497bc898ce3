"""Steps that a CUDA graph replays: what only Python would do there is refused, in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["refuse_replay", "to_be_replayed"]

# How many steps of ``cuda_graph`` run their Python now. Backward passes run in threads of autograd,
# so the number is that of the process.
_depth = 0


@contextmanager
def to_be_replayed() -> Iterator[None]:
    """Run a step whose Python does not run in later calls, because they replay it."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def refuse_replay(what: str, cure: str) -> None:
    """Raise a RuntimeError within a step of ``cuda_graph``.

    The warm-up raises it, too, so that nothing is captured that a replay would get wrong.

    Args:
        what: what would go wrong, as a clause.
        cure: what to do.
    """
    if _depth:
        raise RuntimeError(f"cuda_graph cannot replay this step: {what}; {cure}")
