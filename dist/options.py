"""The options of the DDP hook: default, check and help sentence of each, once."""

import hashlib
from dataclasses import dataclass
from typing import Any, TypedDict

from torch.amp.grad_scaler import GradScaler

from gq_triton.options import (
    ClusterOptions,
    LawKeywords,
    LawOptions,
    Options,
    RankClusterKeywords,
    option,
)

__all__ = ["NOT_ON_RANKS", "HookKeywords", "HookOptions", "StateKeywords", "digests_of"]

# Options of ``ClusterOptions`` that the hook does not take: DDP averages, so each rank's loss must
# be a mean; and a hook works inside of ``loss.backward()``, so there is one backward pass.
NOT_ON_RANKS = "loss_reduction", "mode"
# Options of ``ClusterOptions`` that must be the same on every rank.
_SHARED = "population_power", "centroid_scale", "accumulation_steps"


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


def digests_of(law: LawOptions, clusters: ClusterOptions, hook: HookOptions) -> dict[str, bytes]:
    """Return by name the SHA-256 of each option that must be the same on every rank.

    These options decide the result, or which collectives the ranks issue.
    """
    shared = vars(law) | {name: getattr(clusters, name) for name in _SHARED}
    shared |= {"shard_queue": bool(hook.shard_queue), "verify_every": hook.verify_every}
    shared["n_clusters (given or not)"] = clusters.n_clusters is not None
    texts = {name: repr(_comparable(v)) for name, v in shared.items() if name != "backend"}
    return {name: hashlib.sha256(text.encode()).digest() for name, text in texts.items()}


def _comparable(value: Any) -> Any:
    """Return an option in a form that gives equal options one text: 3 and 3.0, True and 1."""
    return float(value) if isinstance(value, (int, float)) else value
