"""The choice of the engine: no other module asks whether Triton or Numba can run.

Three engines offer the operations of ``engines.protocol``: ``gq_triton.kernels`` (Triton),
``engines.compiled`` (Numba, CPU) and ``engines.eager`` (plain torch, any device).
"""

import importlib.util
import os
from functools import cache

import torch

from gq_triton.engines.protocol import Engine
from gq_triton.options import check_backend

__all__ = ["Engine", "engine"]


def engine(device: torch.device, backend: str = "auto") -> Engine:
    """Return the module that runs the operations on ``device``.

    Args:
        device: where the gradients are.
        backend: ``"auto"`` takes Triton on a GPU it supports, Numba on the CPU where it is
            installed, and plain torch otherwise; ``"triton"``, ``"numba"`` and ``"torch"`` insist.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: the backend asked for cannot run here; the message says what to do.
    """
    # Imports as statements: torch.compile can trace those.
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
            "or set TRITON_INTERPRET=1 before Python starts to interpret the kernels (slow)"
        )


def _check_numba(device_type: str) -> None:
    if device_type != "cpu":
        raise RuntimeError(f'backend="numba" runs on the CPU, got tensors on {device_type}')
    if not _installed("numba"):
        raise RuntimeError(
            'backend="numba" needs the package numba: pip install "gq_triton[cpu]", '
            'or use backend="auto"'
        )
