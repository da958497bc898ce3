"""The groups: the samples of one batch by cluster, and the numbers that mix their gradients."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gq_triton.engines import engine
from gq_triton.options import ClusterOptions

__all__ = ["Groups"]


@dataclass(frozen=True)
class Groups:
    """The samples of one batch by cluster: B samples, K clusters.

    On a GPU the groups are made without a wait. The first use of ``sizes`` waits, and so does what
    needs them: ``sorted`` and ``each``.

    Attributes:
        labels: the cluster of every sample, ``(B,)`` int64.
        order: the samples sorted by cluster, ``(B,)`` int64.
        offsets: ``(K + 1,)`` int64: cluster k has the samples ``order[offsets[k]:offsets[k + 1]]``.
        n_clusters: K.
        unit: a gradient of the loss divided by this number is a mean over samples.
        inverse_shares: ``(K,)`` float64; 0 for an empty cluster. A sum over a cluster times its
            inverse share is the cluster's mean gradient, in the unit that the queue holds.
        mixture: ``(K,)`` float64, the factor of each mean in the result, in the unit of the loss.
        sigma_scales: ``(K,)`` float64, the factors of sigma.
        mass: ``(2,)`` float64, from which a process's share among several follows: the sum of
            ``n_k**a`` with ``a = population_power``, and the sum of the samples' weights.
        one_cluster: ``(4, 1)`` float64: inverse share, mixture, scale of sigma and ``n**a`` of all
            samples as one cluster.
        problem: a 0-d tensor that is True if something was wrong with the batch, and the sentence
            that says so; None if nothing can be. ``sizes`` raises the sentence.
    """

    labels: Tensor
    order: Tensor
    offsets: Tensor
    n_clusters: int
    unit: float
    inverse_shares: Tensor
    mixture: Tensor
    sigma_scales: Tensor
    mass: Tensor
    one_cluster: Tensor
    problem: tuple[Tensor, str] | None = None

    @staticmethod
    def of(
        labels: Tensor,
        clusters: int,
        options: ClusterOptions,
        sample_weights: Tensor | None = None,
        whole_batch: int | Tensor | None = None,
        backend: str = "auto",
        problem: tuple[Tensor, str] | None = None,
    ) -> "Groups":
        """Return the groups of samples with the given labels; nothing waits for the device.

        Args:
            labels: the cluster of every sample, ``(B,)`` integers in ``[0, clusters)``.
            clusters: K.
            options: how the clusters are mixed.
            sample_weights: how much each sample counts, ``(B,)``; None for equal weights.
            whole_batch: the number of samples of the whole batch, if these are one process's part.
            backend: the engine that orders the samples.
            problem: what ``sizes`` raises, as the attribute.

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
        # The queue holds means over samples; a summed loss has B times larger gradients.
        unit = float(batch) if options.loss_reduction == "sum" else 1.0
        order, offsets, table = engine(labels.device, backend).group(
            labels,
            clusters,
            sample_weights=sample_weights,
            whole_batch=batch if whole_batch is None else whole_batch,
            steps=options.accumulation_steps,
            power=options.population_power,
            unit=unit,
            standard_error=options.centroid_scale == "standard_error",
        )
        inverse, mixture, scales = table[:3, :clusters].unbind()
        return Groups(
            labels=labels,
            order=order,
            offsets=offsets,
            n_clusters=clusters,
            unit=unit,
            inverse_shares=inverse,
            mixture=mixture,
            sigma_scales=scales,
            mass=table[3, :2],
            one_cluster=table[4:, :1],
            problem=problem,
        )

    @cached_property
    def sizes(self) -> list[int]:
        """The number of samples in each cluster, K integers on the host, which waits for them.

        Raises:
            ValueError: something was wrong with the batch.
        """
        facts = self.offsets
        if self.problem is not None:
            facts = torch.cat([facts, self.problem[0].view(1).to(facts.dtype)])
        known = facts.tolist()
        if self.problem is not None and known.pop():
            self.problem[0].zero_()  # raised once
            raise ValueError(self.problem[1])
        return [end - begin for begin, end in itertools.pairwise(known)]

    def renew(self) -> None:
        """Forget the sizes that were read: a replay has written other groups to this memory."""
        vars(self).pop("sizes", None)

    @cached_property
    def _in_order(self) -> bool:
        """Whether samples on the CPU already lie in the order of their clusters."""
        if self.labels.device.type != "cpu":
            return False
        return bool((self.labels[1:] >= self.labels[:-1]).all())

    @cached_property
    def members(self) -> Tensor:
        """``(K, B)`` bool: whether a sample belongs to a cluster."""
        return self.labels == torch.arange(self.n_clusters, device=self.labels.device)[:, None]

    @cached_property
    def whole(self) -> "Groups":
        """The same samples as one cluster."""
        labels = torch.zeros_like(self.labels)
        inverse, mixture, scales, power = self.one_cluster.unbind()
        return dataclasses.replace(
            self,
            labels=labels,
            order=torch.arange(len(labels), device=labels.device),
            offsets=_ends(len(labels), labels.device),
            n_clusters=1,
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
            self, labels=first, order=first, offsets=_ends(1, first.device), n_clusters=1
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
            offsets=self.offsets * each,
        )

    def rows(self, per_sample: int) -> tuple[Tensor, Tensor]:
        """Return order and offsets of rows, of which each sample has ``per_sample`` in a row."""
        if per_sample == 1:
            return self.order, self.offsets
        within = torch.arange(per_sample, device=self.order.device)
        order = (self.order[:, None] * per_sample + within).flatten()
        return order, self.offsets * per_sample

    def sorted(self, rows: Tensor) -> list[Tensor]:
        """Split ``(B, ...)`` into the rows of each cluster: K views, of a sorted copy if needed."""
        if self.n_clusters == 1:
            return [rows]
        if self._in_order:
            return list(rows.split(self.sizes))
        return list(rows.index_select(0, self.order).split(self.sizes))

    def each(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield the rows of each cluster; one copy exists at a time if none is kept."""
        if self.n_clusters == 1 or self._in_order:
            yield from self.sorted(rows)
            return
        for samples in self.order.split(self.sizes):
            yield rows.index_select(0, samples)

    def sums(self, per_sample: Tensor) -> Tensor:
        """Return the sums ``(K, N)`` of rows ``(B, N)`` by cluster, in a fixed order."""
        return self.members.to(per_sample.dtype) @ per_sample


def _ends(samples: int, device: torch.device) -> Tensor:
    """Return the offsets of one cluster: 0 and its number of samples, at least 1."""
    return torch.arange(0, 2 * samples, samples, device=device)
