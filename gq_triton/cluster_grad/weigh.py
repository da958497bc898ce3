"""The law as a sink: cluster means are weighted and added up."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from gq_triton.cluster_grad.later import Later
from gq_triton.cluster_grad.layers.rows import add_rows_
from gq_triton.cluster_grad.sink import Taken
from gq_triton.cluster_grad.site import Block
from gq_triton.grouping.groups import Groups
from gq_triton.law import match_norm_
from gq_triton.queues import Queues
from gq_triton.ring import flat

__all__ = ["Weigh"]


def _no_scale() -> None:
    return None


class Weigh:
    """The sink that weights cluster means and adds them up: ``sum_k p_k w(c_k) c_k``.

    Args:
        queues: the rings. The sink reads them and queues nothing.
        match_norm: whether the sink gives each weighted gradient the norm of the raw one; None
            takes the option of the queues.
        grad_scale: returns the loss scale that the gradients carry, or None.
        leaves: by parameter name, the tensors that have the shape, memory order and type of the
            gradients; None stands for the parameters of the queues.
        together: whether gradients may wait for one another until the backward pass ends. All that
            sees them earlier, as buckets do, must be a hook of the parameter itself.

    Attributes:
        backend: the engine that forms the layers' sums.
        later: as in ``Sink``.
        statistics: by parameter name, the statistics of its last weighting, rows ``(N, 5)`` to be
            added up (see ``queues/measures.py``).
    """

    def __init__(
        self,
        queues: Queues,
        *,
        match_norm: bool | None = None,
        grad_scale: Callable[[], Tensor | None] = _no_scale,
        leaves: Mapping[str, Tensor] | None = None,
        together: bool = False,
    ) -> None:
        self.backend = queues.options.backend
        self.statistics: dict[str, Tensor] = {}
        self._queues, self._grad_scale = queues, grad_scale
        self._leaves = queues.params if leaves is None else leaves
        self._match_norm = queues.options.match_norm if match_norm is None else match_norm
        # The norms of match_norm are those of each parameter, known when it has been weighted.
        waits = together and not self._match_norm
        self.later = Later(queues, self.statistics, grad_scale) if waits else None

    def take(self, name: str, groups: Groups, blocks: Iterator[Block], dtype: torch.dtype) -> Taken:
        """Weight a parameter's cluster means, block by block."""
        param = self._leaves[name]
        weighted = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
        raw = torch.empty_like(weighted)
        out, mean = flat(weighted, like=param), flat(raw, like=param)
        tables = []
        for start, stop, sums in blocks:
            into = out[start:stop], mean[start:stop]
            tables.append(self._combine(groups, name, (start, stop), sums, into)[2])
        table = tables[0] if len(tables) == 1 else torch.cat(tables)
        return self._taken(name, weighted, raw, table)

    def take_rows(self, name: str, groups: Groups, rows: Tensor, sums: Tensor) -> Taken:
        """Weight the cluster means of a table's touched rows.

        A row that no sample touched has gradient 0 in every cluster, so 0 whatever its weight,
        which the statistics count as 1.
        """
        param = self._leaves[name]
        part = self._combine(groups, name, rows, sums)
        weighted, raw = (torch.zeros_like(param, dtype=sums.dtype) for _ in range(2))
        for table, values in zip((weighted, raw), part[:2], strict=True):
            table.index_copy_(0, rows, values.view(len(rows), -1))
        untouched = part[2].new_zeros(1, part[2].shape[1])
        untouched[0, 2] = param.numel() - part[0].numel()
        return self._taken(name, weighted, raw, torch.cat([part[2], untouched]))

    def take_lookups(self, name: str, groups: Groups, where: Tensor, grads: Tensor) -> Taken:
        """Weight the cluster means of the rows of a table that were looked up."""
        samples = len(groups.labels)
        labels = groups.labels[:, None].expand(samples, len(where) // samples).reshape(-1)
        if not self._queues.whole:
            return self._take_table(name, groups, where, labels, grads)
        values = self._queues.combine_rows(
            name, grads, where, labels, inverse_shares=groups.inverse_shares,
            mixture=groups.mixture, sigma_scales=groups.sigma_scales,
            grad_scale=self._grad_scale(),
        )  # fmt: skip
        return self._taken(name, *values)

    def _take_table(
        self, name: str, groups: Groups, where: Tensor, labels: Tensor, grads: Tensor
    ) -> Taken:
        """Weight the cluster means of all rows of a table of whose ring a part is here."""
        height, width = self._leaves[name].shape
        dtype = torch.promote_types(grads.dtype, torch.float32)
        # One row more than the table has, for lookups that do not count.
        sums = grads.new_zeros(groups.n_clusters * (height + 1), width, dtype=dtype)
        add_rows_(sums, labels * (height + 1) + where, grads.to(dtype))
        sums = sums.view(groups.n_clusters, height + 1, width)[:, :height].flatten(1)
        return self.take(name, groups, iter([(0, height * width, sums)]), dtype)

    def take_whole(self, name: str, groups: Groups, grad: Tensor) -> Taken:
        """Weight a gradient as the mean of one cluster, the whole batch."""
        sums = flat(grad, like=self._leaves[name])[None]
        return self.take(name, groups.whole, iter([(0, grad.numel(), sums)]), grad.dtype)

    def _combine(
        self, groups: Groups, name: str, part: tuple[int, int] | Tensor, sums: Tensor,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return self._queues.combine(
            name, part, sums, inverse_shares=groups.inverse_shares, mixture=groups.mixture,
            sigma_scales=groups.sigma_scales, grad_scale=self._grad_scale(), into=into,
        )  # fmt: skip

    def _taken(self, name: str, weighted: Tensor, raw: Tensor, statistics: Tensor) -> Taken:
        if self._match_norm:
            statistics = statistics.sum(dim=0, keepdim=True)
            match_norm_([weighted], statistics)
        self.statistics[name] = statistics
        return Taken(weighted.to(self._leaves[name].dtype), raw)
