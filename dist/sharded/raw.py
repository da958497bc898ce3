"""The raw gradients of a sharded model: taken from the layers, divided among the ranks.

``fully_shard`` reduces a unit's weighted gradients when the unit's backward pass is over, unless it
is told to accumulate (``set_requires_gradient_sync(False)``). The raw ones follow the weighted.
"""

import weakref
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from gq_triton.cluster_grad.passes import in_backward
from gq_triton.cluster_grad.raw import RawGradients
from gq_triton.cluster_grad.step import Step
from gq_triton.dist.collectives import reduce_scatter
from gq_triton.dist.sharded.layout import Layout
from gq_triton.dist.sharded.queues import ShardedQueues
from gq_triton.float8 import wire_type
from gq_triton.law import match_norm_, square_norm
from gq_triton.ring import flat, in_use, local

__all__ = ["ShardedRaw"]

Share = float | Tensor


class ShardedRaw(RawGradients):
    """The raw mean gradient of every parameter whose shards' gradients came from a sink.

    Ranks count by their samples, and each forward pass by its own: W ranks with K clusters are one
    process with those W * K clusters.

    Args:
        queues: the rings.
        layout: the layout of the model.
        covered: the names of the clustered parameters.
        statistics: by name, what the sink noted of its last weighting, ``(C, 5)``.
        grad_scale: returns the loss scale that the gradients carry, or None.

    Attributes:
        kept: this rank's shards of the raw means by name.
        tables: by name, what this rank adds to the statistics of the step, ``(1, 5)``.
    """

    def __init__(
        self,
        queues: ShardedQueues,
        layout: Layout,
        covered: set[str],
        statistics: Mapping[str, Tensor],
        grad_scale: Callable[[], Tensor | None],
    ) -> None:
        super().__init__(queues.params, lambda: None)
        self._queues, self._layout, self._covered = queues, layout, covered
        self._statistics, self._grad_scale = statistics, grad_scale
        self.tables: dict[str, Tensor] = {}
        # This rank's whole raw gradients. Those in _given wait until the leaf has the weighted one,
        # those in _waiting until fully_shard has reduced the weighted one.
        self._given: dict[str, Tensor] = {}
        self._origins: dict[str, list[tuple[int, Tensor]]] = {}
        self._waiting: dict[str, Tensor] = {}
        self._adds: dict[str, bool] = {}
        # Parameters of one unit whose weighted gradients have just been reduced.
        self._reduced: list[str] = []
        self._changed: list[str] = []
        self._shares: weakref.WeakKeyDictionary[Step, list[Share]] = weakref.WeakKeyDictionary()
        # By parameter name: the share in its last raw gradient, and the sum of the ranks' units.
        self._counts: dict[str, tuple[Share, Share]] = {}
        # An empty tensor of the type of this backward pass's raw gradients, once there is one.
        self._like: Tensor | None = None

    def _share(self, step: Step) -> list[Share]:
        """Return what this rank counts in a forward pass; every rank must call.

        Returns:
            Numbers on the CPU, else 0-d tensors, for which the host need not wait: the factors of a
            weighted gradient, of a raw one, and of one that was weighted as one cluster; and the
            sum of all ranks' units (``Groups.unit``), by which a sum over the ranks is larger than
            a mean over their samples.
        """
        if step not in self._shares:
            groups, place = step.groups, self._layout.place
            mine = torch.cat([groups.mass, groups.one_cluster[3]])
            unit = mine.new_full((1,), groups.unit)
            mine = torch.cat([mine, unit])
            total = place.add_up_(mine.clone())
            # A mean loss has unit 1. A summed loss counts by its number of samples already.
            even = total[3] / mine[3]
            factors = torch.stack([even, torch.ones_like(even), even])
            shares = torch.where(total[:3] > 0, factors * mine[:3] / total[:3], 0.0)
            shares = torch.cat([shares, total[3:]])
            known = mine.device.type == "cpu"
            self._shares[step] = shares.tolist() if known else list(shares.unbind())
        return self._shares[step]

    def counted(self, step: Step, gradient: Tensor, whole: bool = False) -> Tensor:
        """Return a weighted gradient times what this rank counts in it."""
        factor = self._share(step)[2 if whole else 0]
        return gradient if isinstance(factor, float) and factor == 1 else gradient * factor

    def add(self, step: Step, name: str, raw: Tensor, whole: bool = False) -> None:
        """Keep a raw gradient until ``note`` is told that the leaf has the weighted one."""
        _, share, _, units = self._share(step)
        raw = raw * (share / step.groups.unit)
        self._counts[name], self._like = (share, units), raw.new_empty(0)
        given = self._given.get(name)
        self._given[name] = raw if given is None else given + raw
        self._origins.setdefault(name, []).append((self._number, step.groups.mass))

    def note(self, name: str) -> None:
        """Have a raw gradient wait for the reduction: the leaf has just got the weighted one."""
        raw = self._given.pop(name, None)
        if raw is None:
            return
        waiting = self._waiting.get(name)
        if waiting is None:
            self._adds[name] = self._goes_on(name)
            if not self._adds[name]:
                self._masses[name] = []
        self._waiting[name] = raw if waiting is None else waiting + raw
        self._masses[name] += self._origins.pop(name)

    def _goes_on(self, name: str) -> bool:
        """Return whether ``p.grad`` still holds the gradients of earlier reductions."""
        grad, left = self._params[name].grad, self._left.get(name)
        if grad is None or left is None or left[0] != id(grad):
            return False
        # It was changed in place: zeroed for a new step, or clipped.
        return left[1] == grad._version or bool(local(grad).any())

    def reduced(self, name: str) -> None:
        """Note that ``p.grad`` has a reduced gradient; reduce the raw ones of the unit before."""
        units = self._layout.units
        if self._reduced and units[self._reduced[0]] is not units[name]:
            self._reduce()
        self._reduced.append(name)

    @torch.no_grad()
    def _reduce(self) -> None:
        """Add up raw gradients of one unit over the ranks, each rank its shards."""
        names, self._reduced = self._reduced, []
        unit, place = self._layout.units[names[0]], self._layout.place
        columns = list(unit.columns(names))
        known = self._like
        if known is None:
            return  # the gradients come from no forward pass of the model: no sample is known
        dtype = wire_type(self._queues.options.queue_dtype, known.dtype)
        width = columns[-1][2].stop
        sent = torch.empty(
            dist.get_world_size(place.shard), width, dtype=dtype, device=known.device
        )
        for name, cut, where in columns:
            raw = self._waiting.pop(name, None)
            if raw is None:
                sent[:, where].zero_()  # another rank has used the parameter
            else:
                cut.scatter(flat(raw), sent[:, where])
                in_use(raw)
        mine = reduce_scatter(sent.view(-1), place.shard)
        for group in place.groups[:-1]:
            dist.all_reduce(mine, group=group)
        in_use(sent)
        for name, _, where in columns:
            param = self._params[name]
            shard = mine[where][: local(param).numel()].to(known.dtype)
            if self._adds.pop(name, False) and name in self.kept:
                shard = self.kept[name] + shard
            self.kept[name] = shard
            grad = param.grad
            if grad is None:
                continue  # a hook of the user has taken it
            self._left[name] = id(grad), grad._version
            self._changed.append(name)

    def end_pass(self) -> None:
        """Reduce what is left, and forget gradients that the backward pass has not given."""
        self._given, self._origins = {}, {}
        if in_backward():
            # fully_shard may end its last units in a callback that comes after this one.
            engine = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
            engine.queue_callback(self._finish)
        else:
            self._finish()

    @torch.no_grad()
    def _finish(self) -> None:
        if self._reduced:
            self._reduce()
        self._like = None
        self._queues.end_pass()
        grads = {name: self._params[name].grad for name in self._changed}
        shards = {name: local(grad) for name, grad in grads.items() if grad is not None}
        self._changed = []
        if shards:
            self._note_norms(shards)

    def _note_norms(self, grads: Mapping[str, Tensor]) -> None:
        """Note the statistics of reduced gradients; match their norms where that is asked for.

        Args:
            grads: this rank's shards of the weighted gradients by name.
        """
        scale, place = self._grad_scale(), self._layout.place
        device = next(iter(grads.values())).device
        tables = torch.zeros(len(grads), 5, dtype=torch.float64, device=device)
        for row, (name, grad) in zip(tables, grads.items(), strict=True):
            share, units = self._counts.get(name, (0.0, place.world))
            # fully_shard has divided the sum over the ranks; the raw gradient is a mean.
            unit = units / self._layout.divisor(name)
            row[0] = square_norm(self.kept[name], scale)
            row[1] = square_norm(grad, scale) / unit**2
            seen = self._statistics.get(name)
            if seen is not None:
                row[2:] = seen[:, 2:].sum(dim=0) * share
        if self._queues.options.match_norm:
            squares = tables[:, :2].clone()
            dist.all_reduce(squares, group=place.shard)
            match_norm_(list(grads.values()), tables, squares)
        # All copies of a shard count its norms.
        tables[:, :2] /= place.copies
        self.tables.update(zip(grads, tables.split(1), strict=True))

    def take_all(self) -> dict[str, Tensor]:
        """Return by name the shards of parameters with a ``p.grad``, and forget all."""
        kept, self.kept, self._left, self._masses = self.kept, {}, {}, {}
        in_use(*kept.values())  # they were made in a stream of FSDP2
        return {name: raw for name, raw in kept.items() if self._params[name].grad is not None}
