"""Clusters of every rank's own samples in a model that ``fully_shard`` has divided."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad import Taken, Weigh
from gq_triton.cluster_grad.accumulate import Accumulator
from gq_triton.dist.sharded.gathered import GatheredClusters
from gq_triton.dist.sharded.layout import layout_of
from gq_triton.dist.sharded.queues import ShardedQueues
from gq_triton.dist.sharded.raw import ShardedRaw
from gq_triton.options import ClusterOptions
from gq_triton.saved.rules import ListOf, Record, check

__all__ = ["ShardedClusters"]


class _Weigh(Weigh):
    """``Weigh``, which frees the statistics of a parameter when its means have been weighted."""

    _queues: ShardedQueues

    def _taken(self, name: str, weighted: Tensor, raw: Tensor, statistics: Tensor) -> Taken:
        self._queues.release(name)
        return super()._taken(name, weighted, raw, statistics)


class ShardedClusters(GatheredClusters):
    """``Clusters`` of a sharded model, for the law of Grad Queue.

    Every rank groups its own samples, and counts by them.

    Args:
        model: the model.
        names: the names of its sharded parameters.
        queues: the rings.
        options: how samples are grouped and how the groups are mixed.
        grad_scale: returns the loss scale that the gradients carry, or None.

    Attributes:
        sink: the sink of the law.

    Raises:
        ValueError: an option that cannot hold, or a parameter that ``fully_shard`` has not
            divided.
    """

    def __init__(
        self,
        model: nn.Module,
        names: dict[Tensor, str],
        queues: ShardedQueues,
        options: ClusterOptions,
        grad_scale: Callable[[], Tensor | None],
    ) -> None:
        if options.mode != "one_backward":
            raise ValueError(
                f'mode="{options.mode}" bypasses the hooks of fully_shard, which reduce gradients: '
                'leave it at "one_backward"'
            )
        self._layout = layout_of(model, queues.params)
        sizes_only = options.n_clusters == 1 and not options.described
        if sizes_only:
            # One cluster needs no features: the model's output tells how many samples there are.
            options = replace(options, features="", clusterer=_one_cluster)
        leaves: dict[str, Tensor] = {}
        self.sink = _Weigh(queues, match_norm=False, grad_scale=grad_scale, leaves=leaves)

        def accumulator(sink: Weigh, names: dict[Tensor, str], covered: Any, assign: Any) -> Any:
            queues.serve(self._layout, set(covered))
            raw = ShardedRaw(queues, self._layout, set(covered), sink.statistics, grad_scale)
            return Accumulator(sink, names, covered, assign, leaves=leaves, raw=raw)

        super().__init__(
            model, names, self.sink, options,
            whole_batch=self._count if options.centroid_scale == "standard_error" else int,
            sizes_only=sizes_only,
            accumulator=accumulator,
        )  # fmt: skip
        self._queues = queues

    @property
    def _raw(self) -> ShardedRaw:
        raw = self.accumulator.raw
        assert isinstance(raw, ShardedRaw)
        return raw

    @property
    def tables(self) -> Mapping[str, Tensor]:
        """By parameter name, what this rank adds to the statistics of the step, ``(1, 5)``."""
        return self._raw.tables

    def _count(self, size: int) -> Tensor:
        """Return the number of samples on all ranks, which a centroid's standard error needs."""
        device = next(iter(self._queues.params.values())).device
        total = torch.full((1,), float(size), dtype=torch.float64, device=device)
        return self._layout.place.add_up_(total)[0]

    def _hooks(self) -> list[Any]:
        """Hook also the parameters whose reduced gradients the rings wait for."""
        handles, watched = super()._hooks(), self.covered()
        for name, param in self._queues.params.items():
            if name in watched and param.requires_grad:
                note = partial(self._note, name)
                handles.append(param.register_post_accumulate_grad_hook(note))
        return handles

    def _note(self, name: str, _: Tensor) -> None:
        self._raw.reduced(name)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all ranks' k-means; every rank must call."""
        return {"ranks": self._layout.place.everywhere(super().state_dict())}

    def check_saved(self, state: Any) -> None:
        """Raise a ValueError that names what keeps a saved state from being loaded."""
        what = "the state of the saved clusters"
        check(state, Record({}), what)
        if "ranks" not in state:
            return
        check(state, Record({"ranks": ListOf(Record({}))}), what)
        for one in state["ranks"]:
            super().check_saved(one)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load this rank's saved state; with another number of ranks k-means starts anew."""
        states, place = state.get("ranks", []), self._layout.place
        super().load_state_dict(states[place.rank] if len(states) == place.world else {})


def _one_cluster(features: Tensor) -> Tensor:
    return torch.zeros(len(features), dtype=torch.int64, device=features.device)
