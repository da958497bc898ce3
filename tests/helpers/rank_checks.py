"""The test ids of the checks that run on all ranks, one for each check."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


def checks(
    functions: Sequence[Callable[..., None]], rare: Sequence[Callable[..., None]] = ()
) -> pytest.MarkDecorator:
    """Parametrise ``check``: the id of ``check_join`` is ``join``, and ``-k join`` finds it.

    Args:
        functions: the checks.
        rare: those of them that are left to make test-all.
    """
    cases = [
        pytest.param(
            function,
            id=function.__name__.removeprefix("check_"),
            marks=[pytest.mark.rare] if function in rare else [],
        )
        for function in functions
    ]
    return pytest.mark.parametrize("check", cases)


def folder_for(check: Callable[..., None], folder: Path) -> tuple[str, ...]:
    """Return the arguments of a check after its rank: a folder, if it takes one."""
    return (str(folder),) if "folder" in inspect.signature(check).parameters else ()
