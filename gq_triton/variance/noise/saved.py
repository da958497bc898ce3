"""The rule of a saved meter."""

import torch

from gq_triton.saved.rules import Exactly, Integer, ListOf, Number, Record
from gq_triton.saved.tensors import GeneratorState, TensorLike
from gq_triton.variance.noise.window import COLUMNS

__all__ = ["saved_rule"]


def saved_rule(names: list[str]) -> Record:
    """Return what a saved state must be, for parameters of these names."""
    wide = (torch.float64,)
    measured = Record(
        {
            "step": Integer(),
            "samples": Integer(),
            "table": TensorLike((len(names), len(COLUMNS)), dtypes=wide),
            "norms": TensorLike((None,), dtypes=wide),
        }
    )
    return Record(
        {
            "names": Exactly(names),
            "step": Integer(),
            "measured": ListOf(measured),
            "rows": ListOf(ListOf(Number(), length=4)),
            "generator": GeneratorState(),
            "clusters": Record({}),
        }
    )
