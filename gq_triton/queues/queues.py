"""The queues of a whole model and the law on them: what the plug-in and the DDP hook share."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gq_triton.engines import engine, note_plain_torch
from gq_triton.law import Law, accepted, match_norm_
from gq_triton.options import LawOptions
from gq_triton.queues.measures import LastStep, measures, measures_by_name
from gq_triton.queues.rings import Rings
from gq_triton.ring import flat_gradient, least_over, shard_groups

__all__ = ["Queues"]


class Queues(Rings):
    """The last L raw gradients of every parameter of a model, and the law that reads them.

    Args:
        params: parameters by name.
        options: options of the law.
    """

    def __init__(self, params: Mapping[str, Tensor], options: LawOptions) -> None:
        super().__init__(params, options)
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
        queues, queued = self._flat_rings(names)
        law = self._law(device, grad_scale)
        return engine(device, self.options.backend).weigh_(grads, queues, queued, accept, law)

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
        (queue,), (queued,) = self._flat_rings([name])
        weighted, raw, table, finite = engine(grads.device, self.options.backend).combine_rows(
            grads,
            where,
            labels,
            queue,
            queued,
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
            sums: for each, the gradients summed by cluster, of one type, as the engine's
                ``combine_all`` takes them.
            weighted: where to write the weighted gradients, in the shape and memory order of
                their parameters, of one type.
            raw: where to write the raw gradients, flat. ``push`` of these very tensors does not
                look at them again to see whether they are finite.
            inverse_shares: as in ``combine``.
            mixture: as in ``combine``.
            sigma_scales: as in ``combine``.
            grad_scale: as in ``combine``.

        Returns:
            For each parameter ``(C, 5)`` statistics to add up.
        """
        device = sums[0].device
        queues, queued = self._flat_rings(names)
        tables, finite = engine(device, self.options.backend).combine_all(
            sums,
            queues,
            queued,
            weighted,
            raw,
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
        (queue,), (queued,) = self._flat_rings([name])
        return queue, queued

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
            raw: gradients by name, in the shape of their parameters, or flat in their memory order.
            statistics: by name, the statistics that ``combine`` returned.
            grad_scale: the loss scale the gradients carry, or None.
            found_inf: non-zero where none of them is to be queued, one number, or None.
        """
        for batch in self._batches(raw):
            names, finite = self._known_finite(batch, raw)
            self.push_batch(
                names,
                [flat_gradient(raw[name], self.params[name]) for name in names],
                [statistics[name] for name in names],
                grad_scale=grad_scale,
                found_inf=found_inf,
                finite=finite,
            )

    def _batches(self, grads: Mapping[str, Tensor]) -> Iterable[list[str]]:
        """Return names in lists of one call each: of one device, type of gradient and of ring."""
        batches: dict[Any, list[str]] = {}
        for name, grad in grads.items():
            key = grad.device, grad.dtype, self._stored_type(name)
            batches.setdefault(key, []).append(name)
        return batches.values()

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
        ops = engine(raw[0].device, self.options.backend)
        note_plain_torch(raw[0].device, self.options.backend, raw)
        finite = ops.all_finite(raw) if finite is None else finite
        accept = accepted(finite, absent=absent, found_inf=found_inf)
        queues, queued = self._flat_rings(names)
        ops.push_(raw, queues, queued, accept, grad_scale=grad_scale)
        owners = [
            name for name, part in zip(names, statistics, strict=True) for _ in range(len(part))
        ]
        self._keep_statistics(tuple(names), list(statistics), owners)

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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state; training continues bit for bit.

        Raises:
            ValueError: the state belongs to another model or to other options. Nothing is changed.
        """
        super().load_state_dict(state)
        self._last.clear()
