"""The options of a study: each once, with its type, its limits and its sentence of help."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.arms import ARMS
from gq_triton.study.design.commanded import COMMAND, check_command, command_entry
from gq_triton.study.design.controls import CONTROLS, Control
from gq_triton.tasks import STUDY_TASKS, StudyTask, study_task

__all__ = ["DEVICES", "FIRST_TUNING_SEED", "StudyConfig", "flag"]

DEVICES = "cpu", "cuda"
SCHEDULES = "cosine", "constant"
FIRST_TUNING_SEED = 1_000_000  # every evaluation seed is smaller


def _option(default: Any, help: str, before: Any = None) -> Any:
    """Return a field of ``StudyConfig``.

    Args:
        default: its default.
        help: its sentence of help.
        before: the value, as in TOML, that was fixed in studies before the option existed; None if
            it is the default.
    """
    return field(default=default, metadata={"help": help, "before": before})


@dataclass(frozen=True)
class StudyConfig:
    """The options that decide a study's results, under their names on the command line."""

    tasks: tuple[str, ...] = _option(
        (), "tasks, see the list below; module:function: one of your own"
    )
    arms: tuple[str, ...] = _option((), "arms, see the list below")
    batch_sizes: tuple[int, ...] = _option((), "the ladder of batch sizes")
    trials: int = _option(
        8,
        "tuning trials per task, arm and batch size, points of one Sobol sequence, which powers of "
        "2 fill evenly; below 8 there is no verdict",
    )
    tuning_seeds: int = _option(
        3,
        "seeds per tuning trial, none of them an evaluation seed; with 1 a lucky run decides",
    )
    seeds: int = _option(
        10, "evaluation seeds, the same for every arm, at least 2; below 10 there is no verdict"
    )
    first_seed: int = _option(
        0, "the first evaluation seed; to confirm an earlier study take seeds that it has not used"
    )
    steps: int = _option(300, "optimizer steps of every trial")
    schedule: str = _option(
        "cosine", "learning rate over a trial: cosine falls to 0, constant stays"
    )
    eval_every: int = _option(0, "steps between looks at the validation data; 0: 50 looks per run")
    controls: tuple[str, ...] = _option(
        tuple(CONTROLS), "what each Grad Queue arm is compared with, see the list below; none: none"
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
        "values of beta1 that every arm is tuned over; with SGD they are values of the momentum",
        before=[0.9],
    )
    warmup: tuple[float, ...] = _option(
        (0.0, 0.15),
        "lengths of the warm-up that every arm is tuned over, as shares of the steps",
        before=[0.0],
    )
    rho: tuple[float, ...] = _option(
        (1.5, 6.0), "lowest and highest rho tried by Grad Queue arms; twice the same: fixed"
    )
    queue_length: tuple[int, ...] = _option(
        (3, 4, 5), "queue lengths that Grad Queue arms are tuned over; the paper has 3 to 5"
    )
    nproc_per_trial: int = _option(
        1,
        "processes that share each batch of a trial, under torchrun, with Grad Queue in the DDP "
        "hook; each process finds its share of the K clusters, rounded down, at least one, among "
        "its own samples; arms and controls that would change the hook are left out",
    )
    device: str = _option(
        "cpu",
        "cpu or cuda, whose results differ; --jobs are spread over the GPUs, and each process of "
        "--nproc-per-trial has a GPU of its own",
    )
    command: str = _option(
        "",
        "your own training in place of a task: a command with names in braces, such as 'python "
        "train.py --lr {lr} --seed {seed}', which prints its scores as a line of JSON; see "
        "docs/own_study.md",
    )
    score: str = _option("score", "of --command: the name of what is compared, for the report")
    better: str = _option("higher", "of --command: higher or lower, whichever score is better")
    targets: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "score of 'steps to target', by task, in place of the one listed below"},
    )

    def __post_init__(self) -> None:
        if self.command and not self.tasks:
            object.__setattr__(self, "tasks", (COMMAND,))
        # The task of a command is known by the command alone.
        known_tasks = {**STUDY_TASKS, COMMAND: None} if self.command else STUDY_TASKS
        for name, known in (("tasks", known_tasks), ("arms", ARMS), ("controls", CONTROLS)):
            _check_names(name, getattr(self, name), known)
        self._check_lists()
        lowest = {"trials": 1, "tuning_seeds": 1, "seeds": 2, "first_seed": 0, "steps": 1,
                  "eval_every": 0, "optimal_batch": 0, "nproc_per_trial": 1}  # fmt: skip
        for name, least in lowest.items():
            _check_whole(name, getattr(self, name), least)
        for size in self.batch_sizes:
            _check_whole("batch_sizes", size, 1)
        for length in self.queue_length:
            _check_whole("queue_length", length, 2)
        self._check_seeds()
        self._check_ranks()
        if self.schedule not in SCHEDULES:
            raise Refusal(f"--schedule must be one of {_list(SCHEDULES)}, got {self.schedule!r}")
        if self.device not in DEVICES:
            raise Refusal(f"--device must be one of {_list(DEVICES)}, got {self.device!r}")
        for name in ("lr_sgd", "lr_adam"):
            _check_range(name, getattr(self, name))
        self._check_settings()
        check_command(self)
        _check_names("targets", tuple(self.targets), known_tasks)
        for task, value in self.targets.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise Refusal(f"--target {task} must be a number, got {value!r}")

    def _check_lists(self) -> None:
        for name in ("tasks", "arms", "batch_sizes", "beta1", "warmup", "queue_length"):
            if not getattr(self, name):
                raise Refusal(f"--{flag(name)} needs at least one value")
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise Refusal(f"--{flag(name)} names one value twice: {_list(getattr(self, name))}")

    def _check_seeds(self) -> None:
        if self.first_seed + self.seeds > FIRST_TUNING_SEED:
            raise Refusal(
                f"--first-seed plus --seeds must be at most {FIRST_TUNING_SEED}, where the tuning "
                f"seeds begin, got {self.first_seed} and {self.seeds}"
            )

    def _check_settings(self) -> None:
        if len(self.rho) != 2 or not 1 < self.rho[0] <= self.rho[1] < math.inf:
            raise Refusal(f"--rho must be two numbers, 1 < LOW <= HIGH, got {_list(self.rho)}")
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
        """The number of steps between two looks at the validation data."""
        return self.eval_every or max(1, self.steps // 50)

    @property
    def best_batch(self) -> int:
        """B_opt of the paper's rule K = B / B_opt."""
        return self.optimal_batch or min(self.batch_sizes)

    def entry(self, task: str) -> StudyTask:
        """Return what is known of a task before its data is read."""
        return command_entry(self) if task == COMMAND else study_task(task)

    def can_run(self, control: Control, name: str) -> bool:
        """Return whether the command can run a control: the optimizer without Grad Queue can."""
        return control.plain and (name != "lower-momentum" or "{beta1}" in self.command)

    def target(self, task: str) -> float:
        """Return the validation score of a task's "steps to target"."""
        return self.targets.get(task, self.entry(task).target)

    def lr_range(self, family: str) -> tuple[float, float]:
        """Return the range of learning rates of ``"sgd"`` or ``"adam"``."""
        low, high = self.lr_sgd if family == "sgd" else self.lr_adam
        return low, high

    @property
    def rho_range(self) -> tuple[float, float]:
        """The range of rho."""
        low, high = self.rho
        return low, high

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "StudyConfig":
        """Return the options with these values.

        Args:
            values: by name, with dashes or underscores; lists stand for tuples.

        Raises:
            Refusal: a name is unknown, or a value is not allowed.
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
        """Return the options as plain values by name."""
        return asdict(self)


def flag(name: str) -> str:
    """Return the option of the command line, without its dashes, that sets a field."""
    return name.replace("_", "-")


def _list(values: Any) -> str:
    return ", ".join(map(str, values))


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Return a value from TOML, converted to the type of its field."""
    if kind == dict[str, float]:
        if not isinstance(value, Mapping):
            raise Refusal(f"{name} must be a table of numbers by task, got {value!r}")
        return dict(value)
    if kind in (int, str):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Refusal(f"--{flag(name)} must be {_KINDS[kind]}, got {value!r}")
        return value
    (item, _) = kind.__args__
    if not isinstance(value, (list, tuple)):
        raise Refusal(f"--{flag(name)} must be a list, got {value!r}")
    for one in value:
        number = item is float and isinstance(one, int)
        if isinstance(one, bool) or not (isinstance(one, item) or number):
            raise Refusal(f"--{flag(name)} must hold {_KINDS[item]} each, got {one!r}")
    return tuple(item(one) for one in value)


_KINDS = {int: "a whole number", str: "a text", float: "a number"}


def _check_names(option: str, names: tuple[str, ...], known: Mapping[str, Any]) -> None:
    for name in names:
        if option in ("tasks", "targets") and ":" in name:
            study_task(name)  # or a refusal
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            listed = f"did you mean {' or '.join(near)}? There" if near else "there"
            raise Refusal(f"--{flag(option)}: no {name!r}; {listed} are {_list(known)}")


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise Refusal(f"--{flag(name)} must be a whole number >= {least}, got {value!r}")


def _check_range(name: str, values: tuple[float, ...]) -> None:
    if len(values) != 2 or not 0 < values[0] < values[1] < math.inf:
        raise Refusal(f"--{flag(name)} must be two numbers, 0 < LOW < HIGH, got {_list(values)}")
