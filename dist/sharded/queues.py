"""The rings of a sharded model: each rank holds those of its shards.

Shapes: P elements of a parameter, W ranks that divide it, S elements of the largest shard.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gq_triton.dist.collectives import start_all_gather
from gq_triton.dist.sharded.layout import Layout, Unit, place_of
from gq_triton.engines import engine
from gq_triton.law import accepted
from gq_triton.options import LawOptions
from gq_triton.queues import Queues
from gq_triton.ring import flat, least_over, local, mean_over_ranks

__all__ = ["ShardedQueues"]


class _Gathering(NamedTuple):
    """Statistics of a unit that are on their way.

    Attributes:
        names: the parameters.
        work: the collective.
        mine: this rank's shards, ``(2 * S of all parameters,)``.
        whole: all shards, ``(W, 2 * S of all parameters)``.
    """

    names: list[str]
    work: dist.Work
    mine: Tensor
    whole: Tensor


class ShardedQueues(Queues):
    """``Queues`` of parameters that ``fully_shard`` has divided.

    A layer that weights cluster means asks for the statistics of a whole parameter. Those of its
    unit are then gathered, and those of the unit that came next in the last backward pass are
    started. They are kept until the layer has weighted its means.

    Args:
        params: the parameters by name.
        options: options of the law.
    """

    whole = False

    def __init__(self, params: Mapping[str, Tensor], options: LawOptions) -> None:
        super().__init__(params, options)
        self._place = place_of(params)
        self._units: Mapping[str, Unit] = {}
        # Statistics ``(2, P)`` by name; what is on its way by unit; units whose statistics have
        # been gathered in this backward pass; the last of them; the order of the pass before.
        self._known: dict[str, Tensor] = {}
        self._arriving: dict[Unit, _Gathering] = {}
        self._gathered: set[Unit] = set()
        self._latest: Unit | None = None
        self._next: dict[Unit, Unit] = {}
        self.clustered: set[str] = set()

    def serve(self, layout: Layout, clustered: set[str]) -> None:
        """Gather statistics for clusters from now on.

        Args:
            layout: the layout of the model.
            clustered: the names of the parameters that clusters cover.
        """
        self._units, self.clustered = layout.units, clustered

    def record_loss(self, loss: Tensor | float) -> None:
        """Record the mean over all ranks of this step's unscaled loss; every rank must call."""
        if self.options.loss_window is not None:
            sharded = next(p for p in self.params.values() if isinstance(p, DTensor))
            super().record_loss(mean_over_ranks(loss, sharded))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with a ring for every trainable parameter, as a checkpoint needs it.

        ``torch.distributed.checkpoint`` loads into tensors of the new run, before its first step.
        """
        self.init_state()
        return super().state_dict()

    def _read(self, name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return the statistics ``(2, P)`` of a whole parameter; every rank must call."""
        if name not in self._known:
            unit = self._units[name]
            if unit in self._gathered:  # a parameter that a layer weights once more in this pass
                self._arrive(unit, self._start(unit, [name], device))
            else:
                self._settle(unit, device)
        return self._known[name], None

    def _settle(self, unit: Unit, device: torch.device) -> None:
        """Wait for the statistics of a unit, and start those of the next one."""
        self._begin(unit, device)
        self._arrive(unit, self._arriving.pop(unit))
        self._gathered.add(unit)
        if self._latest is not None:
            self._next[self._latest] = unit
        self._latest = unit
        following = self._next.get(unit)
        if following is not None and following not in self._gathered:
            self._begin(following, device)

    def _begin(self, unit: Unit, device: torch.device) -> None:
        if unit not in self._arriving:
            names = [name for name in unit.cuts if name in self.clustered]
            self._arriving[unit] = self._start(unit, names, device)

    def _start(self, unit: Unit, names: list[str], device: torch.device) -> _Gathering:
        """Compute the statistics of this rank's shards and start to gather those of all."""
        size = 2 * sum(unit.cuts[name].size for name in names)
        dtype = torch.float32
        for name in names:
            dtype = torch.promote_types(dtype, self.params[name].dtype)
            dtype = torch.promote_types(dtype, self._stored_type(name))
        mine = torch.zeros(size, dtype=dtype, device=device)
        ops = engine(device, self.options.backend)
        for name, cut, columns in unit.columns(names):
            held = local(self.params[name]).numel()
            if held:
                part = mine[2 * columns.start : 2 * columns.stop].view(2, cut.size)[:, :held]
                (ring,), (queued,) = self._flat_rings([name])
                ops.queue_statistics(ring, queued, part, length=self.effective_length(device))
        whole = mine.new_empty(dist.get_world_size(self._place.shard) * size)
        work = start_all_gather(mine, whole, self._place.shard)
        return _Gathering(names, work, mine, whole.view(-1, size))

    def _arrive(self, unit: Unit, gathering: _Gathering) -> None:
        gathering.work.wait()
        for name, cut, columns in unit.columns(gathering.names):
            parts = gathering.whole[:, 2 * columns.start : 2 * columns.stop]
            self._known[name] = cut.gather(parts.unflatten(1, (2, cut.size)))

    def release(self, name: str) -> None:
        """Free the statistics of a parameter that has been weighted."""
        self._known.pop(name, None)

    def end_pass(self) -> None:
        """Free all statistics: the next step changes the rings."""
        for gathering in self._arriving.values():
            gathering.work.wait()
        self._known.clear()
        self._arriving.clear()
        self._gathered.clear()
        self._latest = None

    def push(
        self,
        raw: Mapping[str, Tensor],
        statistics: Mapping[str, Tensor],
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Queue shards of raw means; every rank must call.

        Args:
            raw: this rank's shards by name.
            statistics: by name ``(1, 5)``, what this rank adds to the statistics of the step.
            grad_scale: the loss scale that the gradients carry, or None.
            found_inf: non-zero where none of them is to be queued, one number, or None.
        """
        for names in self._batches(raw):
            shards = [flat(raw[name]) for name in names]
            ops = engine(shards[0].device, self.options.backend)
            least = least_over([self._place.shard])
            accept = accepted(ops.all_finite(shards), found_inf=found_inf, least=least)
            queues, queued = self._flat_rings(names)
            ops.push_(shards, queues, queued, accept, grad_scale=grad_scale)
            table = self._place.add_up_(torch.cat([statistics[name] for name in names]))
            owners = [name for name in names for _ in range(len(statistics[name]))]
            self._keep_statistics(tuple(names), table, owners)
