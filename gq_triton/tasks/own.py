"""Tasks of one's own: a function in a module of the user's, which a study is told by its name."""

import importlib
import math
import os
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gq_triton.commands.refusal import Refusal
from gq_triton.tasks.scored import Measures, ScoredTask, StudyTask

__all__ = ["OwnTask", "check_own_task", "own_task"]

Pair = tuple[Tensor, Tensor]


class OwnTask(Protocol):
    """A task of one's own: what ``make_task`` of ``--task my_module:make_task`` returns.

    Beside these members it may have ``score_name`` (``"score"``) and ``unit`` (none), which the
    report shows; ``higher`` (True), whether a higher score is better; ``classes`` (None), the
    number of classes if labels are class indices ``(B,)``, which class-weighted arms and clusters
    by class need. Its docstring's first line is its text.

    Args:
        features: name of the submodule whose output describes a sample, for the clusters.
        chance: the score of a model that has learnt nothing, which a diverged run gets.
        target: the validation score of "steps to target".
    """

    features: str
    chance: float
    target: float

    def data(self, seed: int) -> tuple[Pair, Pair, Pair]:
        """Return inputs and labels to learn from, to choose settings by, and to test on.

        Each is a tensor with the samples in its first dimension. Test data must not depend on the
        seed; what is learnt from may.
        """
        ...

    def model(self) -> nn.Module:
        """Return a new model; its weights are drawn from torch's global generator."""
        ...

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of every sample, ``(B,)``."""
        ...

    def score(self, outputs: Tensor, labels: Tensor) -> float:
        """Return the score of a whole set of samples."""
        ...


_MEMBERS = {
    "data": "a method: data(seed) returns three pairs of inputs and labels",
    "model": "a method: model() returns a new module",
    "loss": "a method: loss(outputs, labels) returns a loss per sample",
    "score": "a method: score(outputs, labels) returns a number",
    "features": "the name of the submodule whose output describes a sample",
    "chance": "the score of a model that has learnt nothing",
    "target": 'the validation score of "steps to target"',
}


@cache
def own_task(name: str) -> StudyTask:
    """Return the entry of a task of one's own.

    Args:
        name: ``"module:function"``. The module is looked for in the working folder, too.

    Raises:
        Refusal: there is no such module or function, or what it returns lacks a member.
    """
    made = _made(name)
    for member, what in _MEMBERS.items():
        if not hasattr(made, member):
            raise Refusal(f"--task {name}: the task has no {member}; it must be {what}")
    for member in ("chance", "target"):
        if not _finite(getattr(made, member)):
            raise Refusal(
                f"--task {name}: {member} must be a number, got {getattr(made, member)!r}"
            )
    text = (type(made).__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return StudyTask(
        load=partial(_load, made),
        text=text or f"what {name} returns",
        score=getattr(made, "score_name", "score"),
        chance=float(made.chance),
        target=float(made.target),
        higher=getattr(made, "higher", True),
        labels=getattr(made, "classes", None) is not None,
        unit=getattr(made, "unit", ""),
    )


def _made(name: str) -> Any:
    module, _, function = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python -m` does, but for this import only
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise Refusal(
            f"--task {name}: no module {module} in {here} or on the PYTHONPATH"
        ) from error
    finally:
        sys.path.remove(here)
    make = getattr(found, function, None)
    if not callable(make):
        raise Refusal(f"--task {name}: the module {module} has no function {function!r}")
    return make()


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _load(made: Any, seed: int, data: Path | None) -> ScoredTask:
    train, validation, test = made.data(seed)

    def measure(outputs: Tensor, labels: Tensor, groups: Tensor | None = None) -> Measures:
        loss = made.loss(outputs, labels).double().mean().item()
        return {
            "loss": loss,
            getattr(made, "score_name", "score"): float(made.score(outputs, labels)),
        }

    return ScoredTask(
        train=train,
        validation=validation,
        test=test,
        model=made.model,
        features=made.features,
        classes=getattr(made, "classes", None),
        losses=made.loss,
        measure=measure,
    )


def check_own_task(name: str) -> None:
    """Run a few samples of a task of one's own through its members.

    Raises:
        Refusal: a member returns something else than ``OwnTask`` says.
    """
    own_task(name)
    made = _made(name)

    def refuse(what: str, got: object) -> None:
        raise Refusal(f"--task {name}: {what}, got {got}")

    sets = made.data(0)
    shape = [[tuple(getattr(t, "shape", [type(t).__name__])) for t in pair] for pair in sets]
    pairs = len(sets) == 3 and all(
        len(pair) == 2 and all(isinstance(t, Tensor) for t in pair) for pair in sets
    )
    if not pairs or any(len(x) != len(y) or len(x) == 0 for x, y in sets):
        refuse("data(seed) must return three pairs of tensors with a sample per row", shape)
    model = made.model()
    if made.features not in dict(model.named_modules()):
        refuse("features must name a submodule of the model", repr(made.features))
    inputs, labels = (tensor[:4] for tensor in sets[1])
    with torch.no_grad():
        outputs = model.eval()(inputs)
        losses, score = made.loss(outputs, labels), made.score(outputs, labels)
    if not isinstance(losses, Tensor) or losses.shape != (len(inputs),):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        refuse(f"loss must return a loss per sample, shape {(len(inputs),)}", got)
    if not isinstance(score, (int, float)) and not (isinstance(score, Tensor) and score.dim() == 0):
        refuse("score must return a number", repr(score))
