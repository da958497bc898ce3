"""The state of a batch's k-means in plain values, as a checkpoint holds it."""

from collections.abc import Mapping
from typing import Any

import torch

from gq_triton.grouping.kmeans import KMeans
from gq_triton.saved.rules import Also, Bytes, ListOf, Maybe, Number, OneOf, Record, check

__all__ = ["check_plain", "plain_state", "tensor_state"]


def plain_state(kmeans: KMeans) -> dict[str, Any]:
    """Return the state of k-means: centres as lists, their type as a word, and the generator."""
    state = kmeans.state_dict()
    centers = state["cluster_centers"]
    return {
        "cluster_centers": None if centers is None else centers.tolist(),
        "dtype": None if centers is None else str(centers.dtype).removeprefix("torch."),
        "generator": bytes(state["generator"].tolist()),
    }


def check_plain(state: Any, kmeans: KMeans | None, n_clusters: int) -> None:
    """Raise a ValueError that names what keeps a saved state from being loaded.

    Args:
        state: what was saved; an empty mapping where there was no k-means.
        kmeans: what would load it; None for another clusterer, which loads nothing.
        n_clusters: K.
    """
    if isinstance(state, list):
        raise ValueError(
            "the saved clusters are those of several ranks: load them into a GradQueueState"
        )
    what = "the state of the saved clusters"
    check(state, Record({}), what)
    if kmeans is None or not state:
        return
    centers = ListOf(ListOf(Number(), shortest=1), length=n_clusters)
    rules = {
        "cluster_centers": Maybe(centers),
        "dtype": OneOf((None, "float32", "float64")),
        "generator": Bytes(),
    }
    check(state, Also(Record(rules), _uneven), what)
    kmeans.check_saved(tensor_state(state))


def _uneven(state: Mapping[str, Any]) -> str | None:
    """Return what is wrong with saved centres, besides their number; None if nothing is."""
    centers = state["cluster_centers"]
    if (centers is None) != (state["dtype"] is None):
        return "cluster_centers and dtype must both be None or neither"
    if centers is not None and len({len(center) for center in centers}) > 1:
        return "cluster_centers must all have the same number of features"
    return None


def tensor_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of ``KMeans`` from the plain values of ``plain_state``."""
    centers = state["cluster_centers"]
    if centers is not None:
        # Through float64, a number beyond the range of float32 becomes an infinity, not an error.
        centers = torch.tensor(centers, dtype=torch.float64).to(getattr(torch, state["dtype"]))
    generator = torch.tensor(list(state["generator"]), dtype=torch.uint8)
    return {"cluster_centers": centers, "generator": generator}
