"""The arms of a study: an optimizer, what is done to its gradient, and what is tuned.

An arm is tuned, with the same budget as every other, and then run on fresh seeds. Controls are not
tuned: they take an arm's tuned settings and change one thing (``controls.py``).
"""

from dataclasses import dataclass, replace
from typing import Any

__all__ = ["ARMS", "BASELINES", "NO_LAW", "Arm", "Law", "Recipe"]


@dataclass(frozen=True)
class Law:
    """What is done to the gradient before the optimizer gets it.

    Args:
        kind: ``"none"``; ``"queue"``, the plug-in; ``"shuffled"`` or ``"constant"``, its weights
            permuted within each tensor or replaced by their mean; ``"lead"``, no weights: the
            gradient plus its difference to the queue's mean; ``"magnitude"``, one weight per
            tensor from the norm of its gradient; ``"rank"`` or ``"rank-shuffled"``, weights by rank
            of z; ``"weighted-queue"``, a queue of weighted gradients.
        n_clusters: K, or None.
        cluster_by: ``"features"`` of the task or ``"output_gradient"``; ``"random"`` and
            ``"random-output_gradient"``, the k-means labels of either permuted: same sizes; or
            ``"labels"``.
        rho: bound of the weight.
        queue_length: gradients kept per element.
        loss_window: of the adaptive length, or None.
        match_norm: rescale to the raw gradient's norm.
        centroid_scale: ``"paper"`` or ``"standard_error"``.
        population_power: 1 weights clusters by population, 0 equally.
    """

    kind: str = "none"
    n_clusters: int | None = None
    cluster_by: str = "features"
    rho: float = 3.0
    queue_length: int = 5
    loss_window: int | None = None
    match_norm: bool = False
    centroid_scale: str = "paper"
    population_power: float = 1.0

    @property
    def by_output(self) -> bool:
        """Whether k-means sees the output's gradient instead of the task's features."""
        return self.cluster_by in ("output_gradient", "random-output_gradient")

    @property
    def permuted(self) -> bool:
        """Whether the clusters are random ones."""
        return self.cluster_by in ("random", "random-output_gradient")

    @property
    def queued(self) -> bool:
        """Whether gradients are queued: then rho and the queue's length mean something."""
        return self.kind != "none"


NO_LAW = Law()


@dataclass(frozen=True)
class Recipe:
    """The settings of a run that tuning chooses and controls change.

    Args:
        lr: highest learning rate.
        beta1: of Adam; with SGD the momentum.
        warmup: share of the steps in which the learning rate rises linearly.
        law: what is done to the gradient.
    """

    lr: float
    beta1: float = 0.9
    warmup: float = 0.0
    law: Law = NO_LAW


@dataclass(frozen=True)
class Arm:
    """A way to train that a study compares.

    Args:
        name: as on the command line.
        base: the optimizer, a key of ``optimizers.OPTIMIZERS``.
        text: one line about it.
        law: what is done to the gradient.
        clusters: whether the law gets K = B / B_opt clusters, the paper's rule.
        class_weighted: weight the losses by the inverse frequency of the class.
    """

    name: str
    base: str
    text: str
    law: Law = NO_LAW
    clusters: bool = False
    class_weighted: bool = False

    @property
    def family(self) -> str:
        """``"sgd"`` or ``"adam"``: which range of learning rates it is tuned in."""
        return "adam" if self.base == "adamw" else "sgd"

    @property
    def tuned(self) -> tuple[str, ...]:
        """Names of the settings that are tuned; Grad Queue's own count in the same budget."""
        if self.law.queued and self.law.rho > 1:
            return "lr", "beta1", "warmup", "rho", "queue_length"
        return "lr", "beta1", "warmup"

    @property
    def baseline(self) -> str | None:
        """The arm without Grad Queue that this one is held against; None if it is none itself."""
        return BASELINES[self.base] if self.law.kind != "none" else None

    def clusters_at(self, batch_size: int, optimal: int) -> int | None:
        """Return K, or None for no clusters: one cluster is the same as none."""
        wanted = round(batch_size / optimal) if self.clusters else 1
        return wanted if wanted > 1 else None


BASELINES = {"sgdm": "sgdm", "nesterov": "nesterov", "adamw": "adamw"}

_QUEUE = Law("queue")


def _variant(of: Arm, suffix: str, text: str, **law: Any) -> Arm:
    changed = replace(of.law, **law)
    return replace(of, name=f"{of.name}-{suffix}", text=f"{of.text}; {text}", law=changed)


_NORM = "rescaled to the raw norm"


def _queued(base: str) -> tuple[Arm, Arm, Arm]:
    """Return the Grad Queue arms over one optimizer: one cluster, K clusters, K equal clusters."""
    one = Arm(f"gq-{base}", base, f"Grad Queue on {base}, one cluster", _QUEUE)
    clusters = replace(
        one,
        name=f"gq-{base}-clusters",
        text=f"Grad Queue on {base}, K = B / B_opt clusters of the task's features",
        clusters=True,
    )
    equal = _variant(
        replace(_by_gradient(clusters), name=clusters.name),
        "equal",
        f"equally weighted; {_NORM}",
        population_power=0.0,
        match_norm=True,
    )
    return one, clusters, equal


def _by_gradient(clusters: Arm) -> Arm:
    """Return the arm with clusters of the output's gradient in place of the task's features."""
    return replace(
        clusters,
        name=f"{clusters.name}-gradient",
        text=f"Grad Queue on {clusters.base}, K = B / B_opt clusters of the output's gradient",
        law=replace(clusters.law, cluster_by="output_gradient"),
    )


def _variants(one: Arm, clusters: Arm) -> list[Arm]:
    """Return what might do better than the paper's rule."""
    own = "each centroid against its own standard error"
    ranked = "weights by rank of z within each tensor, evenly from 1/rho to rho on a log scale"
    by_gradient = _by_gradient(clusters)
    return [
        _variant(one, "norm", _NORM, match_norm=True),
        _variant(one, "adaptive", "effective length by the loss", loss_window=3),
        _variant(clusters, "norm", _NORM, match_norm=True),
        _variant(clusters, "se", own, centroid_scale="standard_error"),
        by_gradient,
        _variant(by_gradient, "norm", _NORM, match_norm=True),
        _variant(one, "tensor", "one weight per tensor and step, the mean of its elements'",
                 kind="constant"),
        _variant(one, "magnitude", "one weight per tensor and step, from the norm of its gradient",
                 kind="magnitude"),
        _variant(one, "rank", ranked, kind="rank"),
        _variant(clusters, "rank", ranked, kind="rank"),
        _variant(one, "weighted-queue", "the queue holds the weighted gradients",
                 kind="weighted-queue"),
    ]  # fmt: skip


def _all() -> list[Arm]:
    rebalancing = Law(
        "queue", rho=1.0, population_power=0.0, cluster_by="output_gradient", match_norm=True
    )
    one, clusters, equal = _queued("sgdm")
    return [
        Arm("sgdm", "sgdm", "torch.optim.SGD with momentum"),
        Arm("nesterov", "nesterov", "torch.optim.SGD with Nesterov momentum"),
        Arm("adamw", "adamw", "torch.optim.AdamW"),
        one, clusters, equal,
        *_variants(one, clusters),
        *_queued("adamw"),
        Arm("sgdm-class-weighted", "sgdm", "SGD with momentum on a class-weighted loss",
            class_weighted=True),
        Arm("adamw-class-weighted", "adamw", "AdamW on a class-weighted loss",
            class_weighted=True),
        Arm("sgdm-equal-clusters", "sgdm",
            "plain rebalancing: gq-sgdm-clusters-equal with rho = 1", rebalancing, clusters=True),
    ]  # fmt: skip


ARMS: dict[str, Arm] = {arm.name: arm for arm in _all()}
"""What a study can compare; ``--help`` lists them."""
