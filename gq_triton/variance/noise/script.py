"""A user's own training script, run with the meter on the model that it trains."""

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gq_triton.variance.noise.meter import NoiseScale

__all__ = ["run_script"]


def run_script(
    script: Path, arguments: Sequence[str], kind: str | None, meter_of: Callable[..., NoiseScale]
) -> tuple[NoiseScale | None, BaseException | None]:
    """Run a script as the main program, with a meter on its model.

    The model is the first module that is called with gradients, outside of any other call, and has
    parameters to train. Its first forward pass is not counted.

    Args:
        script: the script.
        arguments: its arguments.
        kind: name of the model's class; None takes the first model.
        meter_of: makes the meter of a model.

    Returns:
        The meter, or None where no such model was called; and what ended the script, or None.
    """
    found: list[NoiseScale] = []

    def look(module: nn.Module, args: Any) -> None:
        fits = kind is None or kind in (type(module).__name__, _inside(module))
        if found or not fits or not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportAttributeAccessIssue]
            return
        if any(param.requires_grad for param in module.parameters()):
            found.append(meter_of(module))
            handle.remove()

    handle = register_module_forward_pre_hook(look)
    saved, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    ended: BaseException | None = None
    try:
        runpy.run_path(str(script), run_name="__main__")
    except (Exception, SystemExit, KeyboardInterrupt) as reason:  # noqa: BLE001  # raised again later
        ended = reason
    finally:
        handle.remove()
        sys.argv, sys.path[:] = saved, path
    return (found[0] if found else None), ended


def _inside(module: nn.Module) -> str:
    """Return the class of the model inside DDP or a compiled module."""
    inner = getattr(module, "module", getattr(module, "_orig_mod", module))
    return type(inner).__name__
