"""The samples of one batch by cluster, and how their gradients are mixed."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Groups", "Mixing"]


@dataclass(frozen=True)
class Mixing:
    """How the clusters of a batch are weighted: options of the plug-in.

    Attributes:
        population_power: ``a`` in ``n_k**a / sum_j n_j**a``; 1 is the paper's, 0 weights equally.
        centroid_scale: ``"paper"`` compares a centroid with sigma, ``"standard_error"`` with
            ``sigma * sqrt(B / n_k)``.
        loss_reduction: whether the loss is the ``"mean"`` or the ``"sum"`` over samples.
        accumulation_steps: backward passes whose gradients add up to one step.
    """

    population_power: float = 1.0
    centroid_scale: str = "paper"
    loss_reduction: str = "mean"
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.population_power < math.inf:
            raise ValueError(f"population_power must be >= 0, got {self.population_power}")
        if self.centroid_scale not in ("paper", "standard_error"):
            raise ValueError(
                f'centroid_scale must be "paper" or "standard_error", got {self.centroid_scale!r}'
            )
        if self.loss_reduction not in ("mean", "sum"):
            raise ValueError(f'loss_reduction must be "mean" or "sum", got {self.loss_reduction!r}')
        if int(self.accumulation_steps) != self.accumulation_steps or self.accumulation_steps < 1:
            raise ValueError(
                f"accumulation_steps must be an integer >= 1, got {self.accumulation_steps}"
            )


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

    @staticmethod
    def of(
        labels: Tensor,
        clusters: int,
        mixing: Mixing,
        sample_weights: Tensor | None = None,
        whole_batch: int | Tensor | None = None,
    ) -> "Groups":
        """Group samples by their labels ``(B,)`` in ``[0, clusters)``.

        Args:
            labels: cluster of every sample.
            clusters: K.
            mixing: how the clusters are weighted.
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
        share = population / (population.sum() * mixing.accumulation_steps)
        power = torch.where(sizes > 0, population**mixing.population_power, 0.0)
        # The queue holds means over samples; a summed loss has B times larger gradients.
        unit = float(batch) if mixing.loss_reduction == "sum" else 1.0
        inverse = torch.where((sizes > 0) & (share > 0), 1.0 / (share * unit), 0.0)
        mixture = power / power.sum() / mixing.accumulation_steps * unit
        scales = torch.ones_like(share)
        if mixing.centroid_scale == "standard_error":
            scales = (whole * mixing.accumulation_steps / sizes.clamp(min=1)).sqrt()
        # Rows of an even length start at multiples of 16 bytes: kernels are compiled for that once.
        table = torch.zeros(4, max(2, clusters + clusters % 2), dtype=wide, device="cpu")
        for row, vector in zip(table, (inverse, mixture, scales), strict=False):
            row[:clusters] = vector
        table[3, 0], table[3, 1] = power.sum(), population.sum()
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
