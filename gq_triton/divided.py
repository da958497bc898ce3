"""Tensors that are divided among processes, without the import of what divides them.

``torch.distributed.tensor`` takes as long to import as a third of torch. A program that has not
imported it has no DTensor.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["dtensor"]


def dtensor() -> "tuple[type[DTensor], ...]":
    """Return the class of divided tensors, for ``isinstance``; none while nobody imported it."""
    found = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return () if found is None else (found,)
