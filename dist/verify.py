"""Comparison of digests over the ranks."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

__all__ = ["check_same"]


def check_same(
    digests: Mapping[str, bytes],
    group: dist.ProcessGroup | None,
    device: torch.device,
    when: str,
    what: str = "the queue of",
) -> None:
    """Raise a RuntimeError that names the first entry that is not the same on all ranks.

    Args:
        digests: digests of one size by name, in the same order on every rank.
        group: the process group, every rank of which must call.
        device: where the group's collectives run.
        when: the moment of the comparison, for the message.
        what: the kind of the entries, for the message.
    """
    mine = torch.frombuffer(bytearray(b"".join(digests.values())), dtype=torch.uint8).to(device)
    tables = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(tables, mine, group=group)
    table = torch.stack(tables).view(len(tables), len(digests), -1)
    same = (table == table[0]).all(dim=-1)
    for name, ranks in zip(digests, same.T.tolist(), strict=True):
        if not all(ranks):
            others = [rank for rank, equal in enumerate(ranks) if not equal]
            raise RuntimeError(
                f"{what} {name!r} differs between the ranks (rank 0 from {others}) in "
                f"{when}: every rank must load the same state and have the same options; if "
                "every rank did, resume the run from its last checkpoint"
            )
