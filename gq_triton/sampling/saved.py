"""The rule of a saved ``GradientClustering``: what it found, and where it goes on from."""

from typing import Any

import torch

from gq_triton.saved.rules import Exactly, Flag, Integer, ListOf, Maybe, Number, Record
from gq_triton.saved.tensors import TensorLike

__all__ = ["FOUND", "clustering_rule"]

# Attributes that a fit sets, besides the labels and their sizes.
FOUND = ("objective_", "objectives_", "uniform_", "fell_back_", "n_splits_")


def clustering_rule(n_clusters: int, layers: list[str]) -> Record:
    """Return what a saved state must be, for K clusters and layers of these names."""
    number = Number(low=0)
    centre = TensorLike((n_clusters, None, None, None), finite=True)
    fit = {
        "labels_": TensorLike((None,), dtypes=(torch.int64,), low=0, high=n_clusters - 1),
        "objective_": number,
        "objectives_": ListOf(number),
        "uniform_": number,
        "fell_back_": Flag(),
        "n_splits_": Integer(),
    }
    sizes = TensorLike((n_clusters,), dtypes=(torch.float64,), low=0, finite=True)
    centres: dict[Any, Any] = {name: ListOf(centre, 2) for name in layers}
    return Record(
        {
            "n_clusters": Exactly(n_clusters),
            "fit": Maybe(Record(fit)),
            "centres": Record({}, centres, unknown="that is no layer here"),
            "sizes": Maybe(sizes),
            "followed": Integer(),
        }
    )
