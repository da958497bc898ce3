"""A study's options as text: ``study.toml``, and the command that runs the study."""

import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.config import StudyConfig, flag

__all__ = ["CONFIG", "command_line", "read_toml", "write_toml"]

CONFIG = "study.toml"  # in the folder of a study


def read_toml(path: Path) -> dict[str, Any]:
    """Return the options in a file.

    A file that a study has written holds every option that existed then. Options that were added
    later get the values that were fixed before, so that the study keeps its trials.

    Raises:
        Refusal: the file cannot be read, or is no TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports]
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Refusal(f"{path} is no TOML: {error}") from error
    before = {option.name: option.metadata.get("before") for option in fields(StudyConfig)}
    if values.keys() >= _FIRST_OPTIONS:
        values = {name: past for name, past in before.items() if past is not None} | values
    return values


# The options of the first release: every file that a study has written holds all of them.
_FIRST_OPTIONS = {
    "tasks", "arms", "batch_sizes", "trials", "tuning_seeds", "seeds", "steps", "schedule",
    "eval_every", "controls", "optimal_batch", "lr_sgd", "lr_adam",
}  # fmt: skip


def write_toml(config: StudyConfig) -> str:
    """Return the text of a file from which ``read_toml`` reads these options."""
    lines = [f"{name} = {_value(value)}" for name, value in config.to_dict().items()
             if not isinstance(value, dict)]  # fmt: skip
    lines += [
        "",
        "[targets]",
        *(f"{_value(task)} = {value!r}" for task, value in config.targets.items()),
    ]
    return "\n".join(lines) + "\n"


def command_line(config: StudyConfig, folder: str) -> str:
    """Return the command that runs a study; options at their defaults are left out."""
    words = ["gq-triton", "study", "run", "--out", folder]
    for option in fields(StudyConfig):
        value = getattr(config, option.name)
        default = {} if option.name == "targets" else option.default
        if value == default or (option.name == "tasks" and config.command):
            continue
        if isinstance(value, dict):
            words += ["--target", *(f"{task}={number!r}" for task, number in value.items())]
        elif isinstance(value, tuple):
            words += [f"--{flag(option.name)}", *(map(str, value) if value else ("none",))]
        else:
            words += [f"--{flag(option.name)}", str(value)]
    return shlex.join(words)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
