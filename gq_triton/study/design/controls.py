"""Controls: a Grad Queue arm's tuned settings with one thing changed.

Each control answers one question: is the gain that of a longer step, of less momentum, of any
weights of that size, of any clusters, of rebalancing? A gain that a control shares is no gain of
Grad Queue.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gq_triton.study.design.law import NO_LAW, Recipe, StudyLaw

__all__ = ["CONTROLS", "LAG", "PRIMARY", "Control", "Tuned", "altered", "applicable"]


@dataclass(frozen=True)
class Tuned:
    """The tuned arm that a control starts from.

    Args:
        recipe: the arm's tuned settings, its law with K.
        family: ``"sgd"`` or ``"adam"``, the arm's.
        norm_ratio: ``|g*| / |g|``, the mean over the steps of the tuning runs at these settings.
        mean_weight: the weights' mean over the same steps.
    """

    recipe: Recipe
    family: str
    norm_ratio: float
    mean_weight: float


@dataclass(frozen=True)
class Control:
    """A control.

    Args:
        text: one line about it.
        needs_clusters: whether it is left out where there are no clusters.
        needs_labels: whether it is left out where samples have no classes.
        plain: whether it is the optimizer without a law.
        inside: whether it changes what the DDP hook computes inside, so that it needs one process.
        kinds: the control's kind of law, by the arm's kind; None if the control changes no weights.
            The control is left out with an arm of another kind: one weight per tensor cannot be
            permuted or averaged; weights by rank have the same mean in every step, so that
            ``constant`` would ask what ``mean-weight`` asks; a queue of weighted gradients would
            hold other gradients if the weights were changed.
    """

    text: str
    needs_clusters: bool = False
    needs_labels: bool = False
    plain: bool = False
    inside: bool = False
    kinds: Mapping[str, str] | None = None


PRIMARY = {"sgd": "norm-ratio", "adam": "same-lr"}
"""The control that takes steps of the same length without Grad Queue, by the arm's family.

Adam divides by the gradient's size, so that a longer gradient makes no longer step there."""

LAG = "lower-momentum", "lead"
"""The controls whose momentum lags less behind the gradient, as it does with Grad Queue."""

CONTROLS: dict[str, Control] = {
    "norm-ratio": Control(
        "no Grad Queue, learning rate times its measured norm ratio: a longer step", plain=True
    ),
    "mean-weight": Control(
        "no Grad Queue, learning rate times its measured mean weight", plain=True
    ),
    "same-lr": Control("no Grad Queue, the same learning rate", plain=True),
    "lower-momentum": Control(
        "no Grad Queue, half the momentum's memory: 1 - beta1 doubled; with SGD the learning rate "
        "too, so that a steady step keeps its length",
        plain=True,
    ),
    "lead": Control(
        "no weights: the optimizer gets g + (g - mu), mu the mean of the queued gradients of the "
        "whole batch, for g",
        inside=True,
    ),
    "shuffled": Control(
        "its weights permuted within each tensor: same sizes, wrong places",
        inside=True,
        kinds={"queue": "shuffled", "rank": "rank-shuffled"},
    ),
    "constant": Control(
        "its weights replaced by their mean in each tensor",
        inside=True,
        kinds={"queue": "constant"},
    ),
    "random-clusters": Control("its clusters with the samples permuted: same sizes", True),
    "label-clusters": Control("a cluster per class instead", True, True),
    "rho1-population": Control("its clusters, rho = 1, by population: no Grad Queue at all", True),
    "rho1-equal": Control("its clusters, rho = 1, equally weighted: plain rebalancing", True),
}
"""All controls by name; ``gq-triton study run --help`` lists them."""


def applicable(name: str, law: StudyLaw, labels: bool) -> bool:
    """Return whether a control applies to a law, on a task with or without classes."""
    control = CONTROLS[name]
    if control.needs_labels and not labels:
        return False
    if control.kinds is not None and law.kind not in control.kinds:
        return False
    return law.n_clusters is not None or not control.needs_clusters


def altered(name: str, tuned: Tuned) -> Recipe:
    """Return the settings of a control."""
    recipe, law = tuned.recipe, tuned.recipe.law
    if name == "lower-momentum":
        return _less_momentum(replace(recipe, law=NO_LAW), tuned.family)
    if name == "lead":
        return replace(recipe, law=StudyLaw("lead", queue_length=law.queue_length))
    if CONTROLS[name].plain:
        factors = {"norm-ratio": tuned.norm_ratio, "mean-weight": tuned.mean_weight}
        return replace(recipe, lr=_digits(recipe.lr * factors.get(name, 1.0)), law=NO_LAW)
    kinds = CONTROLS[name].kinds
    if kinds is not None:
        return replace(recipe, law=replace(law, kind=kinds[law.kind]))
    random = "random-output_gradient" if law.by_output else "random"
    changes = {
        "random-clusters": {"cluster_by": random},
        "label-clusters": {"cluster_by": "labels"},
        "rho1-population": {"rho": 1.0, "population_power": 1.0},
        "rho1-equal": {"rho": 1.0, "population_power": 0.0},
    }
    return replace(recipe, law=replace(law, **changes[name]))


def _less_momentum(recipe: Recipe, family: str) -> Recipe:
    """Return settings with half the momentum's memory, 1 / (1 - beta1); at the least none.

    A formula gives the value, so that no run which is compared can have chosen it.
    """
    beta1 = _digits(max(0.0, 1 - 2 * (1 - recipe.beta1)))
    # A steady gradient moves SGD by lr / (1 - momentum) per step, and Adam by lr.
    factor = (1 - beta1) / (1 - recipe.beta1) if family == "sgd" else 1.0
    return replace(recipe, lr=_digits(recipe.lr * factor), beta1=beta1)


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
