"""The samples of one batch by cluster, and how their gradients are mixed."""

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
    """The samples of one batch by cluster. K = clusters, B = samples.

    Attributes:
        labels: cluster of every sample, ``(B,)`` int64.
        order: samples sorted by cluster, ``(B,)`` int64.
        sizes: samples in each cluster, K integers on the host.
        members: ``(K, B)`` bool: who belongs to which cluster.
        unit: what a gradient of the loss is divided by to be the mean over samples.
        inverse_shares: ``(K,)``: a sum over a cluster times this is the cluster's mean gradient,
            in the unit the queue holds; 0 for an empty cluster.
        mixture: ``(K,)``: the weight of each mean in the result, in the unit of the loss.
        sigma_scales: ``(K,)``: what sigma is multiplied by.
        mass: ``(2,)``: the sum of ``n_k**a``, and what the samples count in all: the batch's share
            among other processes' batches.
        one_cluster: ``(3, 1)``: inverse share, mixture and scale of all samples as one cluster.
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
        """Group samples by their labels ``(B,)`` in ``[0, clusters)``.

        Args:
            labels: cluster of every sample.
            clusters: K.
            options: how the clusters are weighted.
            sample_weights: what each sample counts ``(B,)``, or None.
            whole_batch: samples of the whole batch where these are one process's part.
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
        # All that the host needs to know comes in one transfer, and all that follows from it goes
        # back in one: numbers per cluster are not worth a launch each.
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
        one = torch.tensor([steps / unit, unit / steps, spread], dtype=wide, device="cpu")
        # Rows of an even length start at multiples of 16 bytes: kernels are compiled for that once.
        table = torch.zeros(7, max(2, clusters + clusters % 2), dtype=wide, device="cpu")
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
        inverse, mixture, scales = self.one_cluster.unbind()
        return dataclasses.replace(
            self,
            labels=labels,
            order=torch.arange(len(labels), device=labels.device),
            sizes=[len(labels)],
            members=(labels == 0)[None],
            inverse_shares=inverse,
            mixture=mixture,
            sigma_scales=scales,
        )

    @cached_property
    def offsets(self) -> Tensor:
        """``(K + 1,)`` int64: cluster k has the samples ``order[offsets[k]:offsets[k + 1]]``."""
        ends = list(itertools.accumulate(self.sizes, initial=0))
        return torch.tensor(ends, device="cpu").to(self.labels.device, non_blocking=True)

    @cached_property
    def padding(self) -> tuple[Tensor, Tensor]:
        """Give every cluster the room of the largest: K rooms, one after the other.

        Returns:
            ``(K * room,)`` samples, the first one where a room is not full; whether that is so.
        """
        room, begin, places = max(self.sizes), 0, []
        for size in self.sizes:
            places += [*range(begin, begin + size), *[-1] * (room - size)]
            begin += size
        where = torch.tensor(places, device="cpu").to(self.order.device, non_blocking=True)
        return self.order.index_select(0, where.clamp(min=0)), where < 0

    def padded(self, rows: Tensor) -> Tensor:
        """Return ``(K, largest size, ...)`` from ``(B, ...)``; what is too much repeats a sample.

        Gathered, not scattered: that is fast where torch computes deterministically too.
        """
        return rows.index_select(0, self.padding[0]).unflatten(0, (len(self.sizes), -1))

    def blank_(self, padded: Tensor) -> Tensor:
        """Put zeros where ``padded`` has too much."""
        absent = self.padding[1].view(*padded.shape[:2], *[1] * (padded.dim() - 2))
        return padded.masked_fill_(absent, 0)

    def rows(self, per_sample: int) -> tuple[Tensor, Tensor]:
        """Return order and offsets of rows of which each sample has some, side by side."""
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
        """Yield the rows of each cluster, a copy that is gone before the next one is made."""
        if len(self.sizes) == 1:
            yield rows
            return
        for samples in self.order.split(self.sizes):
            yield rows.index_select(0, samples)

    def sums(self, per_sample: Tensor) -> Tensor:
        """Sum ``(B, N)`` rows by cluster, ``(K, N)``, in a fixed order."""
        return self.members.to(per_sample.dtype) @ per_sample
