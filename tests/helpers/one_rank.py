"""A process group of this process alone, for tests of what only needs a group to be there."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

__all__ = ["one_rank"]


@contextmanager
def one_rank() -> Iterator[None]:
    """Have a gloo group of one rank; what holds it is collected before it ends."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()
