"""The options of the DDP hook: default, check and help sentence of each, once."""

from dataclasses import dataclass
from typing import Any, TypedDict

from torch.amp.grad_scaler import GradScaler

from gq_triton.options import LawKeywords, Options, RankClusterKeywords, option

__all__ = ["NOT_ON_RANKS", "HookKeywords", "HookOptions", "StateKeywords"]

# Options of ``ClusterOptions`` that the hook does not take: DDP averages, so each rank's loss must
# be a mean; and a hook works inside of ``loss.backward()``, so there is one backward pass.
NOT_ON_RANKS = "loss_reduction", "mode"


def _not_negative(name: str, value: Any) -> str | None:
    fits = isinstance(value, int) and value >= 0
    return None if fits else f"{name} must be an integer >= 0, got {value}"


@dataclass(frozen=True, kw_only=True)
class HookOptions(Options):
    """Options of the DDP hook, in addition to those of the law and of the clusters."""

    shard_queue: bool = option(False, "divide the queue among the ranks.")
    grad_scaler: GradScaler | None = option(
        None,
        "the ``GradScaler`` of the run, which must scale alike on every rank; the queue then holds "
        "unscaled gradients.",
    )
    verify_every: int = option(
        0,
        "N compares the ranks' queues at the start of every N-th backward pass and raises a "
        "RuntimeError that names the first parameter that differs; 0 compares no queues. The "
        "comparison reads the whole queue. Slices have no copy to compare with: with "
        "``shard_queue`` the cuts, counters and losses are compared, and with clusters the "
        "statistics. The options are compared in the first backward pass, whatever N is.",
        _not_negative,
    )


class HookKeywords(TypedDict, total=False):
    """The keywords of ``HookOptions``."""

    shard_queue: bool
    grad_scaler: GradScaler | None
    verify_every: int


class StateKeywords(RankClusterKeywords, LawKeywords, HookKeywords, total=False):
    """The keywords of ``GradQueueState`` and ``register``."""
