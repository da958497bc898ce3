"""The submodule that ``features`` names, found or asked for in one sentence."""

import difflib
from typing import Any

from torch import nn

from gq_triton.options import OUTPUT_GRADIENT, shown

__all__ = ["check_features"]

# Names that a message offers at most.
_OFFERED = 4


def check_features(model: nn.Module, features: Any) -> None:
    """Raise a ValueError unless ``features`` names a submodule that has an output.

    The message offers names: near ones for a name that no submodule has, the last layers of a
    container, and otherwise the outermost layers.

    Args:
        model: the bare model; its submodules have the names that may be given.
        features: what was given for the option.

    Examples:
        >>> check_features(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "2")
        Traceback (most recent call last):
        ...
        ValueError: features='2' is no submodule of the model: name one such as '0', '1'
    """
    if isinstance(features, str) and features in ("", OUTPUT_GRADIENT):
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(features, str):
        found = [name for name, module in modules.items() if module is features and name]
        meant = f": give its name, {found[0]!r}" if found else ""
        raise ValueError(f"features must be the name of a submodule, got {shown(features)}{meant}")
    if features not in modules:
        raise ValueError(
            f"features={features!r} is no submodule of the model: {_advice(modules, features)}"
        )
    layer = modules[features]
    if not _computes(layer):
        within = {name: m for name, m in modules.items() if name.startswith(f"{features}.")}
        raise ValueError(
            f"features={features!r} is a {type(layer).__name__}, which is never called and so has "
            f"no output: {_such_as(_outermost(within) or _outermost(modules))}"
        )


def _computes(module: nn.Module) -> bool:
    """Return whether a module has a forward(), as a mere container of layers has not."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _advice(modules: dict[str, nn.Module], wrong: str) -> str:
    """Return which names could be meant by one that no submodule has."""
    names = [name for name, module in modules.items() if name and _computes(module)]
    # Wrappers put a word before every name, and a part of a name is easily left out.
    parts = [n for n in names if f".{n}".endswith(f".{wrong}") or f".{wrong}".endswith(f".{n}")]
    parts.sort(key=len, reverse=True)
    near = parts[:_OFFERED] or difflib.get_close_matches(wrong, names, n=_OFFERED)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return _such_as(_outermost(modules))


def _outermost(modules: dict[str, nn.Module]) -> list[str]:
    """Return the last names among those with the fewest dots, without containers."""
    names = [name for name, module in modules.items() if name and _computes(module)]
    least = min((name.count(".") for name in names), default=0)
    return [name for name in names if name.count(".") == least][-_OFFERED:]


def _such_as(names: list[str]) -> str:
    if not names:
        return f'the model has no submodule with an output, so use "" or "{OUTPUT_GRADIENT}"'
    return f"name one such as {', '.join(map(repr, names))}"
