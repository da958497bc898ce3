"""The passes over a dataset that cluster its samples: assign all, or make centres for labels.

Shapes: N samples, B of them in a batch, K clusters.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gq_triton.sampling.centres import Centre, Sums, of_samples, products
from gq_triton.sampling.factors import Factors, factors, layers_of
from gq_triton.sampling.fetch import moved, split_batch
from gq_triton.sampling.partition import Assigner
from gq_triton.sampling.ranks import stream
from gq_triton.sampling.scores import Loss
from gq_triton.sampling.source import Batches, Source
from gq_triton.sampling.watch import device_of, run_model, scorer

__all__ = ["Assigned", "Passes", "check_finite", "check_samples", "nobody"]


class Batch(NamedTuple):
    """The factors of a batch's gradients by layer, and the places of its samples."""

    places: Tensor
    factors: dict[str, Factors]


class Assigned(NamedTuple):
    """What a pass that assigned all samples found.

    Attributes:
        labels: ``(N,)`` int64.
        distortions: the sum of squared distances from the new labels' centres, ``(K,)`` float64.
        objective: of the old labels with the centres that were made for them; None without labels.
        squares: the sum of the gradients' squared norms.
    """

    labels: Tensor
    distortions: Tensor
    objective: float | None
    squares: float


class Passes:
    """The passes of one model, and the centres that they leave.

    Args:
        model: the model, also within DDP.
        layers: parts of the names of the layers that count; None takes all.
        n_clusters: K.
        assignment: the rule of assignments.
        rank: the terms of a centre.
        loss: the loss whose gradients are clustered.
        split: ``batch -> (inputs, targets)``.
        seed: seed of the orders.

    Attributes:
        centres: the centres by layer; empty before the first pass.
        seen: called with the number of samples of every batch that was read.

    Raises:
        ValueError: no layer can be used.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Any,
        n_clusters: int,
        assignment: str,
        rank: int,
        loss: Loss,
        split: Callable[[Any], tuple[Any, Any]] | None,
        seed: int,
    ) -> None:
        self.model = scorer(model)
        self.layers = layers_of(self.model, layers)
        self.n_clusters, self.assignment, self.rank, self.loss = n_clusters, assignment, rank, loss
        self._split, self._seed = split or split_batch, seed
        self.centres: dict[str, Centre] = {}
        # The centres whose squared norms are known, and these.
        self._measured, self._norms = self.centres, dict[str, Tensor]()
        self.seen: Callable[[int], None] = nobody

    def factors(self, batch: Any) -> dict[str, Factors]:
        """Return the factors of a batch's gradients by layer."""
        inputs, targets = self._split(moved(batch, device_of(self.model)))
        return factors(self.model, self.layers, run_model, inputs, targets, self.loss)

    def batches(self, read: Iterator[tuple[Tensor | None, Any]]) -> Iterator[Batch]:
        """Yield the factors of every batch that a source reads."""
        begin = 0
        for places, batch in read:
            found = self.factors(batch)
            size = len(next(iter(found.values())).inputs)
            if places is None:
                places = torch.arange(begin, begin + size)
            elif len(places) != size:
                raise ValueError(
                    f"the loader must keep every sample of a batch, got {size} of {len(places)}: "
                    "look at its collate_fn"
                )
            begin += size
            self.seen(size)
            yield Batch(places, found)

    def begin(self, source: Source | Batches, order: Tensor | None) -> None:
        """Make the first samples of an order the centres."""
        found, seen = [], 0
        for batch in self.batches(source.first(order, self.n_clusters)):
            found.append(batch.factors)
            seen += len(batch.places)
            if seen >= self.n_clusters:
                break
        check_samples(self.n_clusters, seen)
        first = self.first(found).items()
        self.centres = {name: Centre(*map(source.of_first_rank, one)) for name, one in first}

    def assign(self, source: Source | Batches, iteration: int, old: Tensor | None) -> Assigned:
        """Assign every sample to a centre, and measure the old labels by the centres."""
        samples = source.samples
        order = None if samples is None else _shuffled(samples, self._seed, iteration)
        if not self.centres:
            self.begin(source, order)
        sizes = torch.full((self.n_clusters,), 1.0, dtype=torch.float64)
        if old is not None:
            sizes = torch.bincount(old, minlength=self.n_clusters).double()
        # All that a batch adds to stays on the model's device, so that nothing waits for it.
        device = device_of(self.model)
        assigner = Assigner(self.assignment, sizes.to(device))
        # Rows: distortions of the new labels and of the old ones, and the squared norms.
        sums = torch.zeros(3, self.n_clusters, dtype=torch.float64, device=device)
        places, labels = [], []
        for batch in self.batches(source.batches(order)):
            distances, squares = self.distances(batch.factors)
            own = assigner(distances)
            places.append(batch.places)
            labels.append(own)
            before = own if old is None else _labels_at(old, batch.places).to(device)
            sums += self._sums(distances, squares, own, before)
        if samples is None and old is not None:
            _check_as_many(sum(map(len, labels)), old)
        found = torch.zeros(samples or sum(map(len, labels)), dtype=torch.int64)
        if labels:  # a rank may have no sample
            found[torch.cat(places)] = torch.cat(labels).cpu()
        distortions, within, norms = source.total(sums).cpu()
        check_finite(norms)
        objective = None if old is None else float((sizes * within).sum())
        return Assigned(source.total(found), distortions, objective, float(norms.sum()))

    def _sums(self, distances: Tensor, squares: Tensor, own: Tensor, before: Tensor) -> Tensor:
        """Return a batch's distances by its new and its old labels, and its norms by the new.

        Products with members, in place of additions at labels, repeat bit for bit on a GPU.
        """
        clusters = torch.arange(self.n_clusters, device=own.device)
        new, old = ((labels[:, None] == clusters).double() for labels in (own, before))
        zero = distances.new_zeros(())
        rows = [(torch.where(of > 0, distances, zero)).sum(0) for of in (new, old)]
        return torch.stack([*rows, squares @ new])

    def first(self, found: list[dict[str, Factors]]) -> dict[str, Centre]:
        """Return the first K samples as centres."""
        centres = {}
        for name in found[0]:
            first = [Factors(*(f[: self.n_clusters] for f in batch[name])) for batch in found]
            made = [of_samples(one, self.rank) for one in first]
            pairs = zip(*made, strict=True)
            centres[name] = Centre(*(torch.cat(pair)[: self.n_clusters] for pair in pairs))
        return centres

    def distances(self, found: dict[str, Factors]) -> tuple[Tensor, Tensor]:
        """Return squared distances ``(B, K)`` and squared norms ``(B,)``, in float64.

        Raises:
            ValueError: on the CPU, a gradient is not finite. On a GPU the host would wait to see
                that: its norm is not finite then.
        """
        layers, batch = len(found), len(next(iter(found.values())).inputs)
        room = {"dtype": torch.float64, "device": next(iter(found.values())).inputs.device}
        dots = torch.empty(layers, batch, self.n_clusters, **room)
        norms = torch.empty(layers, batch, **room)
        for (name, one), *into in zip(found.items(), dots, norms, strict=True):
            products(one, self.centres[name], *into)
        if norms.device.type == "cpu":
            check_finite(norms)
        # Rounding may lead below 0. It is not rounded further, however small gradients are.
        apart = norms[:, :, None] + self._squares(list(found))[:, None]
        return apart.sub_(dots, alpha=2).clamp_(min=0).sum(0), norms.sum(0)

    def _squares(self, names: list[str]) -> Tensor:
        """Return the squared norms of the present centres of some layers, ``(L, K)`` float64."""
        if self._measured is not self.centres:
            self._measured = self.centres
            self._norms = {name: one.squares.double() for name, one in self.centres.items()}
        return torch.stack([self._norms[name] for name in names])

    def update(self, source: Source | Batches, labels: Tensor, mean: bool = False) -> float | None:
        """Make new centres for the labels; return the squared norm of the mean gradient."""
        sums: dict[str, Sums] = {}
        seen = 0
        for batch in self.batches(source.batches(None)):
            seen += len(batch.places)
            own = _labels_at(labels, batch.places).to(device_of(self.model))
            for name, one in batch.factors.items():
                if name not in sums:
                    sums[name] = Sums(self.rank, self.n_clusters, mean)
                sums[name].add(one, own)
        if source.samples is None:
            _check_as_many(seen, labels)
        for one in sums.values():
            one.share(source.total)
        self.centres = {name: one.centre() for name, one in sums.items()}
        totals = [one.total for one in sums.values() if one.total is not None]
        if not mean:
            return None
        return sum(float((total / len(labels)).square().sum()) for total in totals)


def check_samples(n_clusters: int, samples: int | None) -> None:
    """Raise a ValueError if there are fewer samples than clusters; None samples are unknown."""
    if samples is not None and samples < n_clusters:
        raise ValueError(
            f"n_clusters must be at most the number of samples, got {n_clusters} > {samples}"
        )


def check_finite(squares: Tensor) -> None:
    """Raise a ValueError unless squared norms are finite."""
    if not bool(squares.isfinite().all()):
        raise ValueError(
            "the gradients of all samples must be finite, got a NaN or an infinity: look at "
            "the model's outputs and the loss"
        )


def nobody(samples: int) -> None:
    """Tell nobody how many samples a batch has."""


def _labels_at(labels: Tensor, places: Tensor) -> Tensor:
    if int(places.max()) >= len(labels):
        _check_as_many("more", labels)
    return labels[places]


def _check_as_many(seen: int | str, labels: Tensor) -> None:
    if seen != len(labels):
        raise ValueError(
            f"the loader must yield the same samples in every pass, got {len(labels)} in one and "
            f"{seen} in another"
        )


def _shuffled(samples: int, *name: object) -> Tensor:
    return torch.randperm(samples, generator=stream(*name, "order"))
