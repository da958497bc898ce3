"""Controls: a Grad Queue arm's tuned settings with one thing changed.

Each answers a question: would the same have come of a longer step, of less momentum, of any weights
of that size, of any clusters, of rebalancing alone? A gain that a control shares is no gain of Grad
Queue.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gq_triton.study.arms import NO_LAW, Law, Recipe

__all__ = ["CONTROLS", "LAG", "PRIMARY", "Control", "Tuned", "altered", "applicable"]


@dataclass(frozen=True)
class Tuned:
    """What a control starts from.

    Args:
        recipe: the arm's tuned settings, its law with K.
        family: ``"sgd"`` or ``"adam"``, the arm's.
        norm_ratio: ``|g*| / |g|``, the mean over the steps of the tuning runs at these settings.
        mean_weight: likewise.
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
        needs_clusters: whether it says something only where there are clusters.
        needs_labels: whether samples must have classes.
        plain: whether it is the optimizer alone.
        inside: whether it changes what the DDP hook computes inside, so that it needs one process.
        kinds: by kind of law that of the control, where it changes the weights. Others have none:
            one weight per tensor has nothing to permute or average; the mean of weights by rank
            is the same every time, as ``mean-weight`` has it; a queue of weighted gradients would
            fill with others.
    """

    text: str
    needs_clusters: bool = False
    needs_labels: bool = False
    plain: bool = False
    inside: bool = False
    kinds: Mapping[str, str] | None = None


PRIMARY = {"sgd": "norm-ratio", "adam": "same-lr"}
"""What takes steps of the same length without Grad Queue, by the arm's family.

Adam and its kin divide by the gradient's size: a longer gradient makes no longer step there."""

LAG = "lower-momentum", "lead"
"""What makes momentum lag less behind the gradient, as Grad Queue does besides weighting."""

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
"""What an arm can be held against; ``--help`` lists them."""


def applicable(name: str, law: Law, labels: bool) -> bool:
    """Return whether a control says something about a law, on a task with or without classes."""
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
        return replace(recipe, law=Law("lead", queue_length=law.queue_length))
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

    A formula and no search: nothing can be chosen by the runs that judge it.
    """
    beta1 = _digits(max(0.0, 1 - 2 * (1 - recipe.beta1)))
    # SGD adds gradients up to 1 / (1 - momentum) times one, Adam averages them.
    factor = (1 - beta1) / (1 - recipe.beta1) if family == "sgd" else 1.0
    return replace(recipe, lr=_digits(recipe.lr * factor), beta1=beta1)


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
