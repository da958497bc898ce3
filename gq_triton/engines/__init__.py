"""The choice of the engine: no other module asks whether Triton or Numba can run.

Three engines offer the operations of ``engines.protocol``: ``gq_triton.kernels`` (Triton),
``engines.compiled`` (Numba, CPU) and ``engines.eager`` (plain torch, any device).
"""

import importlib.util
import os
import warnings
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from gq_triton.engines.protocol import Engine
from gq_triton.extras import how_to_install
from gq_triton.options import check_backend

__all__ = ["Engine", "engine", "note_plain_torch"]


def engine(device: torch.device, backend: str = "auto") -> Engine:
    """Return the module that runs the operations on ``device``.

    Args:
        device: where the gradients are.
        backend: ``"auto"`` takes Triton on a GPU it supports, Numba on the CPU where it is
            installed, and plain torch otherwise; ``"triton"``, ``"numba"`` and ``"torch"`` allow no
            other engine.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: the backend asked for cannot run here; the message says what to do.
    """
    # Import statements, not importlib: torch.compile can trace them.
    check_backend(backend)
    if backend == "auto":
        backend = _best(device.type)
    if backend == "triton":
        _check_triton(device.type)
        from gq_triton import kernels

        return kernels
    if backend == "numba":
        _check_numba(device.type)
        from gq_triton.engines import compiled

        return compiled
    from gq_triton.engines import eager

    return eager


# From this many elements of one launch on, plain torch costs a step tens of milliseconds.
LARGE = 1_000_000


def note_plain_torch(device: torch.device, backend: str, tensors: Iterable[Tensor]) -> None:
    """Warn, once per process, where ``"auto"`` runs a large model on the CPU without Numba.

    Args:
        device: where the gradients are.
        backend: the backend asked for; only ``"auto"`` warns.
        tensors: the gradients of one launch.
    """
    if device.type != "cpu" or backend != "auto" or _installed("numba") or _noted:
        return
    if sum(tensor.numel() for tensor in tensors) < LARGE:
        return
    _noted.append(True)
    warnings.warn(
        "steps on the CPU run on plain torch, several times slower than with Numba: "
        f'{how_to_install("cpu")}, or pass backend="torch" to say that this is meant',
        RuntimeWarning,
        stacklevel=2,
    )


_noted: list[bool] = []


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _best(device_type: str) -> str:
    if device_type == "cuda" and _installed("triton"):
        return "triton"
    if device_type == "cpu" and _installed("numba"):
        return "numba"
    return "torch"


def _check_triton(device_type: str) -> None:
    if not _installed("triton"):
        raise RuntimeError(
            'backend="triton" needs the package triton: install it, or use backend="auto"'
        )
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            'backend="triton" needs a GPU, got tensors on cpu: use backend="auto", '
            "or set TRITON_INTERPRET=1 before you start Python, to interpret the kernels (slow)"
        )


def _check_numba(device_type: str) -> None:
    if device_type != "cpu":
        raise RuntimeError(f'backend="numba" runs on the CPU, got tensors on {device_type}')
    if not _installed("numba"):
        raise RuntimeError(
            f'backend="numba" needs the package numba: {how_to_install("cpu")}, '
            'or use backend="auto"'
        )
