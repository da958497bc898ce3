"""Partitions of samples into clusters: which cost assigns them, and how empty ones are filled.

Shapes: N samples, B of them in a batch, K clusters.
"""

import torch
from torch import Tensor

__all__ = ["ASSIGNMENTS", "Assigner", "equal_parts", "fill"]

# What multiplies the distance from a centre: the samples that a pass has given to it so far, those
# of the last pass (equation 3), or nothing.
ASSIGNMENTS = ("running", "fixed", "kmeans")


class Assigner:
    """The rule that gives samples to clusters in one pass, a batch at a time.

    Args:
        assignment: one of ``ASSIGNMENTS``.
        sizes: the samples of every cluster after the last pass, ``(K,)``.
    """

    def __init__(self, assignment: str, sizes: Tensor) -> None:
        self._assignment = assignment
        self._sizes = torch.zeros_like(sizes) if assignment == "running" else sizes

    def __call__(self, distances: Tensor) -> Tensor:
        """Return the labels ``(B,)`` of samples with squared distances ``(B, K)``."""
        if self._assignment == "kmeans":
            return distances.argmin(1)
        if self._assignment == "fixed":
            return (self._sizes * distances).argmin(1)
        labels = ((self._sizes + 1) * distances).argmin(1)
        clusters = torch.arange(distances.shape[1], device=labels.device)
        # Without bincount, for which the host would wait on a GPU.
        self._sizes = self._sizes + (labels[:, None] == clusters).sum(0)
        return labels


def fill(
    labels: Tensor, distortions: Tensor, generator: torch.Generator, least: int = 1
) -> tuple[Tensor, int]:
    """Move samples until no cluster has fewer than ``least``, as far as there are enough.

    A cluster that is too small gets a random half, rounded down, of the one with the largest
    distortion among those that can be halved.

    Args:
        labels: ``(N,)``.
        distortions: the sum of squared distances within every cluster, ``(K,)``.
        generator: source of the random halves.
        least: the smallest size.

    Returns:
        The labels, and how many clusters were halved.
    """
    labels, distortions = labels.clone(), distortions.clone()
    for splits in range(len(distortions)):
        sizes = torch.bincount(labels, minlength=len(distortions))
        small = int(sizes.argmin())
        whole = sizes >= max(2, 2 * least)
        if int(sizes[small]) >= least or not bool(whole.any()):
            return labels, splits
        large = int(distortions.where(whole, -1.0).argmax())
        members = (labels == large).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        labels[members[order[: len(members) // 2]]] = small
        distortions[small] += distortions[large] / 2
        distortions[large] /= 2
    return labels, len(distortions)


def equal_parts(samples: int, clusters: int, generator: torch.Generator) -> Tensor:
    """Return the labels ``(N,)`` of a random partition whose parts differ by at most one sample."""
    labels = torch.empty(samples, dtype=torch.int64)
    labels[torch.randperm(samples, generator=generator)] = torch.arange(samples) % clusters
    return labels
