"""What ``gq-triton variance`` runs: its options, the presets, and the trajectories of a grid."""

import hashlib
import itertools
import json
import math
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from gq_triton.commands.refusal import Refusal
from gq_triton.tasks import STUDY_TASKS
from gq_triton.tasks.random_features import STUDENT
from gq_triton.tasks.regression import LINEAR_REGRESSION

__all__ = ["PRESETS", "TASKS", "Plan", "Trajectory"]

RANDOM_FEATURES = "random-features"
TASKS = ChainMap({"linear-regression": LINEAR_REGRESSION}, STUDY_TASKS)
"""What can be trained, by name."""
# Options of which every combination is one group of trajectories, one for each seed.
GRID = ("lr", "ratios", "inputs", "teacher", "duplicates")

_MANY = 1e9  # a bound that no message names


def _option(default: Any, text: str, low: float, high: float = math.inf) -> Any:
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True)
class Plan:
    """The options of a call; a preset has its own defaults."""

    task: str = _option("digits", "task that is trained", 0)
    seeds: tuple[int, ...] = _option((0,), "seeds of data, weights and order of batches", 0, 2**31)
    steps: int = _option(3000, "steps of training", 1, 1e9)
    batch_size: int = _option(10, "samples of a batch, and clusters", 2, 1e9)
    lr: tuple[float, ...] = _option((0.01,), "learning rates", 1e-30, 1e30)
    drops: tuple[int, ...] = _option((), "steps from which the learning rate is a tenth", 1, 1e9)
    momentum: float = _option(0.0, "momentum of SGD", 0, 1)
    weight_decay: float = _option(0.0, "weight decay of SGD", 0, 1e30)
    log_every: int = _option(100, "steps between measurements", 1, 1e9)
    start: int = _option(10, "step of the first anchor and clusters", 1, 1e9)
    every: int = _option(1000, "steps between anchors, and between clusters", 1, 1e9)
    iterations: int = _option(3, "iterations of the clustering", 1, 1e6)
    draws: int = _option(0, "draws for a mean, and again for deviations; 0: exact", 0, 1e9)
    ratios: tuple[float, ...] = _option(
        (2.0,), f"random features: the student's {STUDENT} features per training sample", 1e-3, 500
    )
    inputs: tuple[int, ...] = _option((100,), "random features: dimensions of a sample", 1, 1e6)
    teacher: tuple[int, ...] = _option((100,), "random features: features of the teacher", 1, 1e6)
    duplicates: tuple[float, ...] = _option(
        (0.0,), "shares of the training set that are copies of its first 5 samples", 0, 1
    )
    appended: tuple[int, ...] = _option(
        (0, 0), "random training samples that are appended, and how many copies of each", 0, 1e9
    )
    mislabelled: float = _option(0.0, "share of the training set with random labels", 0, 1)
    augment: int = _option(
        0, "1: train on images shifted by up to 4 pixels, half of them mirrored", 0, 1
    )
    device: str = _option("cpu", "cpu or cuda", 0)

    def check(self) -> None:
        """Raise a Refusal that names the first option that cannot be."""
        if self.task not in TASKS:
            raise Refusal(f"--task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if self.device not in ("cpu", "cuda"):
            raise Refusal(f"--device must be cpu or cuda, got {self.device!r}")
        for option in fields(self):
            _check_value(option.name, getattr(self, option.name), option.metadata)
        if self.draws in (1, 2):
            raise Refusal(f"--draws must be 0 or at least 3, got {self.draws}")
        if self.start > self.steps or self.last_log < self.start:
            raise Refusal(
                "nothing would be measured: --steps must reach --log-every after --start, got "
                f"--steps {self.steps}, --log-every {self.log_every} and --start {self.start}"
            )
        plain = Plan()
        for name in ("ratios", "inputs", "teacher"):
            if self.task != RANDOM_FEATURES and getattr(self, name) != getattr(plain, name):
                raise Refusal(f"{flag(name)} needs --task {RANDOM_FEATURES}, got {self.task}")
        if self.augment and self.task == RANDOM_FEATURES:
            raise Refusal(f"--augment needs images, and {RANDOM_FEATURES} has none")
        if self.mislabelled and not TASKS[self.task].labels:
            raise Refusal(f"--mislabelled needs samples with a class, and {self.task} has none")

    @property
    def last_log(self) -> int:
        """The step of the last measurement."""
        return self.steps // self.log_every * self.log_every

    def groups(self) -> Iterator[list["Trajectory"]]:
        """Yield the trajectories of every setting, one for each seed."""
        single = replace(self, seeds=(0,))
        for values in itertools.product(*(getattr(self, name) for name in GRID)):
            chosen = replace(single, **{n: (v,) for n, v in zip(GRID, values, strict=True)})
            yield [Trajectory(chosen, seed) for seed in self.seeds]


@dataclass(frozen=True)
class Trajectory:
    """One training: a plan whose options have one value each, and a seed."""

    plan: Plan
    seed: int

    @property
    def key(self) -> str:
        """The name of its files."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return its options as JSON has them."""
        return {**json.loads(json.dumps(asdict(self.plan))), "seeds": [self.seed]}

    @property
    def samples(self) -> int:
        """The training samples of a random-features student."""
        return int(STUDENT / self.plan.ratios[0])

    def name(self, among: Plan) -> str:
        """Return what tells its group from the others of a plan."""
        parts = []
        for option, text in zip(GRID, ("lr", "hs/N", "dim", "teacher", "dup"), strict=True):
            if len(getattr(among, option)) > 1:
                parts.append(f"{text} {getattr(self.plan, option)[0]:g}")
        return ", ".join(parts) or among.task


def _check_value(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    values = value if isinstance(value, tuple) else (value,)
    low, high = bounds["low"], bounds["high"]
    for one in values:
        if not isinstance(one, str) and not low <= one <= high:
            text = f">= {low:g}" if high >= _MANY else f"from {low:g} to {high:g}"
            raise Refusal(f"{flag(name)} must be {text}, got {one:g}")
    if name in ("seeds", *GRID) and len(set(values)) != len(values):
        raise Refusal(f"{flag(name)} must not have a value twice")


def flag(name: str) -> str:
    """Return an option's name on the command line."""
    return "--" + name.replace("_", "-")


_IMAGES = Plan(
    batch_size=128,
    weight_decay=5e-4,
    log_every=500,
    draws=50,
)
_MNIST = replace(
    _IMAGES, task="mnist", lr=(0.02,), momentum=0.5, steps=50_000, every=2000, iterations=10
)
_CIFAR = replace(
    _IMAGES,
    task="cifar10",
    lr=(0.01,),
    drops=(40_000, 60_000),
    momentum=0.9,
    steps=80_000,
    every=20_000,
    start=100,
    augment=1,
)
PRESETS: dict[str, tuple[Plan, str]] = {
    "random-features": (
        Plan(
            task=RANDOM_FEATURES,
            seeds=(123, 456, 789),
            steps=5000,
            lr=(0.1, 0.01, 0.001),
            weight_decay=1e-4,
            ratios=(0.1, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 5.0, 10.0),
            inputs=(100, 10_000),
            teacher=(100, 10_000),
        ),
        "students of random features, by overparametrisation (figures 4, 5 and 8)",
    ),
    "duplicates": (
        replace(_CIFAR, appended=(10, 10_000)),
        "CIFAR-10 and 10 of its images 10000 times each (figure 7)",
    ),
    "corrupted-labels": (
        replace(_CIFAR, mislabelled=0.1),
        "CIFAR-10 with random labels for 10 % (figure 6)",
    ),
    "mnist": (_MNIST, "MNIST (figure 3)"),
    "fashion-mnist": (
        replace(_MNIST, task="fashion-mnist"),
        "Fashion-MNIST with the settings of MNIST",
    ),
    "cifar10": (_CIFAR, "CIFAR-10 (figure 3)"),
    "linear-regression": (
        Plan(
            task="linear-regression",
            steps=100_000,
            lr=(5e-5,),
            log_every=1000,
            every=10_000,
            duplicates=(0.0, 0.5),
        ),
        "linear regression with fewer samples than weights, also with copies of 5 samples",
    ),
}
"""The presets by name, with the settings of the paper's appendix C and one line each."""
