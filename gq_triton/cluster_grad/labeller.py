"""The labeller, which says to which cluster every sample of a batch belongs."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gq_triton.cluster_grad.given import GivenLabels
from gq_triton.cluster_grad.kmeans_state import check_plain, plain_state, tensor_state
from gq_triton.grouping.kmeans import NOT_FINITE, KMeans
from gq_triton.options import OUTPUT_GRADIENT, ClusterOptions
from gq_triton.replayed import refuse_replay

__all__ = ["Labeller", "Labels"]

# Labels (B,) int64 on the features' device, the number of clusters, and what Groups.problem holds.
Labels = tuple[Tensor, int, tuple[Tensor, str] | None]


def _as_given(labels: Tensor) -> Tensor:
    return labels


class Labeller:
    """K-means, the user's clusterer, or the clusters that the loader brings with the batch.

    Args:
        options: how samples are grouped; ``n_clusters`` is given.
        backend: the engine that runs k-means.

    Attributes:
        given: the labels that the loader brings; None without ``labels=True``.
        kmeans: k-means; None where something else labels the samples.
        clusterer: called with features ``(B, F)``; returns labels ``(B,)``.
    """

    def __init__(self, options: ClusterOptions, backend: str) -> None:
        assert options.n_clusters is not None
        self.n_clusters = options.n_clusters
        self.given = GivenLabels() if options.labels else None
        self._overflows = options.features == OUTPUT_GRADIENT
        self._backend = backend
        clusterer = _as_given if options.labels else options.clusterer
        self.kmeans = self._new_kmeans() if clusterer is None else None
        self.clusterer = clusterer or self.kmeans
        self._warned = False

    def _new_kmeans(self) -> KMeans:
        # A loss scaler may let gradients at the output overflow. Such a step is skipped, so its
        # clusters do not matter.
        nonfinite = "zero" if self._overflows else "raise"
        return KMeans(self.n_clusters, nonfinite=nonfinite, backend=self._backend)

    def label(self, features: Tensor) -> Labels:
        """Return the labels of a batch's samples.

        Args:
            features: ``(B, F)``; the labels themselves, ``(B,)``, where the loader brings them.

        Raises:
            ValueError: a clusterer does not return one label per sample, or returns one below 0.
        """
        self._check_number(len(features))
        assert self.clusterer is not None
        labels = self.clusterer(features)
        if labels.shape != features.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"the clusterer must return ({len(features)},) integers, got "
                f"{tuple(labels.shape)} of {labels.dtype}"
            )
        if labels.device != features.device:
            refuse_replay("the clusterer returns labels on the CPU", "return them on the device")
        clusters, problem = self.n_clusters, None
        if self.kmeans is None:
            labels, clusters, problem = self._checked(labels)
        else:
            problem = self.kmeans.nonfinite_, NOT_FINITE
        return labels.to(features.device), clusters, problem  # those of scikit-learn are on the CPU

    def _checked(self, labels: Tensor) -> Labels:
        """Return labels that are no k-means', with the number of clusters and what is wrong.

        Labels on the CPU may exceed ``n_clusters``. On a GPU the host does not wait for them: there
        are ``n_clusters`` clusters, and a label that is none of them becomes the nearest.
        """
        source = "the clusterer must return" if self.given is None else "set_labels must give"
        if labels.device.type == "cpu":
            lowest, highest = torch.stack(labels.aminmax()).tolist()
            if lowest < 0:
                raise ValueError(f"{source} labels >= 0, got {lowest}")
            return labels, highest + 1, None
        inside = labels.clamp(0, self.n_clusters - 1)
        sentence = (
            f"{source} labels from 0 to n_clusters - 1 = {self.n_clusters - 1} "
            "where they are on a GPU: take more clusters, or return labels on the CPU"
        )
        return inside, self.n_clusters, ((inside != labels).any(), sentence)

    def _check_number(self, samples: int) -> None:
        """Warn, once, where k-means cannot fill its clusters."""
        if self.kmeans is not None and samples < self.n_clusters and not self._warned:
            self._warned = True
            warnings.warn(
                f"n_clusters={self.n_clusters} for a batch of {samples} samples: at least "
                f"{self.n_clusters - samples} clusters stay empty; take fewer clusters, or larger "
                "batches",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of k-means in plain values; an empty one for another clusterer."""
        return {} if self.kmeans is None else plain_state(self.kmeans)

    def check_saved(self, state: Any) -> None:
        """Raise a ValueError that names what keeps a saved state from being loaded."""
        check_plain(state, self.kmeans, self.n_clusters)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state; with an empty one k-means starts anew."""
        if self.kmeans is None:
            return
        if not state:
            self.kmeans = self.clusterer = self._new_kmeans()
            return
        self.kmeans.load_state_dict(tensor_state(state))
