"""The studies' tasks of real images: as they are, with rare classes, or with a hidden minority."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gq_triton.tasks import data_files, rare
from gq_triton.tasks.scored import ScoredTask, StudyTask

__all__ = ["IMAGE_TASKS"]

Load = Callable[[int, Path | None], ScoredTask]


@dataclass(frozen=True)
class _Images:
    """A data set of images in ten classes.

    Args:
        load: function that returns the data set as it is.
        title: its name.
        files: where its files come from, and its net, in words.
        kept: samples that the long tail leaves of a rare class; a hundredth.
        targets: the scores of "steps to target", as it is, with a long tail, and hidden.
    """

    load: Load
    title: str
    files: str
    kept: int
    targets: tuple[float, float, float]

    def tasks(self, name: str) -> dict[str, StudyTask]:
        """Return the three tasks, by their names."""
        plain, longtail, hidden = self.targets
        return {
            name: StudyTask(
                self.load, f"{self.title} {self.files}", "accuracy", chance=0.1, target=plain
            ),
            f"{name}-longtail": StudyTask(
                lambda seed, data: rare.longtail(self.load(seed, data), seed, self.kept),
                f"{self.title} with {self.kept} samples left of 3 classes",
                "balanced_accuracy",
                chance=0.1,
                target=longtail,
            ),
            f"{name}-hidden": StudyTask(
                lambda seed, data: rare.hidden(self.load(seed, data), seed),
                f"{self.title} with 5 % of every class mirrored and inverted",
                "worst_group_accuracy",
                chance=0.1,
                target=hidden,
            ),
        }


_FILES = "from the files that --data names"

IMAGE_TASKS: dict[str, StudyTask] = {
    **_Images(
        data_files.load_cifar10,
        "CIFAR-10",
        f"{_FILES}, small convolutional net",
        kept=45,
        targets=(0.6, 0.5, 0.4),
    ).tasks("cifar10"),
    **_Images(
        data_files.load_mnist,
        "MNIST",
        f"{_FILES}, small convolutional net",
        kept=54,
        targets=(0.97, 0.9, 0.8),
    ).tasks("mnist"),
    **_Images(
        data_files.load_fashion_mnist,
        "Fashion-MNIST",
        f"{_FILES} or of Debian's package dataset-fashion-mnist, 784-128-10 net",
        kept=54,
        targets=(0.85, 0.7, 0.75),
    ).tasks("fashion-mnist"),
}
"""The tasks by name; all need files."""
