"""The laws of a study, which say what is done to a gradient, and the settings of one run."""

from dataclasses import dataclass

__all__ = ["NO_LAW", "Recipe", "StudyLaw"]


@dataclass(frozen=True)
class StudyLaw:
    """The law of an arm or a control: what is done to the gradient before the optimizer gets it.

    Args:
        kind: ``"none"``: nothing is done. ``"queue"``: Grad Queue, the plug-in. ``"shuffled"``:
            its weights permuted within each tensor. ``"constant"``: its weights replaced by their
            mean in each tensor. ``"lead"``: no weights; the gradient plus its difference to the
            queue's mean. ``"magnitude"``: one weight per tensor, from the norm of its gradient.
            ``"rank"`` and ``"rank-shuffled"``: weights by the rank of z, the latter permuted.
            ``"weighted-queue"``: the queue holds weighted gradients.
        n_clusters: K, or None for no clusters.
        cluster_by: what k-means sees: ``"features"`` of the task, or ``"output_gradient"``.
            ``"random"`` and ``"random-output_gradient"`` permute the labels that k-means finds in
            these: random clusters of the same sizes. ``"labels"``: a cluster per class.
        rho: upper bound of a weight; the lower one is 1 / rho.
        queue_length: gradients kept per element, L.
        loss_window: losses of the adaptive length, or None for a fixed length.
        match_norm: rescale the gradient to the norm of the raw one.
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
        """Whether k-means sees the output's gradient, not the task's features."""
        return self.cluster_by in ("output_gradient", "random-output_gradient")

    @property
    def permuted(self) -> bool:
        """Whether the clusters are random."""
        return self.cluster_by in ("random", "random-output_gradient")

    @property
    def queued(self) -> bool:
        """Whether gradients are queued, so that the queue's length has a meaning."""
        return self.kind != "none"

    @property
    def weighted(self) -> bool:
        """Whether gradients are weighted, so that rho has a meaning."""
        return self.kind not in ("none", "lead")


NO_LAW = StudyLaw()


@dataclass(frozen=True)
class Recipe:
    """The settings of a run that tuning chooses and controls change.

    Args:
        lr: highest learning rate.
        beta1: of Adam; with SGD the momentum.
        warmup: share of the steps over which the learning rate rises linearly.
        law: what is done to the gradient.
    """

    lr: float
    beta1: float = 0.9
    warmup: float = 0.0
    law: StudyLaw = NO_LAW
