"""The text with which the doors describe themselves, their ``repr``."""

from collections.abc import Iterable

from torch import Tensor

from gq_triton.options import Options
from gq_triton.ring import local

__all__ = ["changed", "described", "memory"]


def changed(*groups: Options) -> list[str]:
    """Return the options that differ from their defaults, as ``name=value``."""
    return [
        f"{name}={value!r}"
        for group in groups
        for name, value in vars(group).items()
        if value != getattr(type(group), name)
    ]


def memory(params: Iterable[Tensor], rings: Iterable[Tensor]) -> str:
    """Return how many parameters there are, and how many bytes their rings take here."""
    members = list(params)
    count = sum(param.numel() for param in members)
    taken = sum(local(ring).numel() * ring.element_size() for ring in rings)
    return f"{len(members)} parameters of {count} elements, queue of {taken} bytes"


def described(owner: object, options: Iterable[str], *facts: str) -> str:
    """Return ``Class(options; fact; fact)``."""
    parts = [", ".join(options) or "default options", *facts]
    return f"{type(owner).__name__}({'; '.join(parts)})"
