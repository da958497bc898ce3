"""The options of launch/train.py: their help, their limits, and their values in a resumed run."""

import argparse
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gq_triton.commands.refusal import Parser, Refusal
from gq_triton.keywords import help_of
from gq_triton.options import LONGEST, ClusterOptions, LawOptions, Options
from gq_triton.saved.rules import Also, Flag, Integer, Maybe, Number, OneOf, Record, Rule, Text

__all__ = ["DEFAULTS", "choose_settings", "parse_options", "settings_rule"]

# The settings of a run, which every checkpoint holds. None for the learning rate and the momentum
# stands for the default of the chosen optimizer.
DEFAULTS: dict[str, Any] = {
    "task": "digits",
    "optimizer": "sgd",
    "lr": None,
    "momentum": None,
    "weight_decay": 1e-4,
    "epochs": 30,
    "batch_size": 128,
    "seed": 0,
    "n_clusters": None,
    "features": None,
    "queue_length": 5,
    "min_queue_length": 3,
    "rho": 3.0,
    "loss_window": None,
    "match_norm": False,
}
LEARNING_RATES = {"sgd": 0.07, "adamw": 3e-3}
MOMENTUM = 0.9


def _whole(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    limits = f">= {lowest}" if highest is None else f"from {lowest} to {highest}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}, got {text!r}")
        return value

    return read


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("must name a folder, got nothing")
    return Path(text)


def _at_least_0(text: str) -> float:
    value = _number(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a finite number >= 0, got {text!r}")
    return value


def _below_1(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text!r}")
    return value


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "none" else read(text)


def parse_options(argv: Sequence[str] | None, tasks: Collection[str]) -> dict[str, Any]:
    """Return the options that were given, and only those.

    Args:
        argv: the command line without the program; None reads the process's own.
        tasks: names of the tasks.

    Raises:
        Refusal: an option is unknown, or a value is not allowed.
        SystemExit: after ``--help``.
    """
    parser = Parser(
        prog="train.py",
        description="Train a task with Grad Queue under DistributedDataParallel. Start it with "
        "torchrun for several processes: torchrun --nproc-per-node=2 launch/train.py --out DIR",
        epilog="DIR receives metrics.jsonl (a line per step and per epoch), summary.json, "
        "curves.png and checkpoints/. The same options, seed and number of processes give the "
        "same run, bit for bit. A bad value ends with one line and exit code 2.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    folder = parser.add_argument_group("where")
    folder.add_argument(
        "--out",
        type=_folder,
        metavar="DIR",
        help="folder for a new run; made here. Processes that torchrun starts again after one died "
        "continue the run in it",
    )
    folder.add_argument(
        "--resume",
        type=_folder,
        metavar="DIR",
        help="continue the run in DIR from its newest checkpoint, with its own options; bit for "
        "bit with the same number of processes",
    )
    folder.add_argument(
        "--checkpoint-every",
        type=_whole(1),
        metavar="STEPS",
        help="steps between checkpoints, of which the last two are kept (default: an epoch)",
    )
    folder.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="auto takes a GPU per process where there are enough, else the CPU (default: auto)",
    )

    training = parser.add_argument_group("training")

    def option(group: Any, flag: str, help: str, default: str | None = None, **rest: Any) -> None:
        value = DEFAULTS[flag.removeprefix("--").replace("-", "_")]
        shown = default or ("none" if value is None else value)
        group.add_argument(flag, help=f"{help} (default: {shown})", **rest)

    option(training, "--task", "data and model; digits: 8 x 8 handwritten digits", choices=[*tasks])
    option(training, "--optimizer", "torch.optim.SGD or AdamW", choices=[*LEARNING_RATES])
    option(
        training,
        "--lr",
        "highest learning rate; it falls to 0 along half a cosine",
        default=", ".join(f"{lr} with {name}" for name, lr in LEARNING_RATES.items()),
        type=_at_least_0,
    )
    option(training, "--momentum", "momentum of sgd", default=str(MOMENTUM), type=_below_1)
    option(training, "--weight-decay", "weight decay of the optimizer", type=_at_least_0)
    option(training, "--epochs", "passes over the training data", type=_whole(1), metavar="N")
    option(
        training,
        "--batch-size",
        "samples per step over ALL processes; each takes its share",
        type=_whole(1),
        metavar="N",
    )
    option(
        training,
        "--seed",
        "seed of the initial weights, the order of the data and dropout; the test split never "
        "depends on it",
        type=_whole(0, 2**31 - 1),
        metavar="N",
    )

    queue = parser.add_argument_group("Grad Queue")

    def own(kind: type[Options], flag: str, default: str | None = None, **rest: Any) -> None:
        """Add an option of Grad Queue, whose sentence is that of every other door."""
        sentence = help_of(kind, flag.removeprefix("--").replace("-", "_"))
        spoken = sentence.replace("`", "").replace("None", "none").rstrip(".")
        option(queue, flag, spoken, default, **rest)

    own(ClusterOptions, "--n-clusters", type=_or_none(_whole(1)), metavar="K")
    own(ClusterOptions, "--features", default="the task's own", metavar="LAYER")
    own(LawOptions, "--queue-length", type=int, metavar="L")
    own(LawOptions, "--min-queue-length", type=int, metavar="N")
    own(LawOptions, "--rho", type=_number)
    own(LawOptions, "--loss-window", type=_or_none(_whole(1)), metavar="N")
    own(LawOptions, "--match-norm", default="no", action=argparse.BooleanOptionalAction)
    return vars(parser.parse_args(argv))


def settings_rule(tasks: Collection[str]) -> Rule:
    """Return the rule of the settings in a checkpoint: a value for every name in ``DEFAULTS``.

    Args:
        tasks: names of the tasks.
    """
    length = Integer(1, LONGEST)
    rules: dict[str, Rule] = {
        "task": OneOf(tasks),
        "optimizer": OneOf(LEARNING_RATES.keys()),
        "lr": Number(0),
        "momentum": Maybe(Number(0, below=1)),
        "weight_decay": Number(0),
        "epochs": Integer(1),
        "batch_size": Integer(1),
        "seed": Integer(0, 2**31 - 1),
        "n_clusters": Maybe(Integer(1)),
        "features": Maybe(Text()),
        "queue_length": length,
        "min_queue_length": length,
        "rho": Number(1, 1e30),
        "loss_window": Maybe(length),
        "match_norm": Flag(),
    }

    def contradicts(settings: Mapping[str, Any]) -> str | None:
        if (settings["optimizer"] == "sgd") != (settings["momentum"] is not None):
            return "momentum of settings must be None with every optimizer but sgd, and only there"
        return None

    return Also(Record(rules, unknown="that this train.py does not know"), contradicts)


def choose_settings(given: dict[str, Any], saved: dict[str, Any] | None) -> dict[str, Any]:
    """Return a value for every name in ``DEFAULTS``: the given one, the saved one or the default.

    Args:
        given: what ``parse_options`` returned.
        saved: the settings of the run to continue, None for a new one.

    Raises:
        Refusal: an option contradicts the saved run or the optimizer.
    """
    given = {name: value for name, value in given.items() if name in DEFAULTS}
    if saved is not None:
        for name, value in given.items():
            if value != saved[name]:
                raise Refusal(
                    f"--{name.replace('_', '-')} is {saved[name]} in the run to resume, got "
                    f"{value}: leave it out, or start a new run with --out"
                )
        return dict(saved)
    settings = DEFAULTS | given
    if settings["optimizer"] != "sgd" and "momentum" in given:
        raise Refusal(f"--momentum is for sgd, got --optimizer {settings['optimizer']}")
    if settings["lr"] is None:
        settings["lr"] = LEARNING_RATES[settings["optimizer"]]
    if settings["momentum"] is None and settings["optimizer"] == "sgd":
        settings["momentum"] = MOMENTUM
    return settings
