"""The options of the law and of the clusters: default, check and help sentence of each, once.

A door (an optimizer, the plug-in, the DDP state) takes the options as keywords and passes one
object on: ``LawOptions``, ``ClusterOptions``. The ``TypedDict`` after each class tells type
checkers what the keywords are; ``keywords.py`` reads them, and shows them to users.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import Self

from gq_triton.float8 import FLOAT8

__all__ = [
    "BACKENDS", "ClusterKeywords", "ClusterOptions", "LawKeywords", "LawOptions", "Options",
    "RankClusterKeywords", "check_backend", "check_rho", "option", "shown",
]  # fmt: skip

BACKENDS = ("auto", "triton", "numba", "torch")
MODES = ("one_backward", "microbatch")
OUTPUT_GRADIENT = "output_gradient"
# The default of min_queue_length, which gives way to a queue_length below it.
MIN_QUEUE_LENGTH = 3
# Largest length and window. A queue takes L times the memory of its model: more is a slip.
LONGEST = 4096

# Takes an option's name and value; returns the clause that says what is wrong, or None.
Check = Callable[[str, Any], str | None]


def option(default: Any, sentence: str, check: Check | None = None) -> Any:
    """Return a dataclass field: an option's default, its help sentence and its check."""
    return field(default=default, metadata={"help": sentence, "check": check})


def shown(value: Any) -> str:
    """Return what a message calls a value that came, whatever it is."""
    if isinstance(value, Tensor):
        if value.is_nested:  # it has no shape
            return f"a nested tensor of type {value.dtype}"
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        try:
            text = repr(value)
        except ValueError:  # an integer of more digits than Python prints
            return "a number of too many digits"
        return text if len(text) <= 40 else f"{text[:37]}..."
    return f"a value of type {type(value).__name__}"


def _integer(name: str, value: Any) -> str | None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        return f"{name} must be an integer >= 1, got {shown(value)}"
    return f"{name} must be at most {LONGEST}, got {shown(value)}" if value > LONGEST else None


def _count(name: str, value: Any) -> str | None:
    try:
        whole = int(value) == value and value >= 1
    except (TypeError, ValueError, OverflowError):
        whole = False
    return None if whole else f"{name} must be an integer >= 1, got {shown(value)}"


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _one_of(*values: str) -> Check:
    def check(name: str, value: Any) -> str | None:
        fits = value in values
        return None if fits else f"{name} must be one of {', '.join(values)}, got {shown(value)}"

    return check


def _either(one: str, other: str) -> Check:
    def check(name: str, value: Any) -> str | None:
        fits = value in (one, other)
        return None if fits else f'{name} must be "{one}" or "{other}", got {shown(value)}'

    return check


def _rho(name: str, value: Any) -> str | None:
    if isinstance(value, (int, float)) and 1 <= value <= 1e30:
        return None
    return f"{name} must be a finite number >= 1 (1 switches the law off), got {shown(value)}"


def _power(name: str, value: Any) -> str | None:
    fits = isinstance(value, (int, float)) and 0 <= value < math.inf
    return None if fits else f"{name} must be >= 0, got {shown(value)}"


def _queue_dtype(name: str, value: Any) -> str | None:
    if isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize > 1:
        return None
    if isinstance(value, str) and value == FLOAT8:
        return None
    return (
        f'{name} must be None, a floating type of 16 bits or more, or "{FLOAT8}", got '
        f"{shown(value)}"
    )


_backend = _one_of(*BACKENDS)


def _zero_or_one(name: str, value: Any) -> str | None:
    fits = type(value) is int and value in (0, 1)
    return None if fits else f"{name} must be 0 or 1, got {shown(value)}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options, checked when it is built.

    Raises:
        ValueError: names every invalid option, not only the first.
    """

    def __post_init__(self) -> None:
        """Raise one ValueError that names every invalid option."""
        problems = self.problems(vars(self))
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the options."""
        return [entry.name for entry in fields(cls)]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the options found in ``values``; all others have their defaults."""
        return cls(**{name: values[name] for name in cls.names() if name in values})

    @classmethod
    def problems(cls, values: Mapping[str, Any]) -> list[str]:
        """Return a clause for each invalid option; if all are valid, one for each conflict."""
        checks = [(entry.name, entry.metadata["check"]) for entry in fields(cls)]
        found = [check(name, values[name]) for name, check in checks if check and name in values]
        return [problem for problem in found if problem] or cls._conflicts(values)

    @classmethod
    def _conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        """Return a clause for each pair of options that contradict each other."""
        return []


@dataclass(frozen=True, kw_only=True)
class LawOptions(Options):
    """Options of the queue and of the weights."""

    queue_length: int = option(5, "L, gradients kept per element.", _integer)
    min_queue_length: int = option(
        MIN_QUEUE_LENGTH, "lower bound of the effective length.", _integer
    )
    rho: float = option(3.0, "bound of the weight, at least 1; 1 switches the law off.", _rho)
    loss_window: int | None = option(
        None,
        "None keeps the effective length at ``queue_length``; w turns on the paper's rule with "
        "windows of w losses (section 3.1), fed by ``record_loss``.",
        _or_none(_integer),
    )
    queue_dtype: torch.dtype | str | None = option(
        None,
        f'type of the queue; None takes the parameter\'s. ``"{FLOAT8}"`` keeps a byte for each '
        "gradient, and one more per element.",
        _or_none(_queue_dtype),
    )
    match_norm: bool = option(
        False, "rescale each parameter's weighted gradient to the norm of the raw one."
    )
    backend: str = option("auto", '``"auto"``, ``"triton"``, ``"numba"`` or ``"torch"``.', _backend)

    @classmethod
    def _conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        longest, shortest = (values.get(n) for n in ("queue_length", "min_queue_length"))
        if longest is None or shortest is None or shortest <= longest:
            return []
        if values.get("loss_window") is None and shortest == MIN_QUEUE_LENGTH:
            return []  # the default gives way
        return [f"min_queue_length must be at most queue_length, got {shortest} > {longest}"]

    @property
    def shortest(self) -> int:
        """The lower bound of the effective length, at most ``queue_length``."""
        return min(self.min_queue_length, self.queue_length)


class LawKeywords(TypedDict, total=False):
    """The keywords of ``LawOptions``."""

    queue_length: int
    min_queue_length: int
    rho: float
    loss_window: int | None
    queue_dtype: torch.dtype | str | None
    match_norm: bool
    backend: str


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(Options):
    """Options of the groups of a batch, and of the mixture of the groups' gradients."""

    n_clusters: int | None = option(
        None,
        "K, groups per batch, or per rank's batch under DDP; None does not group.",
        _or_none(_count),
    )
    features: str | None = option(
        None,
        "name of the submodule whose output is the feature vector of a sample, the mean over "
        f'positions where it has several; or ``"{OUTPUT_GRADIENT}"``, the gradient at the model\'s '
        "output.",
    )
    clusterer: Callable[[Tensor], Tensor] | None = option(
        None,
        "``features (B, F) -> labels (B,)`` in place of k-means; labels on a GPU must be below "
        "``n_clusters``.",
    )
    labels: bool = option(
        False,
        "whether the loader brings the cluster of every sample: call ``set_labels`` before each "
        "forward pass of training, in place of ``features`` and ``clusterer``; labels on a GPU "
        "must be below ``n_clusters``.",
    )
    population_power: float = option(
        1.0,
        "``a`` in ``p_k = n_k**a / sum_j n_j**a`` over all clusters, those of all ranks under DDP; "
        "1 is the paper's, 0 weights clusters equally.",
        _power,
    )
    centroid_scale: str = option(
        "paper",
        '``"paper"`` compares a centroid with sigma, ``"standard_error"`` with ``sigma * sqrt(B / '
        "n_k)``, where B is the whole batch, that of all ranks under DDP.",
        _either("paper", "standard_error"),
    )
    loss_reduction: str = option(
        "mean",
        'whether the loss is the ``"mean"`` or the ``"sum"`` over samples.',
        _either("mean", "sum"),
    )
    accumulation_steps: int = option(
        1,
        "A, backward passes whose losses, each divided by A, make one step; under DDP all of them "
        "but the last run under ``no_sync``.",
        _count,
    )
    mode: str = option(
        "one_backward",
        '``"one_backward"`` for the layers that ``report`` lists; ``"microbatch"`` for any model, '
        "with ``GradQueue.backward(losses)`` and K backward passes.",
        _one_of(*MODES),
    )
    strict: bool = option(
        False,
        "raise an error, in the first backward pass that shows it, where a parameter's gradient is "
        "not known by cluster; False weights that of the whole batch and says so once.",
    )
    batch_dim: int = option(
        0,
        "the dimension of the samples in the model's inputs and in ``features``: 1 for a model "
        "whose tensors are time-major, ``(T, B, ...)``.",
        _zero_or_one,
    )

    @property
    def described(self) -> bool:
        """Whether it is said how samples are told apart; one cluster needs no such thing."""
        return self.features is not None or self.clusterer is not None or self.labels

    @classmethod
    def _conflicts(cls, values: Mapping[str, Any]) -> list[str]:
        if values.get("n_clusters") is not None:
            found = [name for name in ("features", "clusterer") if values.get(name) is not None]
            if not values.get("labels") or not found:
                return []
            return [f"labels=True takes the place of {' and '.join(found)}: leave one of them out"]
        # What describes the loop may always be said: it is true without clusters, too.
        about_the_loop = "loss_reduction", "accumulation_steps"
        given = [
            entry.name
            for entry in fields(cls)
            if entry.name not in about_the_loop
            and values.get(entry.name, entry.default) != entry.default
        ]
        if not given:
            return []
        need = "needs" if len(given) == 1 else "need"
        return [f"{' and '.join(given)} {need} n_clusters: say how many clusters"]


class RankClusterKeywords(TypedDict, total=False):
    """The keywords of ``ClusterOptions`` that the DDP state takes too."""

    n_clusters: int | None
    features: str | None
    clusterer: Callable[[Tensor], Tensor] | None
    labels: bool
    population_power: float
    centroid_scale: str
    accumulation_steps: int
    strict: bool
    batch_dim: int


class ClusterKeywords(RankClusterKeywords, total=False):
    """The keywords of ``ClusterOptions``."""

    loss_reduction: str
    mode: str


def check_rho(rho: float) -> None:
    """Raise a ValueError unless ``rho`` is a finite number of at least 1."""
    LawOptions(rho=rho)


def check_backend(backend: str) -> None:
    """Raise a ValueError unless ``backend`` is one of ``BACKENDS``."""
    problem = _backend("backend", backend)
    if problem:
        raise ValueError(problem)
