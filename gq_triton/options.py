"""The options of the law."""

__all__ = ["BACKENDS", "check_backend", "check_rho"]

BACKENDS = ("auto", "triton", "numba", "torch")


def check_rho(rho: float) -> None:
    """Raise a ValueError unless ``rho`` is a finite number of at least 1."""
    if not isinstance(rho, (int, float)) or not 1 <= rho <= 1e30:
        raise ValueError(f"rho must be a finite number >= 1 (1 switches the law off), got {rho!r}")


def check_backend(backend: str) -> None:
    """Raise a ValueError unless ``backend`` is one of ``BACKENDS``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
