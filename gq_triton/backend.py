"""Which engine runs an operation: the only module that asks whether Triton or Numba can run.

Three engines offer the same functions (``all_finite``, ``weigh_``, ``gqsgd_``, ``gqadamw_``,
``combine``, ``queue_statistics``, ``push_``, ``position_sums``, ``channel_sums``): ``kernels``
(Triton), ``compiled`` (Numba, CPU) and ``eager`` (plain torch, any device).
"""

import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

__all__ = ["BACKENDS", "check_backend", "engine"]

BACKENDS = ("auto", "triton", "numba", "torch")


def check_backend(backend: str) -> None:
    """Raise a ValueError unless ``backend`` is one of ``BACKENDS``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def engine(device: torch.device, backend: str = "auto") -> ModuleType:
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
        from gq_triton import compiled

        return compiled
    from gq_triton import eager

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
