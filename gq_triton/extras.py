"""How to install what this package needs only for a part of its work."""

__all__ = ["how_to_install"]


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra, as a message says it.

    The package is on no index yet, so the command works in a checkout.

    Args:
        extra: a key of ``[project.optional-dependencies]`` in pyproject.toml.

    Example:
        >>> print(how_to_install("cpu"))
        pip install ".[cpu]" in a checkout of gq_triton
    """
    return f'pip install ".[{extra}]" in a checkout of gq_triton'
