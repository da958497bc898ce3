"""The groups: the samples of one batch by cluster, and the numbers that mix their gradients."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gq_triton.options import ClusterOptions

__all__ = ["Groups"]


@dataclass(frozen=True)
class Groups:
    """The samples of one batch by cluster: B samples, K clusters, S samples in the largest.

    Attributes:
        labels: the cluster of every sample, ``(B,)`` int64.
        order: the samples sorted by cluster, ``(B,)`` int64.
        sizes: the number of samples in each cluster, K integers on the host.
        members: ``(K, B)`` bool: whether a sample belongs to a cluster.
        unit: a gradient of the loss divided by this number is a mean over samples.
        inverse_shares: ``(K,)`` float64; 0 for an empty cluster. A sum over a cluster times its
            inverse share is the cluster's mean gradient, in the unit that the queue holds.
        mixture: ``(K,)`` float64, the factor of each mean in the result, in the unit of the loss.
        sigma_scales: ``(K,)`` float64, the factors of sigma.
        mass: ``(2,)`` float64, from which a process's share among several follows: the sum of
            ``n_k**a`` with ``a = population_power``, and the sum of the samples' weights.
        one_cluster: ``(4, 1)`` float64: inverse share, mixture, scale of sigma and ``n**a`` of all
            samples as one cluster.
    """

    labels: Tensor
    order: Tensor
    sizes: list[int]
    members: Tensor
    unit: float
    inverse_shares: Tensor
    mixture: Tensor
    sigma_scales: Tensor
    mass: Tensor
    one_cluster: Tensor

    @staticmethod
    def of(
        labels: Tensor,
        clusters: int,
        options: ClusterOptions,
        sample_weights: Tensor | None = None,
        whole_batch: int | Tensor | None = None,
    ) -> "Groups":
        """Return the groups of samples with the given labels.

        Args:
            labels: the cluster of every sample, ``(B,)`` integers in ``[0, clusters)``.
            clusters: K.
            options: how the clusters are mixed.
            sample_weights: how much each sample counts, ``(B,)``; None for equal weights.
            whole_batch: the number of samples of the whole batch, if these are one process's part.

        Raises:
            ValueError: there is not one weight per sample.
        """
        labels = labels.to(torch.int64)
        batch = labels.numel()
        if sample_weights is not None and sample_weights.shape != labels.shape:
            raise ValueError(
                f"set_sample_weights must give one weight to each of the {batch} samples, got "
                f"{tuple(sample_weights.shape)}"
            )
        device, wide = labels.device, torch.float64
        members = labels == torch.arange(clusters, device=device)[:, None]
        # The host reads all that it needs in one transfer and sends back all that follows in
        # another: a few numbers per cluster are not worth a launch each.
        facts = [members.sum(dim=1).to(wide)]
        if sample_weights is not None:
            facts.append(members.to(wide) @ sample_weights.to(facts[0]))
        if isinstance(whole_batch, Tensor):
            facts.append(whole_batch.to(facts[0]).reshape(1))
        known = (torch.cat(facts) if len(facts) > 1 else facts[0]).cpu()
        sizes = known[:clusters]
        population = sizes if sample_weights is None else known[clusters : 2 * clusters]
        whole = float(known[-1]) if isinstance(whole_batch, Tensor) else whole_batch or batch
        share = population / (population.sum() * options.accumulation_steps)
        power = torch.where(sizes > 0, population**options.population_power, 0.0)
        # The queue holds means over samples; a summed loss has B times larger gradients.
        unit = float(batch) if options.loss_reduction == "sum" else 1.0
        inverse = torch.where((sizes > 0) & (share > 0), 1.0 / (share * unit), 0.0)
        mixture = power / power.sum() / options.accumulation_steps * unit
        scales = torch.ones_like(share)
        if options.centroid_scale == "standard_error":
            scales = (whole * options.accumulation_steps / sizes.clamp(min=1)).sqrt()
        # The same numbers for all samples as one cluster.
        steps = options.accumulation_steps
        spread = (whole * steps / batch) ** 0.5 if options.centroid_scale != "paper" else 1.0
        power_of_all = float(population.sum()) ** options.population_power
        one = torch.tensor(
            [steps / unit, unit / steps, spread, power_of_all], dtype=wide, device="cpu"
        )
        # Rows of even length start at multiples of 16 bytes, so kernels are compiled only once.
        table = torch.zeros(8, max(2, clusters + clusters % 2), dtype=wide, device="cpu")
        for row, vector in zip(table, (inverse, mixture, scales), strict=False):
            row[:clusters] = vector
        table[3, 0], table[3, 1] = power.sum(), population.sum()
        table[4:, 0] = one
        table = table.to(device, non_blocking=True)
        inverse, mixture, scales = table[:3, :clusters].unbind()
        return Groups(
            labels=labels,
            order=torch.argsort(labels, stable=True),
            sizes=[int(size) for size in sizes.tolist()],
            members=members,
            unit=unit,
            inverse_shares=inverse,
            mixture=mixture,
            sigma_scales=scales,
            mass=table[3, :2],
            one_cluster=table[4:, :1],
        )

    @cached_property
    def whole(self) -> "Groups":
        """The same samples as one cluster."""
        labels = torch.zeros_like(self.labels)
        inverse, mixture, scales, power = self.one_cluster.unbind()
        return dataclasses.replace(
            self,
            labels=labels,
            order=torch.arange(len(labels), device=labels.device),
            sizes=[len(labels)],
            members=(labels == 0)[None],
            mass=torch.cat([power, self.mass[1:]]),
            inverse_shares=inverse,
            mixture=mixture,
            sigma_scales=scales,
        )

    @cached_property
    def unknown(self) -> "Groups":
        """One sample in one cluster: all rows of a tensor whose rows belong to unknown samples."""
        first = torch.zeros_like(self.labels[:1])
        return dataclasses.replace(
            self, labels=first, order=first, sizes=[1], members=(first == 0)[None]
        )

    def per_row(self, rows: int) -> "Groups":
        """Return the groups of rows, of which each sample has the same number in a row.

        Args:
            rows: the number of rows, a multiple of B.
        """
        each = rows // self.labels.numel()
        if each == 1:
            return self
        return dataclasses.replace(
            self,
            labels=self.labels.repeat_interleave(each),
            order=self.rows(each)[0],
            sizes=[size * each for size in self.sizes],
            members=self.members.repeat_interleave(each, dim=1),
        )

    @cached_property
    def offsets(self) -> Tensor:
        """``(K + 1,)`` int64: cluster k has the samples ``order[offsets[k]:offsets[k + 1]]``."""
        ends = list(itertools.accumulate(self.sizes, initial=0))
        return torch.tensor(ends, device="cpu").to(self.labels.device, non_blocking=True)

    @cached_property
    def padding(self) -> tuple[Tensor, Tensor]:
        """The samples by cluster, with every cluster padded to S samples.

        Two tensors ``(K * S,)``: a sample for each place, and True at the surplus places, which
        repeat the first sample of ``order``.
        """
        room, begin, places = max(self.sizes), 0, []
        for size in self.sizes:
            places += [*range(begin, begin + size), *[-1] * (room - size)]
            begin += size
        where = torch.tensor(places, device="cpu").to(self.order.device, non_blocking=True)
        return self.order.index_select(0, where.clamp(min=0)), where < 0

    def padded(self, rows: Tensor) -> Tensor:
        """Return rows ``(B, ...)`` by cluster, ``(K, S, ...)``; surplus places repeat a sample.

        The rows are gathered, not scattered: gathering is fast with deterministic algorithms too.
        """
        return rows.index_select(0, self.padding[0]).unflatten(0, (len(self.sizes), -1))

    def blank_(self, padded: Tensor) -> Tensor:
        """Write zeros to the surplus places of ``padded`` and return it."""
        absent = self.padding[1].view(*padded.shape[:2], *[1] * (padded.dim() - 2))
        return padded.masked_fill_(absent, 0)

    def rows(self, per_sample: int) -> tuple[Tensor, Tensor]:
        """Return order and offsets of rows, of which each sample has ``per_sample`` in a row."""
        if per_sample == 1:
            return self.order, self.offsets
        within = torch.arange(per_sample, device=self.order.device)
        order = (self.order[:, None] * per_sample + within).flatten()
        return order, self.offsets * per_sample

    def sorted(self, rows: Tensor) -> list[Tensor]:
        """Split ``(B, ...)`` into the rows of each cluster: K views of one sorted copy."""
        if len(self.sizes) == 1:
            return [rows]
        return list(rows.index_select(0, self.order).split(self.sizes))

    def each(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield a copy of the rows of each cluster; one copy exists at a time if none is kept."""
        if len(self.sizes) == 1:
            yield rows
            return
        for samples in self.order.split(self.sizes):
            yield rows.index_select(0, samples)

    def sums(self, per_sample: Tensor) -> Tensor:
        """Return the sums ``(K, N)`` of rows ``(B, N)`` by cluster, in a fixed order."""
        return self.members.to(per_sample.dtype) @ per_sample
