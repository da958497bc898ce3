"""The reading of a file that ``torch.save`` wrote, and that somebody may have altered."""

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

__all__ = ["DAMAGE", "load_checked"]

# Exceptions that the reading of a damaged file has been seen to raise.
DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    ImportError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def load_checked(path: Path) -> Any:
    """Read tensors and plain values, on the CPU; check the file's checksums, which torch ignores.

    Raises:
        ValueError: a checksum differs. Reading may raise any other exception of ``DAMAGE``.
    """
    with zipfile.ZipFile(path) as archive:
        record = archive.testzip()
    if record is not None:
        raise ValueError(f"{path} is damaged in {record}")
    return torch.load(path, map_location="cpu", weights_only=True)
