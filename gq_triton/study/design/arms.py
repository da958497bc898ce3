"""The arms of a study: each an optimizer and a law, with the names of the settings that are tuned.

Every arm is tuned with the same budget, then run on fresh seeds. Controls are not tuned: each takes
an arm's tuned settings and changes one thing (``controls.py``).
"""

from dataclasses import dataclass, replace
from typing import Any

from gq_triton.study.design.law import NO_LAW, StudyLaw

__all__ = ["ARMS", "BASELINES", "Arm"]


@dataclass(frozen=True)
class Arm:
    """A way to train that a study compares with others.

    Args:
        name: its name on the command line.
        base: its optimizer, a key of ``trials.optimizers.OPTIMIZERS``.
        text: one line about it.
        law: what is done to the gradient.
        clusters: whether the law gets K = B / B_opt clusters, the paper's rule.
        class_weighted: whether losses are weighted by the inverse frequency of their class.
    """

    name: str
    base: str
    text: str
    law: StudyLaw = NO_LAW
    clusters: bool = False
    class_weighted: bool = False

    @property
    def family(self) -> str:
        """``"sgd"`` or ``"adam"``; each family has its own range of learning rates."""
        return "adam" if self.base == "adamw" else "sgd"

    @property
    def tuned(self) -> tuple[str, ...]:
        """The names of the settings that are tuned, all within one budget."""
        if self.law.queued and self.law.rho > 1:
            return "lr", "beta1", "warmup", "rho", "queue_length"
        return "lr", "beta1", "warmup"

    @property
    def baseline(self) -> str | None:
        """The arm without a law that this one is compared with; None if this one has no law."""
        return BASELINES[self.base] if self.law.kind != "none" else None

    def clusters_at(self, batch_size: int, optimal: int) -> int | None:
        """Return K at a batch size, or None for one cluster, which is the same as no clusters."""
        wanted = round(batch_size / optimal) if self.clusters else 1
        return wanted if wanted > 1 else None


BASELINES = {"sgdm": "sgdm", "nesterov": "nesterov", "adamw": "adamw"}

_QUEUE = StudyLaw("queue")


def _variant(of: Arm, suffix: str, text: str, **law: Any) -> Arm:
    """Return an arm with another law, its name and text completed."""
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
    """Return the arms with laws that might do better than the paper's."""
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
    rebalancing = StudyLaw(
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
"""All arms by name; ``gq-triton study run --help`` lists them."""
