"""Saved states of the DDP hook with one leaf altered."""

import pytest
import torch
from altered import REMOVED, check_door
from dist_models import mlp
from drawn import fuzz_door
from test_dist_hook import one_rank
from torch.nn.parallel import DistributedDataParallel as DDP

from gq_triton.dist import register


def trained():
    """Return the state of a hook with clusters and shares after three steps, and what takes one."""
    ddp = DDP(mlp())
    options = {"n_clusters": 2, "features": "0", "shard_queue": True}
    state = register(ddp, queue_length=2, backend="torch", **options)

    def step():
        ddp.zero_grad()
        ddp(torch.ones(4, 6) * torch.arange(4.0)[:, None]).square().mean().backward()

    for _ in range(3):
        step()
    return state, step


@pytest.mark.slow
def test_every_altered_leaf_of_the_hooks_own_part_is_refused_or_possible():
    """The hook's own part are buckets and clusters; test_saved_queues.py tests the rest."""
    with one_rank():
        state, step = trained()
        saved = state.state_dict()
        names = set(saved["queue"])

        def possible(path, value):
            match path:
                case ("buckets",):
                    # Any cut of the parameters into buckets, none of which is empty.
                    return value is REMOVED or value == [] or value == saved["buckets"][:-1]
                case ("buckets", int()):
                    return value is REMOVED or value == saved["buckets"][0][:-1]
                case ("buckets", int(), int()):
                    return value is REMOVED or value in sorted(names - {*saved["buckets"][0]})
                case ("clusters",):
                    # Clusters that another number of ranks saved are not used.
                    dicts = isinstance(value, list) and all(isinstance(v, dict) for v in value)
                    return value is REMOVED or (dicts and (value == [] or len(value) != 1))
                case ("clusters", 0):
                    return value is REMOVED or value == {}
                case ("clusters", 0, "cluster_centers", 0 | 1, int()):
                    real = isinstance(value, (int, float)) and not isinstance(value, bool)
                    return real and abs(value) < 1e38
                case ("clusters", 0, "dtype"):
                    return value in ("float32", "float64")
            return False

        def fingerprint():
            content = state.state_dict()
            return state.digest(), str(content["buckets"]), str(content["clusters"])

        check_door(
            saved, state.load_state_dict, possible, fingerprint, step,
            where=lambda path: path[0] in ("buckets", "clusters") and path[-1] not in range(2, 16),
        )  # fmt: skip


@pytest.mark.slow
def test_the_hooks_state_with_drawn_alterations_is_refused_or_goes_on():
    with one_rank():
        state, step = trained()
        columns = len(state.state_dict()["clusters"][0]["cluster_centers"][0])

        def fingerprint():
            content = state.state_dict()
            return state.digest(), str(content["buckets"]), str(content["clusters"])

        def go_on():
            (own,) = state.state_dict()["clusters"]
            centers = own.get("cluster_centers")
            if centers and len(centers[0]) != columns:
                # How many features a sample has is not known before the next forward pass.
                with pytest.raises(ValueError, match="columns but the centres"):
                    step()
            else:
                step()

        fuzz_door(state.state_dict(), state.load_state_dict, fingerprint, go_on, examples=120)
