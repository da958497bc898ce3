"""One trajectory: plain SGD, watched by every estimator, that can be stopped and resumed."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gq_triton.commands.files import whole_file
from gq_triton.sampling import GradientClustering
from gq_triton.saved.files import DAMAGE, load_checked
from gq_triton.tasks import ScoredTask, flaws
from gq_triton.tasks.random_features import random_features
from gq_triton.variance.anchored import SVRG, AnchoredBatches
from gq_triton.variance.estimators import (
    Estimator,
    ImportanceBatches,
    StratifiedBatches,
    UniformBatches,
)
from gq_triton.variance.frozen import undisturbed
from gq_triton.variance.measure import measure_variance
from gq_triton.variance.trajectory.plan import RANDOM_FEATURES, TASKS, Trajectory

__all__ = ["ESTIMATORS", "Training", "load_task"]

ESTIMATORS = ("SG-B", "SG-2B", "SVRG", "GC", "IS")
_IMAGES = 4  # dimensions of a batch of images
_SHIFT = 4  # pixels by which images are shifted at most
SAVE_EVERY = 5.0  # seconds between saves, each of which a kill would lose at most


def load_task(trajectory: Trajectory, data: Path | None) -> ScoredTask:
    """Return a trajectory's task with the flaws that it is to have.

    Raises:
        MissingData: the files of the task are not there.
    """
    plan = trajectory.plan
    if plan.task == RANDOM_FEATURES:
        sizes = trajectory.samples, plan.inputs[0], plan.teacher[0]
        task = random_features(trajectory.seed, *sizes, outputs=1)
    else:
        task = TASKS[plan.task].load(trajectory.seed, data)
    if plan.duplicates[0]:
        task = flaws.repeated(task, plan.duplicates[0])
    if plan.mislabelled:
        task = flaws.mislabelled(task, plan.mislabelled)
    points, copies = plan.appended
    return flaws.appended(task, points, copies, trajectory.seed) if copies else task


class Training:
    """The training of a trajectory, in this process.

    Args:
        trajectory: the trajectory.
        task: what ``load_task`` returned for it.
    """

    def __init__(self, trajectory: Trajectory, task: ScoredTask) -> None:
        self.trajectory, self.plan = trajectory, trajectory.plan
        self.device = torch.device(self.plan.device)
        inputs, labels = (t.to(self.device) for t in task.train)
        if self.plan.augment and inputs.dim() != _IMAGES:
            raise ValueError(
                f"--augment needs images (N, C, H, W), and its samples are {tuple(inputs.shape)}"
            )
        self.sample_losses = task.losses
        self.data, self.order = TensorDataset(inputs, labels), task.order
        torch.manual_seed(trajectory.seed)
        self.model = task.model().to(self.device)  # drawn on the CPU: the same weights everywhere
        self.optimizer = torch.optim.SGD(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=self.plan.lr[0],
            momentum=self.plan.momentum,
            weight_decay=self.plan.weight_decay,
        )
        self.svrg = SVRG(self.model, task.losses, self.data, every=self.plan.every)
        self.clustering = GradientClustering(
            self.model,
            n_clusters=self.plan.batch_size,
            max_iter=self.plan.iterations,
            loss=task.losses,
            seed=trajectory.seed,
        )
        self.labels: Tensor | None = None
        self.step, self.losses = 0, [0.0, 0]  # the sum since the last row, and how many
        self.rows: list[dict[str, Any]] = []
        self.diverged_at: int | None = None

    def run(
        self,
        state: Path,
        advance: Callable[[int], None],
        save_every: float = SAVE_EVERY,
        measures: bool = True,
    ) -> None:
        """Train to the end; ``rows`` then holds what was measured.

        Args:
            state: file to resume from, which is written from time to time.
            advance: function that is told the step, now and then.
            save_every: seconds between saves.
            measures: whether anything is measured.
        """
        plan, samples = self.plan, len(self.data)
        if self.step == 0:
            # What the model draws in training does not depend on how many its weights took.
            torch.manual_seed(self.trajectory.seed)
        order = self.order(samples, plan.batch_size, self.trajectory.seed)
        saved = time.monotonic()
        for indices in itertools.islice(order, self.step, plan.steps):
            if not self._train(indices) or (measures and not self._watch()):
                self.diverged_at = self.step
                return
            if self.step % plan.log_every == 0:
                advance(self.step)
                if time.monotonic() - saved >= save_every:
                    self.save(state)
                    saved = time.monotonic()

    def _train(self, indices: Tensor) -> bool:
        """Take a step; return False if the loss is not finite, before the optimizer's."""
        self.step += 1
        drops = sum(self.step > drop for drop in self.plan.drops)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr[0] * 0.1**drops
        inputs, labels = self.data[indices.to(self.device)]
        self.optimizer.zero_grad()
        if self.plan.augment:
            inputs = augmented(inputs)
        loss = self.sample_losses(self.model(inputs), labels).mean()
        value = loss.item()
        if not math.isfinite(value):
            return False
        loss.backward()
        self.optimizer.step()
        self.losses = [self.losses[0] + value, self.losses[1] + 1]
        return True

    def _watch(self) -> bool:
        """Measure, and make anchor and clusters, where it is time; False if that cannot be."""
        plan = self.plan
        logs = self.step % plan.log_every == 0
        if logs and self.labels is not None:
            self._measure()
        if self.step >= plan.start and (self.step - plan.start) % plan.every == 0:
            # Sizes of clusters grow from batch to batch, so the batch is that of the training.
            loader = DataLoader(self.data, batch_size=plan.batch_size)
            with undisturbed():
                try:
                    self.svrg.snapshot()
                    self.labels = self.clustering.fit(loader).labels_
                except ValueError:  # a gradient is not finite: all else was checked before
                    return False
            if logs and not self.rows:
                self._measure()
        return True

    def _measure(self) -> None:
        assert self.labels is not None
        size = self.plan.batch_size
        estimators: dict[str, Estimator] = {
            "SG-B": UniformBatches(size),
            "SG-2B": UniformBatches(2 * size),
            "SVRG": AnchoredBatches(self.svrg, size),
            "GC": StratifiedBatches(self.labels),
            "IS": ImportanceBatches(size),
        }
        found = measure_variance(
            self.model,
            self.sample_losses,
            self.data,
            estimators,
            exact=self.plan.draws == 0,
            draws=self.plan.draws or 3,
            seed=self.step,
        )
        loss = self.losses[0] / max(1, self.losses[1])
        self.losses = [0.0, 0]
        for name, figures in found.items():
            row = {"step": self.step, "train_loss": loss, "estimator": name, **asdict(figures)}
            # JSON has no infinity.
            self.rows.append(
                {k: v if not isinstance(v, float) or math.isfinite(v) else None
                 for k, v in row.items()}
            )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write all that a resumed run needs."""
        state = {
            "trajectory": self.trajectory.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "svrg": self.svrg.state_dict(),
            "labels": self.labels,
            "step": self.step,
            "losses": self.losses,
            "rows": self.rows,
            "random": torch.get_rng_state(),
        }
        with whole_file(path) as file:
            torch.save(state, file)

    def load(self, path: Path) -> bool:
        """Go on from a file; return False, with nothing changed, if it cannot be read."""
        try:
            state = load_checked(path)
            if state["trajectory"] != self.trajectory.to_dict():
                return False
        except DAMAGE:
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.svrg.load_state_dict(state["svrg"])
        self.labels, self.step = state["labels"], state["step"]
        self.losses, self.rows = state["losses"], state["rows"]
        torch.set_rng_state(state["random"])
        return True


def augmented(images: Tensor) -> Tensor:
    """Return images ``(B, C, H, W)`` shifted by up to 4 pixels, half of them mirrored.

    What comes in from outside has the batch's least value. The random numbers are those of torch's
    global generator on the CPU.
    """
    batch, _, height, width = images.shape
    down, right = torch.randint(2 * _SHIFT + 1, (2, batch, 1))
    mirrored = torch.randint(2, (batch, 1)).bool()
    rows, columns = torch.arange(height) + down, torch.arange(width).expand(batch, -1)
    columns = torch.where(mirrored, columns.flip(1), columns) + right
    wide = F.pad(images, [_SHIFT] * 4, value=float(images.min()))
    every, rows, columns = (
        at.to(images.device)
        for at in (torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None])
    )
    return wide.permute(0, 2, 3, 1)[every, rows, columns].permute(0, 3, 1, 2).contiguous()
