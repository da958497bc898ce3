"""The commands that install the package's optional dependencies, its extras."""

__all__ = ["how_to_install"]


def how_to_install(extra: str) -> str:
    """Return the words with which a message tells how to install an extra.

    The package is on no package index, so the command is for a checkout.

    Args:
        extra: a key of ``[project.optional-dependencies]`` in pyproject.toml.

    Example:
        >>> print(how_to_install("cpu"))
        pip install ".[cpu]" in a checkout of gq_triton
    """
    return f'pip install ".[{extra}]" in a checkout of gq_triton'
