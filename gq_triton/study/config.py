"""What a study is: every option once, with its type, its limits and its sentence of help."""

import difflib
import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gq_triton.study.arms import ARMS
from gq_triton.study.controls import CONTROLS
from gq_triton.study.device import DEVICES
from gq_triton.tasks import STUDY_TASKS
from gq_triton.training.options import Refusal

__all__ = [
    "CONFIG",
    "FIRST_TUNING_SEED",
    "StudyConfig",
    "command_line",
    "read_toml",
    "write_toml",
]

CONFIG = "study.toml"  # in the folder of a study
SCHEDULES = "cosine", "constant"
FIRST_TUNING_SEED = 1_000_000  # evaluation seeds lie below: they never meet


def _option(default: Any, help: str, before: Any = None) -> Any:
    """Return a field; ``before`` is what studies did that were written before it existed."""
    return field(default=default, metadata={"help": help, "before": before})


@dataclass(frozen=True)
class StudyConfig:
    """Everything that decides a study's results; field names are those of the options."""

    tasks: tuple[str, ...] = _option((), "tasks, see the list below")
    arms: tuple[str, ...] = _option((), "arms, see the list below")
    batch_sizes: tuple[int, ...] = _option((), "the ladder of batch sizes")
    trials: int = _option(
        8,
        "tuning trials per task, arm and batch size, points of one Sobol sequence; 2^k fill it",
    )
    tuning_seeds: int = _option(
        3,
        "seeds that a tuning trial is the mean of, never evaluated on; with 1 a lucky run decides",
    )
    seeds: int = _option(
        10, "evaluation seeds, the same for every arm, at least 2; below 10 the intervals are poor"
    )
    first_seed: int = _option(
        0, "the first of them; a study that repeats another takes seeds nobody has looked at"
    )
    steps: int = _option(300, "optimizer steps of every trial")
    schedule: str = _option(
        "cosine", "learning rate over a trial: cosine falls to 0, constant stays"
    )
    eval_every: int = _option(0, "steps between looks at the validation data; 0: 50 looks per run")
    controls: tuple[str, ...] = _option(
        tuple(CONTROLS), "what each Grad Queue arm is held against, see the list below; none: none"
    )
    optimal_batch: int = _option(
        0, "B_opt of the rule K = B / B_opt of the cluster arms; 0: the smallest batch size"
    )
    lr_sgd: tuple[float, ...] = _option(
        (1e-3, 3.0), "lowest and highest learning rate tried with SGD and its kin"
    )
    lr_adam: tuple[float, ...] = _option(
        (1e-4, 0.1), "lowest and highest learning rate tried with Adam and its kin"
    )
    beta1: tuple[float, ...] = _option(
        (0.5, 0.7, 0.8, 0.9, 0.95),
        "values of beta1 that every arm is tuned over, with SGD of the momentum",
        before=[0.9],
    )
    warmup: tuple[float, ...] = _option(
        (0.0, 0.15),
        "shares of the steps in which the learning rate rises first, that every arm is tuned over",
        before=[0.0],
    )
    nproc_per_trial: int = _option(
        1,
        "processes that share each batch of a trial, under torchrun, Grad Queue through the DDP "
        "hook; each finds its share of the K clusters, rounded down, at least one, among its own "
        "samples; without arms and controls that change weights or queue inside the hook",
    )
    device: str = _option(
        "cpu",
        "where trials compute, cpu or cuda: the results of one are not those of the other; --jobs "
        "are spread over the GPUs, and the processes of --nproc-per-trial have one each",
    )
    targets: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "score of 'steps to target', by task, in place of the one listed below"},
    )

    def __post_init__(self) -> None:
        for name, known in (("tasks", STUDY_TASKS), ("arms", ARMS), ("controls", CONTROLS)):
            _check_names(name, getattr(self, name), known)
        for name in ("tasks", "arms", "batch_sizes", "beta1", "warmup"):
            if not getattr(self, name):
                raise Refusal(f"--{_flag(name)} needs at least one value")
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise Refusal(
                    f"--{_flag(name)} names one value twice: {_list(getattr(self, name))}"
                )
        lowest = {"trials": 1, "tuning_seeds": 1, "seeds": 2, "first_seed": 0, "steps": 1,
                  "eval_every": 0, "optimal_batch": 0, "nproc_per_trial": 1}  # fmt: skip
        for name, least in lowest.items():
            _check_whole(name, getattr(self, name), least)
        for size in self.batch_sizes:
            _check_whole("batch_sizes", size, 1)
        self._check_seeds()
        self._check_ranks()
        if self.schedule not in SCHEDULES:
            raise Refusal(f"--schedule must be one of {_list(SCHEDULES)}, got {self.schedule!r}")
        if self.device not in DEVICES:
            raise Refusal(f"--device must be one of {_list(DEVICES)}, got {self.device!r}")
        for name in ("lr_sgd", "lr_adam"):
            _check_range(name, getattr(self, name))
        self._check_momentum()
        _check_names("targets", tuple(self.targets), STUDY_TASKS)
        for task, value in self.targets.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise Refusal(f"--target {task} must be a number, got {value!r}")

    def _check_seeds(self) -> None:
        if self.first_seed + self.seeds > FIRST_TUNING_SEED:
            raise Refusal(
                f"--first-seed plus --seeds must be at most {FIRST_TUNING_SEED}, where the tuning "
                f"seeds begin, got {self.first_seed} and {self.seeds}"
            )

    def _check_momentum(self) -> None:
        # Nesterov's momentum must not be 0.
        if not all(0 < value < 1 for value in self.beta1):
            raise Refusal(f"--beta1 must be numbers, 0 < VALUE < 1, got {_list(self.beta1)}")
        if not all(0 <= value < 1 for value in self.warmup):
            raise Refusal(f"--warmup must be numbers, 0 <= VALUE < 1, got {_list(self.warmup)}")

    def _check_ranks(self) -> None:
        if self.nproc_per_trial == 1:
            return
        for name in self.arms:
            if ARMS[name].law.kind not in ("none", "queue"):
                raise Refusal(f"arm {name} runs in one process: leave out --nproc-per-trial")
        if min(self.batch_sizes) < self.nproc_per_trial:
            raise Refusal(
                f"--batch-sizes must be at least --nproc-per-trial, got {min(self.batch_sizes)} "
                f"for {self.nproc_per_trial} processes"
            )

    @property
    def looks_every(self) -> int:
        """Steps between looks at the validation data."""
        return self.eval_every or max(1, self.steps // 50)

    @property
    def best_batch(self) -> int:
        """B_opt of the paper's rule."""
        return self.optimal_batch or min(self.batch_sizes)

    def target(self, task: str) -> float:
        """Return the score whose first step counts."""
        return self.targets.get(task, STUDY_TASKS[task].target)

    def lr_range(self, family: str) -> tuple[float, float]:
        """Return the range of learning rates of ``"sgd"`` or ``"adam"``."""
        low, high = self.lr_sgd if family == "sgd" else self.lr_adam
        return low, high

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "StudyConfig":
        """Build from plain values: lists for tuples, dashes or underscores in names.

        Raises:
            Refusal: an unknown name or a value that cannot hold.
        """
        known = {option.name: option for option in fields(cls)}
        chosen: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in known:
                raise Refusal(f"{key!r} is no option of a study; there are {_list(known)}")
            chosen[name] = _typed(name, value, known[name].type)
        return cls(**chosen)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _list(values: Any) -> str:
    return ", ".join(map(str, values))


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Return a value from TOML in the type of its field."""
    if kind == dict[str, float]:
        if not isinstance(value, Mapping):
            raise Refusal(f"{name} must be a table of numbers by task, got {value!r}")
        return dict(value)
    if kind in (int, str):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Refusal(f"--{_flag(name)} must be {_KINDS[kind]}, got {value!r}")
        return value
    (item, _) = kind.__args__
    if not isinstance(value, (list, tuple)):
        raise Refusal(f"--{_flag(name)} must be a list, got {value!r}")
    for one in value:
        number = item is float and isinstance(one, int)
        if isinstance(one, bool) or not (isinstance(one, item) or number):
            raise Refusal(f"--{_flag(name)} must hold {_KINDS[item]} each, got {one!r}")
    return tuple(item(one) for one in value)


_KINDS = {int: "a whole number", str: "a text", float: "a number"}


def _check_names(option: str, names: tuple[str, ...], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            listed = f"did you mean {' or '.join(near)}? There" if near else "there"
            raise Refusal(f"--{_flag(option)}: no {name!r}; {listed} are {_list(known)}")


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise Refusal(f"--{_flag(name)} must be a whole number >= {least}, got {value!r}")


def _check_range(name: str, values: tuple[float, ...]) -> None:
    if len(values) != 2 or not 0 < values[0] < values[1] < math.inf:
        raise Refusal(f"--{_flag(name)} must be two numbers, 0 < LOW < HIGH, got {_list(values)}")


def read_toml(path: Path) -> dict[str, Any]:
    """Return the options in a file.

    What a study wrote has every option there was. One that came later has the value which stands
    for what was done before, so that the study stays what it was.

    Raises:
        Refusal: it cannot be read.
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


# Those of the first release of the studies, each in every file that a study wrote.
_FIRST_OPTIONS = {
    "tasks", "arms", "batch_sizes", "trials", "tuning_seeds", "seeds", "steps", "schedule",
    "eval_every", "controls", "optimal_batch", "lr_sgd", "lr_adam",
}  # fmt: skip


def write_toml(config: StudyConfig) -> str:
    """Return the options as the text of a file that ``read_toml`` reads."""
    lines = [f"{name} = {_value(value)}" for name, value in config.to_dict().items()
             if not isinstance(value, dict)]  # fmt: skip
    lines += ["", "[targets]", *(f"{task} = {value!r}" for task, value in config.targets.items())]
    return "\n".join(lines) + "\n"


def command_line(config: StudyConfig, folder: str) -> str:
    """Return the command that runs a study, with the options that differ from their defaults."""
    words = ["gq-triton", "study", "run", "--out", folder]
    for option in fields(StudyConfig):
        value = getattr(config, option.name)
        default = {} if option.name == "targets" else option.default
        if value == default:
            continue
        if isinstance(value, dict):
            words += ["--target", *(f"{task}={number!r}" for task, number in value.items())]
        elif isinstance(value, tuple):
            words += [f"--{_flag(option.name)}", *(map(str, value) if value else ("none",))]
        else:
            words += [f"--{_flag(option.name)}", str(value)]
    return shlex.join(words)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    # Names hold no character that TOML would escape.
    return f'"{value}"' if isinstance(value, str) else repr(value)
