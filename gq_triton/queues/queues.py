"""The rings of a whole model, keyed by parameter name: what the plug-in and the DDP hook share."""

import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gq_triton.describe import memory
from gq_triton.engines import engine, note_plain_torch
from gq_triton.float8 import stored_type
from gq_triton.law import Law, accepted, match_norm_
from gq_triton.options import LawOptions
from gq_triton.queues.losses import length_of, new_losses, record_loss
from gq_triton.queues.measures import LastStep, measures, measures_by_name
from gq_triton.queues.saved import SHAPE_OPTIONS, digests, saved_rule
from gq_triton.ring import (
    fill_ring,
    flat_gradient,
    in_use,
    least_over,
    local,
    new_counter,
    new_queue,
    refuse_capture,
    rows,
    shard_groups,
)
from gq_triton.saved.rules import COUNTER_LIMIT, check

__all__ = ["Queues"]


class Queues:
    """The last L raw gradients of every parameter of a model, and the law that reads them.

    A ring is allocated when its parameter first has a gradient, on its device and in its memory
    order, so that nothing depends on when the model was moved or wrapped.

    Args:
        params: parameters by name.
        options: options of the law.
    """

    # Whether a parameter's ring is here as a whole, not a part of it and statistics of the rest.
    whole = True

    def __init__(self, params: Mapping[str, Tensor], options: LawOptions) -> None:
        self.params = dict(params)
        self.options = options
        self._queue: dict[str, Tensor] = {}
        self._queued: dict[str, Tensor] = {}
        self._layouts: dict[str, tuple[torch.device, tuple[int, ...]]] = {}
        self._losses: Tensor | None = None
        # By parameter name, a raw gradient that was weighted elsewhere, and whether it is finite.
        self._finite: dict[str, tuple[weakref.ref[Tensor], Tensor, int]] = {}
        self._last = LastStep()

    def weigh_(
        self,
        names: Sequence[str],
        grads: Sequence[Tensor],
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        absent: Tensor | None = None,
    ) -> None:
        """Weight gradients in place and queue the raw ones, all in one call of the engine.

        Args:
            names: the parameters' names.
            grads: their gradients, flat, in the memory order of the parameter, of one type and on
                one device.
            grad_scale: the loss scale the gradients carry, or None.
            found_inf: non-zero where nothing may be weighted or queued, one number, or None.
            absent: ``(N,)`` bool, which gradients are zeros of a parameter that no rank used; None
                for none.
        """
        if not names:
            return
        for name in names:
            self._allocate(name)
        groups = shard_groups(self.params[names[0]])
        finite = engine(grads[0].device, self.options.backend).all_finite(grads)
        accept = accepted(finite, absent=absent, found_inf=found_inf, least=least_over(groups))
        statistics = self._weigh_rings(names, grads, accept, grad_scale)
        for group in groups:
            dist.all_reduce(statistics, group=group)
        if self.options.match_norm:
            match_norm_(grads, statistics)
        self._keep_statistics(tuple(names), statistics)

    def _weigh_rings(
        self,
        names: Sequence[str],
        grads: Sequence[Tensor],
        accept: Tensor,
        grad_scale: Tensor | None,
    ) -> Tensor:
        """Weight gradients in place and queue the raw ones where ``accept``; return statistics."""
        device = grads[0].device
        note_plain_torch(device, self.options.backend, grads)
        return engine(device, self.options.backend).weigh_(
            grads,
            [rows(local(self._queue[name])) for name in names],
            [self._queued[name] for name in names],
            accept,
            self._law(device, grad_scale),
        )

    def _law(self, device: torch.device, grad_scale: Tensor | None) -> Law:
        return Law(self.options.rho, self.effective_length(device), grad_scale)

    def _keep_statistics(
        self,
        names: tuple[str, ...],
        statistics: Tensor | list[Tensor],
        owners: Sequence[str] | None = None,
    ) -> None:
        """Keep the statistics of the step; a parameter that comes again begins a new step.

        Args:
            names: the parameters of the batch.
            statistics: ``(N, 5)``, to be added up, or parts of it.
            owners: the parameter of each row; None says that there is one row for each name.
        """
        self._last.keep(names, statistics, names if owners is None else owners)

    def combine(
        self,
        name: str,
        part: tuple[int, int] | Tensor,
        sums: Tensor,
        *,
        inverse_shares: Tensor,
        mixture: Tensor,
        sigma_scales: Tensor,
        grad_scale: Tensor | None = None,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weight cluster means of one parameter, or of a part of it, and add them up.

        Args:
            name: the parameter's name.
            part: first element and end, in memory order; or the rows ``(U,)`` of a table.
            sums: gradients summed by cluster, ``(K, elements of the part)``.
            inverse_shares: ``(K,)``, factor from each cluster's sum to its mean; 0 for an empty
                cluster.
            mixture: ``(K,)``, weight of each mean in the result.
            sigma_scales: ``(K,)``, factor of sigma for each cluster.
            grad_scale: the loss scale the sums carry, or None.
            into: where to write the weighted and the raw gradient, flat; None allocates.

        Returns:
            The weighted and the raw gradient of the part, flat; ``(C, 5)`` statistics to add up.
        """
        queue, queued = self._read(name, sums.device)
        if isinstance(part, Tensor):
            table = queue.view(len(queue), self.params[name].shape[0], -1)
            queue = table.index_select(1, part).flatten(1)
        else:
            queue = queue[:, part[0] : part[1]]
        return engine(sums.device, self.options.backend).combine(
            sums,
            queue,
            queued,
            self._law(sums.device, grad_scale),
            inverse_shares=inverse_shares,
            mixture=mixture,
            sigma_scales=sigma_scales,
            into=into,
            queue_dtype=self._stored_type(name),
        )

    def combine_rows(
        self,
        name: str,
        grads: Tensor,
        where: Tensor,
        labels: Tensor,
        *,
        inverse_shares: Tensor,
        mixture: Tensor,
        sigma_scales: Tensor,
        grad_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weight cluster means of a table's rows that were looked up, and add them up.

        Args:
            name: the name of the table ``(V, d)``, which is contiguous.
            grads: gradients of the lookups, ``(n, d)``.
            where: the row of each lookup ``(n,)`` int64, or V for one that does not count.
            labels: the cluster of each lookup, ``(n,)`` int64.
            inverse_shares: as in ``combine``.
            mixture: as in ``combine``.
            sigma_scales: as in ``combine``.
            grad_scale: as in ``combine``.

        Returns:
            The weighted and the raw gradient, ``(V, d)``; ``(C, 5)`` statistics to add up. ``push``
            of this raw gradient does not look at it again.
        """
        self._allocate(name)
        weighted, raw, table, finite = engine(grads.device, self.options.backend).combine_rows(
            grads,
            where,
            labels,
            rows(local(self._queue[name])),
            self._queued[name],
            self._law(grads.device, grad_scale),
            inverse_shares=inverse_shares,
            mixture=mixture,
            sigma_scales=sigma_scales,
        )
        self._finite[name] = weakref.ref(raw), finite.view(1), 0
        return weighted, raw, table

    def combine_all(
        self,
        names: Sequence[str],
        sums: Sequence[Tensor],
        weighted: Sequence[Tensor],
        raw: Sequence[Tensor],
        *,
        inverse_shares: Tensor,
        mixture: Tensor,
        sigma_scales: Tensor,
        grad_scale: Tensor | None = None,
    ) -> list[Tensor]:
        """Weight cluster means of whole parameters and add them up, with few launches.

        Args:
            names: the parameters' names, whose rings are of one type.
            sums: for each, the gradients summed by cluster, ``(K, P)``, of one type.
            weighted: where to write the weighted gradients, flat, of one type.
            raw: where to write the raw gradients, in the shape of their parameters. ``push`` of
                these very tensors does not look at them again to see whether they are finite.
            inverse_shares: as in ``combine``.
            mixture: as in ``combine``.
            sigma_scales: as in ``combine``.
            grad_scale: as in ``combine``.

        Returns:
            For each parameter ``(C, 5)`` statistics to add up.
        """
        for name in names:
            self._allocate(name)
        device = sums[0].device
        tables, finite = engine(device, self.options.backend).combine_all(
            sums,
            [rows(local(self._queue[name])) for name in names],
            [self._queued[name] for name in names],
            weighted,
            [flat_gradient(mean, self.params[name]) for name, mean in zip(names, raw, strict=True)],
            self._law(device, grad_scale),
            inverse_shares=inverse_shares,
            mixture=mixture,
            sigma_scales=sigma_scales,
        )
        for place, (name, mean) in enumerate(zip(names, raw, strict=True)):
            self._finite[name] = weakref.ref(mean), finite, place
        return tables

    def _known_finite(
        self, names: list[str], raw: Mapping[str, Tensor]
    ) -> tuple[list[str], Tensor | None]:
        """Return which raw gradients are finite, ``(N,)`` bool, if it is known of all of them.

        The names come in the order of the answers, so that the answers of one launch are used as
        they are.
        """
        launches: dict[int, tuple[Tensor, dict[int, str]]] = {}
        for name in names:
            one = self._finite.pop(name, None)
            if one is None or one[0]() is not raw[name]:
                continue
            launches.setdefault(id(one[1]), (one[1], {}))[1][one[2]] = name
        ordered, parts = [], []
        for finite, places in launches.values():
            ordered += [places[place] for place in sorted(places)]
            whole = len(places) == len(finite)
            parts += [finite] if whole else [finite[place : place + 1] for place in sorted(places)]
        if len(ordered) != len(names):
            return names, None
        return ordered, parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return a parameter's ring ``(L, P)`` and its counter, as ``combine`` takes them."""
        self._allocate(name)
        return rows(local(self._queue[name])), self._queued[name]

    def push(
        self,
        raw: Mapping[str, Tensor],
        statistics: Mapping[str, Tensor],
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Queue raw gradients that were weighted elsewhere, one call per device and type.

        Args:
            raw: gradients by name, in the shape of their parameters.
            statistics: by name, the statistics that ``combine`` returned.
            grad_scale: the loss scale the gradients carry, or None.
            found_inf: non-zero where none of them is to be queued, one number, or None.
        """
        batches: dict[Any, list[str]] = {}
        for name, grad in raw.items():
            stored = self._stored_type(name)
            batches.setdefault((grad.device, grad.dtype, stored), []).append(name)
        for batch in batches.values():
            names, finite = self._known_finite(batch, raw)
            self.push_batch(
                names,
                [flat_gradient(raw[name], self.params[name]) for name in names],
                [statistics[name] for name in names],
                grad_scale=grad_scale,
                found_inf=found_inf,
                finite=finite,
            )

    def push_batch(
        self,
        names: Sequence[str],
        raw: Sequence[Tensor],
        statistics: Sequence[Tensor],
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        absent: Tensor | None = None,
        finite: Tensor | None = None,
    ) -> None:
        """Queue raw gradients of one type, on one device, that were weighted elsewhere.

        Args:
            names: the parameters' names, whose rings are of one type.
            raw: their gradients, flat, in the memory order of the parameter.
            statistics: the statistics of each gradient's weighting, ``(C, 5)`` to be added up.
            grad_scale: the loss scale the gradients carry, or None.
            found_inf: non-zero where none of them is to be queued, one number, or None.
            absent: ``(N,)`` bool, which gradients are zeros of a parameter that no rank used; None
                for none.
            finite: ``(N,)`` bool, which gradients are finite; None looks at them.
        """
        for name in names:
            self._allocate(name)
        ops = engine(raw[0].device, self.options.backend)
        note_plain_torch(raw[0].device, self.options.backend, raw)
        finite = ops.all_finite(raw) if finite is None else finite
        accept = accepted(finite, absent=absent, found_inf=found_inf)
        rings = [rows(local(self._queue[name])) for name in names]
        counters = [self._queued[name] for name in names]
        ops.push_(raw, rings, counters, accept, grad_scale=grad_scale)
        owners = [
            name for name, part in zip(names, statistics, strict=True) for _ in range(len(part))
        ]
        self._keep_statistics(tuple(names), list(statistics), owners)

    def _stored_type(self, name: str) -> torch.dtype:
        """Return the type of a parameter's ring."""
        return stored_type(self.options.queue_dtype, self.params[name].dtype)

    def _allocate(self, name: str) -> None:
        """Allocate a parameter's ring, or bring one to the parameter's device and order."""
        param, queue = self.params[name], self._queue.get(name)
        layout = local(param).device, param.stride()
        if self._layouts.get(name) == layout:
            return
        self._layouts[name] = layout
        fresh = new_queue(param, self.options.queue_length, self.options.queue_dtype)
        if queue is not None:
            fill_ring(fresh, queue)
            in_use(queue)
        self._queue[name] = fresh
        counter = self._queued.get(name, new_counter(param))
        self._queued[name] = counter.to(local(fresh).device)

    def record_loss(self, loss: Tensor | float) -> None:
        """Record this step's unscaled loss for the effective length, without waiting for it.

        Args:
            loss: one number, 0-d or one element.
        """
        if self.options.loss_window is None:
            return
        device = loss.device if isinstance(loss, Tensor) else torch.device("cpu")
        earlier = self._history(device)
        # Loaded losses may lie on another device.
        losses = earlier.to(loss.device) if isinstance(loss, Tensor) else earlier
        recorded = record_loss(losses, loss)
        if self._losses is losses:  # a replay finds the losses where they are now
            losses.copy_(recorded)
        else:
            refuse_capture("a history of losses", recorded.device)
            self._losses = recorded
        in_use(earlier, losses)

    def effective_length(
        self, device: torch.device | None = None, coming: Tensor | None = None
    ) -> Tensor | None:
        """Return how many of the newest gradients the statistics use, 0-d int64; None for L.

        Args:
            device: where the length is needed; None leaves it where the losses are.
            coming: a loss that is yet to be recorded, 0-d, or None.
        """
        losses = self._losses
        if coming is not None and self.options.loss_window is not None:
            losses = record_loss(self._history(coming.device).to(coming.device), coming)
        length = length_of(losses, self.options, device or torch.device("cpu"))
        if length is None or device is None:
            return length
        return length.to(device, non_blocking=True)

    def _history(self, device: torch.device) -> Tensor:
        """Return the losses recorded so far, or an empty history on ``device``."""
        window = self.options.loss_window
        assert window is not None
        if self._losses is None:
            return new_losses(window, self.options.queue_length, device)
        return self._losses

    def metrics(self, per_layer: bool = False) -> dict[str, Any]:
        """Return what the law did in the last step, in one transfer to the host.

        Args:
            per_layer: return the figures of each parameter by its name, in place of those of all.

        Returns:
            ``mean_weight``; ``norm_ratio``, ``|g*| / |g|`` over all parameters; ``saturated_high``
            and ``saturated_low``, shares of elements at rho and at 1/rho; ``effective_length``,
            which all parameters share and ``per_layer`` leaves out. Empty before the first step.
        """
        seen = self._last.names()
        if not seen:
            return {}
        # Statistics of a sharded parameter cover all its shards, and so does a DTensor's numel().
        elements = {name: p.numel() for name, p in self.params.items() if name in seen}
        if per_layer:
            return measures_by_name(self._over_ranks(self._last.table(list(elements))), elements)
        (total,) = self._over_ranks(self._last.total())
        length = self.effective_length(total.device)
        used = self.options.queue_length if length is None else length
        return measures(total, sum(elements.values()), used)

    def _over_ranks(self, table: Tensor) -> Tensor:
        """Return statistics ``(N, 5)`` summed over all ranks: here each has all elements."""
        return table

    def digest(self) -> str:
        """Return the SHA-256 of all rings, counters and losses: equal exactly where those are.

        The host waits for the device and reads everything: meant for checks, not for every step.
        """
        return hashlib.sha256(b"".join(self.digests().values())).hexdigest()

    def digests(self) -> dict[str, bytes]:
        """Return the SHA-256 of each parameter's ring and counter by name, and that of the losses.

        A ring that nothing was queued in counts as absent, allocated or not. The losses come last,
        under ``LOSSES``.
        """
        return digests(self.params, self._rings(), self._losses)

    def __repr__(self) -> str:
        """Return the numbers of parameters and elements, and the bytes of the rings here."""
        return memory(self.params.values(), self._queue.values())

    def init_state(self) -> None:
        """Allocate the ring of every trainable parameter and the losses before the first step.

        A checkpoint library that needs the state's shapes before the first step then finds them.
        """
        for name, param in self.params.items():
            if param.requires_grad:
                self._allocate(name)
        if self.options.loss_window is not None and self._losses is None:
            self._losses = self._history(next(iter(self.params.values())).device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values: ``torch.load(weights_only=True)`` reads it.

        Returns:
            ``queue``: rings ``(L, *param.shape)`` by name; ``queued``: how many gradients each has
            taken; ``losses``; ``options``.
        """
        rings = list(self._rings())
        return {
            "options": {name: getattr(self.options, name) for name in SHAPE_OPTIONS},
            "losses": self._losses,
            "queue": {name: queue for name, queue, _ in rings},
            "queued": {name: queued for name, _, queued in rings},
        }

    def _rings(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield every whole ring and its counter by name."""
        for name, queue in self._queue.items():
            yield name, queue, self._queued[name]

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors of the rings, counters and losses that this rank holds."""
        yield from self._queue.values()
        yield from self._queued.values()
        if self._losses is not None:
            yield self._losses

    def shared_digests(self) -> dict[str, bytes]:
        """Return the digests, by name, of the state that all ranks must share: here all of it."""
        return self.digests()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state; training continues bit for bit.

        Raises:
            ValueError: the state belongs to another model or to other options. Nothing is changed.
        """
        self.check_saved(state)
        for name, queue in state["queue"].items():
            self._queue[name] = queue.detach().clone()
            self._queued[name] = state["queued"][name].detach().clone()
        for name in [name for name in self._queue if name not in state["queue"]]:
            del self._queue[name], self._queued[name]
        losses = state["losses"]
        self._losses = None if losses is None else losses.detach().clone()
        self._layouts.clear()
        self._last.clear()

    def check_saved(self, state: Any, highest: int = COUNTER_LIMIT - 1) -> None:
        """Raise a ValueError that names what keeps a saved state from being loaded.

        Args:
            state: what ``state_dict`` returned; further keys are not looked at.
            highest: the largest number of gradients that a ring may have taken.
        """
        check(state, saved_rule(self.params, self.options, highest), "the saved queue")
