"""Clusters of a dataset's samples in gradient space, without holding their gradients.

Faghri et al., "A Study of Gradient Variance in Deep Learning" (2020), sections 3 and 4. Shapes: N
samples, B of them in a batch, K clusters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gq_triton.sampling.centres import Centre, Sums, of_samples, products
from gq_triton.sampling.checks import check_model, count, number, one_of, raise_all
from gq_triton.sampling.factors import Factors, factors, layers_of
from gq_triton.sampling.fetch import moved, split_batch
from gq_triton.sampling.online import followed, revived
from gq_triton.sampling.partition import ASSIGNMENTS, Assigner, equal_parts, fill
from gq_triton.sampling.ranks import stream
from gq_triton.sampling.saved import FOUND, clustering_rule
from gq_triton.sampling.scores import Loss, as_module
from gq_triton.sampling.source import Batches, Source, source_of
from gq_triton.sampling.watch import device_of, run_model, scorer
from gq_triton.saved.rules import check

__all__ = ["GradientClustering"]

# Batches of ``partial_fit`` after which clusters without samples are given up.
REVIVAL = 50


class _Batch(NamedTuple):
    """The factors of a batch's gradients by layer, and the places of its samples."""

    places: Tensor
    factors: dict[str, Factors]


class _Assigned(NamedTuple):
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


class GradientClustering:
    r"""Clusters in gradient space that lower the variance of stratified batches.

    The objective is ``sum_k N_k sum_{i in k} ||C_k - g_i||^2``; with the clusters' means as centres
    it is ``N^2`` times the variance of one draw per cluster (equation 2). An iteration is a pass
    that assigns every sample to a centre, and a pass that makes new centres. Both run the model on
    every sample, forward and backward, but for the layers' weights: a sample's gradient of a layer
    is known by its two factors, the layer's input and the gradient at its output, and a centre is
    a product of vectors too. So neither gradients nor distances of gradients are ever formed whole
    (for convolutions and sequences they are where that is cheaper, for few samples at a time).

    The partition with the least objective over all iterations is kept. If it is no better than
    uniform batches of K, whose objective is ``N^2 V / K``, a random partition into equal parts
    takes its place, which is as good as uniform batches on average; ``fell_back_`` tells.

    *Several processes.* Under ``torch.distributed`` every rank must call ``fit`` and ``predict``:
    each reads a part of a ``DataLoader``'s dataset, and all get
    the same labels. Batches that come in one order, and ``partial_fit``, are not divided.

    Only weights of linear layers and convolutions count; biases and norms do not. The model runs in
    evaluation mode, and every module's mode comes back after.

    Args:
        model: the model.
        layers: parts of the names of the layers that count; None takes all.
        n_clusters: K, at most the number of samples.
        assignment: what a distance is multiplied by. ``"running"``: the number of samples that the
            pass has given to the cluster so far, plus one, in a new random order every pass, as in
            the authors' code. ``"fixed"``: the number after the last pass, as the paper has it
            (equation 3), which often makes the objective larger. ``"kmeans"``: 1.
        rank: the terms of a centre. 1 takes the means of both factors (equation 6); more are the
            largest singular triples of the mean gradient, for which K gradients are kept.
        loss: as in ``importance_score``.
        max_iter: iterations.
        min_size: clusters with fewer samples get half of another one.
        beta: the share of the past in the moving averages of ``partial_fit``.
        split: ``batch -> (inputs, targets)``, of what the loader yields.
        seed: seed of the first centres, the orders and the halves.

    Attributes:
        labels_: the cluster of every sample, ``(N,)`` int64: the place of a sample in the loader's
            dataset, whatever the loader's order.
        cluster_sizes_: ``(K,)`` int64.
        objective_: the objective of ``labels_``, with the centres that were made for them.
        objectives_: the objective of every iteration.
        uniform_: that of uniform batches, ``N^2 V / K``.
        fell_back_: whether ``labels_`` are the random partition.
        n_splits_: how many clusters were halved, over all iterations.

    Raises:
        TypeError: the model is no module, or the loss no loss.
        ValueError: an argument is out of its range, or no layer can be used.

    Example:
        >>> import torch
        >>> from gq_triton.sampling import StratifiedBatchSampler
        >>> x = torch.randn(8, 5).repeat(10, 1)  # 8 samples, 10 times each
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> layers = torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)
        >>> model = torch.nn.Sequential(*layers)
        >>> clustering = GradientClustering(model, n_clusters=8)
        >>> clustering = clustering.fit(torch.utils.data.DataLoader(data, batch_size=20))
        >>> clustering.objective_ < clustering.uniform_
        True
        >>> sampler = StratifiedBatchSampler(clustering.labels_, batch_size=8)
    """

    labels_: Tensor
    cluster_sizes_: Tensor
    objective_: float
    objectives_: list[float]
    uniform_: float
    fell_back_: bool
    n_splits_: int

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        n_clusters: int = 10,
        assignment: str = "running",
        rank: int = 1,
        *,
        loss: Loss = "cross_entropy",
        max_iter: int = 5,
        min_size: int = 1,
        beta: float = 0.99,
        split: Callable[[Any], tuple[Any, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        check_model(model)
        as_module(loss)
        raise_all(
            count("n_clusters", n_clusters),
            one_of("assignment", assignment, ASSIGNMENTS),
            count("rank", rank),
            count("max_iter", max_iter),
            count("min_size", min_size),
            number("beta", beta, 0, 1),
            count("seed", seed, 0),
        )
        if isinstance(layers, str):
            raise ValueError(f"layers must be a list of parts of names, got {layers!r}")
        self.model = scorer(model)
        self.layers = layers_of(self.model, layers)
        self.n_clusters, self.assignment, self.rank = n_clusters, assignment, rank
        self.loss, self.max_iter, self.min_size = loss, max_iter, min_size
        self.beta = beta
        self._split, self._seed = split or split_batch, seed
        self._centres: dict[str, Centre] = {}
        self._sizes: Tensor | None = None  # moving averages of batches
        self._followed, self._fitted = 0, False

    def fit(self, loader: Any) -> "GradientClustering":
        """Cluster the samples of a dataset, in ``2 max_iter + 1`` passes over it, or 2 more.

        Args:
            loader: a ``DataLoader`` over a map-style dataset, whose batches are read in orders of
                this object's own; or batches that come in one order, several times.

        Returns:
            This object, with its attributes set.

        Raises:
            TypeError: the loader can be read once only.
            ValueError: there are fewer samples than clusters, or a loss or gradient is not finite.
        """
        source = source_of(loader)
        self._check_samples(source.samples)
        self._centres, self._sizes, self._followed = {}, None, 0
        labels, best, splits = None, None, 0
        self.objectives_ = []
        for iteration in range(self.max_iter):
            found = self._assign(source, iteration, labels)
            if labels is not None:
                best = self._better(best, found.objective, labels)
            generator = stream(self._seed, "halves", iteration)
            labels, halved = fill(found.labels, found.distortions, generator, self.min_size)
            splits += halved
            mean = self._update(source, labels, mean=iteration == 0)
            if mean is not None:
                samples = len(labels)
                variance = max(0.0, found.squares / samples - mean)
                self.uniform_ = samples**2 * variance / self.n_clusters
        assert labels is not None
        best = self._better(best, self._assign(source, self.max_iter, labels).objective, labels)
        self.objective_, self.labels_ = best
        self.fell_back_ = self.n_clusters > 1 and not self.objective_ < self.uniform_
        if self.fell_back_:
            generator = stream(self._seed, "parts")
            self.labels_ = equal_parts(len(labels), self.n_clusters, generator)
            self._update(source, self.labels_)
            objective = self._assign(source, self.max_iter + 1, self.labels_).objective
            assert objective is not None
            self.objective_ = objective
        self.n_splits_, self._fitted = splits, True
        self.cluster_sizes_ = torch.bincount(self.labels_, minlength=self.n_clusters)
        return self

    def partial_fit(self, batch: Any) -> Tensor:
        """Follow a training: assign one batch, and move the centres towards its samples.

        Sizes and centres are moving averages with ``beta``, after the centres of a fit or, without
        one, of the first K samples of the first batch. Every 50 batches a cluster that has got
        almost no samples takes the centre of the one with the largest distortion. ``predict`` then
        assigns the whole dataset. ``fit`` is more exact.

        Args:
            batch: what the loader yields, at least one sample; K samples if it is the first.

        Returns:
            The labels ``(B,)`` int64 of the batch's samples, on the CPU.

        Raises:
            ValueError: rank is not 1, the first batch is too small, or a gradient is not finite.
        """
        if self.rank != 1:
            raise ValueError(f"partial_fit needs rank=1, got {self.rank}")
        inputs, targets = self._split(moved(batch, device_of(self.model)))
        found = factors(self.model, self.layers, run_model, inputs, targets, self.loss)
        samples = len(next(iter(found.values())).inputs)
        if not self._centres:
            self._check_samples(samples)
            self._centres = self._first([found])
        if self._sizes is None:
            share = samples / self.n_clusters
            self._sizes = torch.full((self.n_clusters,), share, dtype=torch.float64)
        distances, _ = self._distances(found)
        labels = ((self._sizes + 1) * distances).argmin(1)
        moving = followed(self._centres, self._sizes, found, labels, self.beta)
        self._centres, self._sizes = moving
        self._followed += 1
        if self._followed % REVIVAL == 0:
            own = distances.gather(1, labels[:, None])[:, 0]
            distortions = torch.zeros_like(self._sizes).index_add_(0, labels, own)
            self._centres, self._sizes = revived(self._centres, self._sizes, distortions)
        return labels

    def predict(self, loader: Any) -> Tensor:
        """Assign every sample of a dataset to the present centres, in one pass.

        Args:
            loader: as in ``fit``.

        Returns:
            The labels ``(N,)`` int64; no attribute changes.

        Raises:
            RuntimeError: there are no centres yet.
            TypeError: as ``fit``.
            ValueError: as ``fit``.
        """
        if not self._centres:
            raise RuntimeError("there are no centres yet: call fit or partial_fit first")
        return self._assign(source_of(loader), self._followed, None).labels

    def state_dict(self) -> dict[str, Any]:
        """Return what was found, and the centres and sizes that ``partial_fit`` goes on from."""
        fit = {name: getattr(self, name) for name in ("labels_", *FOUND)} if self._fitted else None
        return {
            "n_clusters": self.n_clusters,
            "fit": fit,
            "centres": {name: list(centre) for name, centre in self._centres.items()},
            "sizes": self._sizes,
            "followed": self._followed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, with tensors on any device.

        Raises:
            ValueError: the state is of another number of clusters or of other layers, or was
                altered. Nothing is changed.
        """
        rule = clustering_rule(self.n_clusters, [*self.layers])
        check(state, rule, "the saved GradientClustering")
        device, fit, sizes = device_of(self.model), state["fit"], state["sizes"]
        self._centres = {
            name: Centre(*(side.to(device, copy=True) for side in sides))
            for name, sides in state["centres"].items()
        }
        self._sizes = None if sizes is None else sizes.to("cpu", copy=True)
        self._followed, self._fitted = state["followed"], fit is not None
        if fit is not None:
            for name in FOUND:
                setattr(self, name, fit[name])
            self.labels_ = fit["labels_"].to("cpu", copy=True)
            self.cluster_sizes_ = torch.bincount(self.labels_, minlength=self.n_clusters)

    # --- passes

    def _batches(self, read: Iterator[tuple[Tensor | None, Any]]) -> Iterator[_Batch]:
        """Yield the factors of every batch that a source reads."""
        device, begin = device_of(self.model), 0
        for places, batch in read:
            inputs, targets = self._split(moved(batch, device))
            found = factors(self.model, self.layers, run_model, inputs, targets, self.loss)
            size = len(next(iter(found.values())).inputs)
            if places is None:
                places = torch.arange(begin, begin + size)
            begin += size
            yield _Batch(places, found)

    def _begin(self, source: Source | Batches, order: Tensor | None) -> None:
        """Make the first samples of an order the centres."""
        found, seen = [], 0
        for batch in self._batches(source.first(order, self.n_clusters)):
            found.append(batch.factors)
            seen += len(batch.places)
            if seen >= self.n_clusters:
                break
        self._check_samples(seen)
        first = self._first(found).items()
        self._centres = {name: Centre(*map(source.of_first_rank, one)) for name, one in first}

    def _assign(self, source: Source | Batches, iteration: int, old: Tensor | None) -> _Assigned:
        """Assign every sample to a centre, and measure the old labels by the centres."""
        samples = source.samples
        order = None if samples is None else _shuffled(samples, self._seed, iteration)
        if not self._centres:
            self._begin(source, order)
        sizes = torch.full((self.n_clusters,), 1.0, dtype=torch.float64)
        if old is not None:
            sizes = torch.bincount(old, minlength=self.n_clusters).double()
        assigner = Assigner(self.assignment, sizes)
        # Rows: distortions of the new labels and of the old ones, and the squared norms.
        sums = torch.zeros(3, self.n_clusters, dtype=torch.float64)
        places, labels = [], []
        for batch in self._batches(source.batches(order)):
            distances, squares = self._distances(batch.factors)
            own = assigner(distances)
            places.append(batch.places)
            labels.append(own)
            sums[0].index_add_(0, own, distances.gather(1, own[:, None])[:, 0])
            if old is not None:
                before = _labels_at(old, batch.places)
                sums[1].index_add_(0, before, distances.gather(1, before[:, None])[:, 0])
            sums[2].index_add_(0, own, squares)
        found = torch.zeros(samples or sum(map(len, labels)), dtype=torch.int64)
        if labels:  # a rank may have no sample
            found[torch.cat(places)] = torch.cat(labels)
        distortions, within, norms = source.total(sums)
        objective = None if old is None else float((sizes * within).sum())
        return _Assigned(source.total(found), distortions, objective, float(norms.sum()))

    def _first(self, found: list[dict[str, Factors]]) -> dict[str, Centre]:
        """Return the first K samples as centres."""
        centres = {}
        for name in found[0]:
            first = [Factors(*(f[: self.n_clusters] for f in batch[name])) for batch in found]
            made = [of_samples(one, self.rank) for one in first]
            pairs = zip(*made, strict=True)
            centres[name] = Centre(*(torch.cat(pair)[: self.n_clusters] for pair in pairs))
        return centres

    def _distances(self, found: dict[str, Factors]) -> tuple[Tensor, Tensor]:
        """Return squared distances ``(B, K)`` and squared norms ``(B,)``, float64 on the CPU."""
        distances, squares = 0, 0
        for name, one in found.items():
            centre = self._centres[name]
            dots, norms = products(one, centre)
            squares = squares + norms.double()
            both = norms.double()[:, None] + centre.squares.double()
            # Rounding may lead below 0. It is not rounded further, however small gradients are.
            distances = distances + (both - 2 * dots.double()).clamp_(min=0)
        assert isinstance(distances, Tensor)
        assert isinstance(squares, Tensor)
        if not bool(squares.isfinite().all()):
            raise ValueError(
                "the gradients of all samples must be finite, got a NaN or an infinity: look at "
                "the model's outputs and the loss"
            )
        return distances.cpu(), squares.cpu()

    def _update(self, source: Source | Batches, labels: Tensor, mean: bool = False) -> float | None:
        """Make new centres for the labels; return the squared norm of the mean gradient."""
        sums: dict[str, Sums] = {}
        for batch in self._batches(source.batches(None)):
            own = _labels_at(labels, batch.places).to(device_of(self.model))
            for name, one in batch.factors.items():
                if name not in sums:
                    sums[name] = Sums(self.rank, self.n_clusters, mean)
                sums[name].add(one, own)
        for one in sums.values():
            one.share(source.total)
        self._centres = {name: one.centre() for name, one in sums.items()}
        totals = [one.total for one in sums.values() if one.total is not None]
        if not mean:
            return None
        return sum(float((total / len(labels)).square().sum()) for total in totals)

    # --- decisions

    def _better(
        self, best: tuple[float, Tensor] | None, objective: float | None, labels: Tensor
    ) -> tuple[float, Tensor]:
        """Return the better of two partitions."""
        assert objective is not None
        self.objectives_.append(objective)
        return best if best is not None and best[0] <= objective else (objective, labels)

    def _check_samples(self, samples: int | None) -> None:
        if samples is not None and samples < self.n_clusters:
            raise ValueError(
                f"n_clusters must be at most the number of samples, got {self.n_clusters} > "
                f"{samples}"
            )


def _labels_at(labels: Tensor, places: Tensor) -> Tensor:
    if int(places.max()) >= len(labels):
        raise ValueError(
            f"the loader must yield the same samples in every pass, got {len(labels)} in one and "
            "more in another"
        )
    return labels[places]


def _shuffled(samples: int, *name: object) -> Tensor:
    return torch.randperm(samples, generator=stream(*name, "order"))
