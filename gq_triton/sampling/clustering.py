"""Clusters of a dataset's samples in gradient space, without holding their gradients.

Faghri et al., "A Study of Gradient Variance in Deep Learning" (2020), sections 3 and 4. Shapes: N
samples, B of them in a batch, K clusters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.sampling.centres import Centre
from gq_triton.sampling.checks import check_model, count, number, one_of, raise_all
from gq_triton.sampling.online import followed, revived
from gq_triton.sampling.partition import ASSIGNMENTS, equal_parts, fill
from gq_triton.sampling.passes import Passes, check_finite, check_samples, nobody
from gq_triton.sampling.progress import progress
from gq_triton.sampling.ranks import stream
from gq_triton.sampling.saved import FOUND, clustering_rule
from gq_triton.sampling.scores import Loss, as_module
from gq_triton.sampling.source import Batches, Source, source_of
from gq_triton.sampling.watch import device_of
from gq_triton.saved.rules import check

__all__ = ["GradientClustering"]

# Batches of ``partial_fit`` after which clusters without samples are given up.
REVIVAL = 50


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

    Examples:
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
        self._passes = Passes(model, layers, n_clusters, assignment, rank, loss, split, seed)
        self.model, self.layers = self._passes.model, self._passes.layers
        self.n_clusters, self.assignment, self.rank = n_clusters, assignment, rank
        self.loss, self.max_iter, self.min_size = loss, max_iter, min_size
        self.beta, self._seed = beta, seed
        self._sizes: Tensor | None = None  # moving averages of batches
        self._followed, self._fitted = 0, False

    def fit(self, loader: Any) -> "GradientClustering":
        """Cluster the samples of a dataset, in ``2 max_iter + 1`` passes over it, or 2 more.

        Beside the labels it holds two numbers per sample. After two seconds a bar shows the samples
        that were read, where stderr is a terminal and rich is installed.

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
        check_samples(self.n_clusters, source.samples)
        passes = 2 * self.max_iter + 1
        total = None if source.own is None else passes * source.own
        with progress("clusters of gradients", total) as self._passes.seen:
            try:
                self._fit(source)
            finally:
                self._passes.seen = nobody
        return self

    def _fit(self, source: Source | Batches) -> None:
        self._passes.centres, self._sizes, self._followed = {}, None, 0
        labels, best, splits = None, None, 0
        self.objectives_ = []
        for iteration in range(self.max_iter):
            found = self._passes.assign(source, iteration, labels)
            if labels is not None:
                best = self._better(best, found.objective, labels)
            generator = stream(self._seed, "halves", iteration)
            labels, halved = fill(found.labels, found.distortions, generator, self.min_size)
            splits += halved
            mean = self._passes.update(source, labels, mean=iteration == 0)
            if mean is not None:
                samples = len(labels)
                variance = max(0.0, found.squares / samples - mean)
                self.uniform_ = samples**2 * variance / self.n_clusters
        assert labels is not None
        best = self._better(
            best, self._passes.assign(source, self.max_iter, labels).objective, labels
        )
        self.objective_, self.labels_ = best
        self.fell_back_ = self.n_clusters > 1 and not self.objective_ < self.uniform_
        if self.fell_back_:
            generator = stream(self._seed, "parts")
            self.labels_ = equal_parts(len(labels), self.n_clusters, generator)
            self._passes.update(source, self.labels_)
            objective = self._passes.assign(source, self.max_iter + 1, self.labels_).objective
            assert objective is not None
            self.objective_ = objective
        self.n_splits_, self._fitted = splits, True
        self.cluster_sizes_ = torch.bincount(self.labels_, minlength=self.n_clusters)

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
        found = self._passes.factors(batch)
        samples = len(next(iter(found.values())).inputs)
        if not self._passes.centres:
            check_samples(self.n_clusters, samples)
            self._passes.centres = self._passes.first([found])
        if self._sizes is None:
            share = samples / self.n_clusters
            self._sizes = torch.full((self.n_clusters,), share, dtype=torch.float64)
        distances, squares = (part.cpu() for part in self._passes.distances(found))
        check_finite(squares)
        labels = ((self._sizes + 1) * distances).argmin(1)
        moving = followed(self._passes.centres, self._sizes, found, labels, self.beta)
        self._passes.centres, self._sizes = moving
        self._followed += 1
        if self._followed % REVIVAL == 0:
            own = distances.gather(1, labels[:, None])[:, 0]
            distortions = torch.zeros_like(self._sizes).index_add_(0, labels, own)
            self._passes.centres, self._sizes = revived(
                self._passes.centres, self._sizes, distortions
            )
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
        if not self._passes.centres:
            raise RuntimeError("there are no centres yet: call fit or partial_fit first")
        return self._passes.assign(source_of(loader), self._followed, None).labels

    def state_dict(self) -> dict[str, Any]:
        """Return what was found, and the centres and sizes that ``partial_fit`` goes on from."""
        fit = {name: getattr(self, name) for name in ("labels_", *FOUND)} if self._fitted else None
        return {
            "n_clusters": self.n_clusters,
            "fit": fit,
            "centres": {name: list(centre) for name, centre in self._passes.centres.items()},
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
        for name, (inputs, outputs) in state["centres"].items():
            weight: Any = self.layers[name].weight
            (_, groups, rank, width), height = inputs.shape, outputs.shape[3]
            fits = inputs.shape[:3] == outputs.shape[:3] and rank == self.rank
            if not fits or groups * width * height != weight.numel():
                raise ValueError(
                    f"the saved GradientClustering does not fit: the centres of {name!r} must be "
                    f"of rank {self.rank} and of a weight {tuple(weight.shape)}, got factors "
                    f"{tuple(inputs.shape)} and {tuple(outputs.shape)}"
                )
        device, fit, sizes = device_of(self.model), state["fit"], state["sizes"]
        self._passes.centres = {
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

    # --- decisions

    def _better(
        self, best: tuple[float, Tensor] | None, objective: float | None, labels: Tensor
    ) -> tuple[float, Tensor]:
        """Return the better of two partitions."""
        assert objective is not None
        self.objectives_.append(objective)
        return best if best is not None and best[0] <= objective else (objective, labels)
