"""The place of a process among those that share a dataset, and random numbers by name."""

import hashlib

import torch
import torch.distributed as dist

__all__ = ["check_samples", "place", "shard", "stream"]


def place(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Return the number of processes and this one's rank; None asks ``torch.distributed``.

    Raises:
        ValueError: only one of both is given, or the rank is not below the number.
    """
    if (num_replicas is None) != (rank is None):
        raise ValueError(
            f"num_replicas and rank must be given together, got {num_replicas} and {rank}"
        )
    if num_replicas is None or rank is None:
        if not (dist.is_available() and dist.is_initialized()):
            return 1, 0
        return dist.get_world_size(), dist.get_rank()
    if not (isinstance(num_replicas, int) and isinstance(rank, int) and 0 <= rank < num_replicas):
        raise ValueError(
            f"rank must be an integer from 0 to num_replicas - 1, got rank {rank} of {num_replicas}"
        )
    return num_replicas, rank


def check_samples(samples: int) -> None:
    """Compare the number of samples over the ranks, in one message that all of them must send.

    Ranks that divide datasets of different lengths would wait for each other at the end.

    Raises:
        ValueError: on every rank, where one has another number.
    """
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    ends = torch.tensor([samples, -samples], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    most, least = int(ends[0]), -int(ends[1])
    if most != least:
        raise ValueError(
            f"the dataset must be the same on all ranks, got {least} to {most} samples, and "
            f"{samples} on this rank"
        )


def stream(*name: object) -> torch.Generator:
    """Return a generator whose numbers depend on the name alone, such as seed, epoch and step.

    A position in a run then says all about its random numbers, so nothing else has to be saved.
    """
    digest = hashlib.sha256(repr(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def shard(samples: int, num_replicas: int, rank: int, *name: object) -> torch.Tensor | None:
    """Return this rank's part of a random partition of all indices; None where one has all."""
    if num_replicas == 1:
        return None
    return torch.randperm(samples, generator=stream(*name))[rank::num_replicas]
