"""A trial under torchrun: the ranks share each batch, Grad Queue runs in the DDP hook.

The study starts each rank as ``torchrun -m gq_triton.study.run.ranks TRIAL.json DIR [DATA]``.
"""

import json
import math
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gq_triton.commands.refusal import Refusal
from gq_triton.dist import GradQueueState, register
from gq_triton.options import OUTPUT_GRADIENT
from gq_triton.study.design.law import StudyLaw
from gq_triton.study.design.trial import SERIES, Record, Trial
from gq_triton.study.run.device import take_device
from gq_triton.study.run.guard import guarded
from gq_triton.study.run.records import Store
from gq_triton.study.trials.backward import Measured
from gq_triton.study.trials.clusterer import StudyClusterer
from gq_triton.study.trials.training import TrainingRun
from gq_triton.tasks import ScoredTask, study_task

__all__ = ["launch", "run_rank"]


class _Hook:
    """The backward pass of plain DDP, or of Grad Queue in the DDP hook.

    Of K clusters every one of the W ranks finds K / W among its own samples, rounded down, at least
    one. ``share`` is the weight of this rank's mean loss in the mean over the ranks; it must be set
    before every backward pass.

    Args:
        ddp: the model.
        law: of kind ``"none"`` or ``"queue"``.
        features: name of the submodule whose output describes a sample.
        seed: of random clusters.
        classes: the number of classes of the samples; None if they have none.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        law: StudyLaw,
        features: str,
        seed: int,
        classes: int | None = None,
    ) -> None:
        self.state: GradQueueState | None = None
        self.clusterer: StudyClusterer | None = None
        self.share = 1.0
        if law.kind == "none":
            return
        names = ["rho", "queue_length", "loss_window", "match_norm"]
        options: dict[str, Any] = {}
        if law.n_clusters is not None:
            own = max(1, law.n_clusters // dist.get_world_size())
            generator = torch.Generator().manual_seed(
                seed * dist.get_world_size() + dist.get_rank()
            )
            self.clusterer = StudyClusterer(replace(law, n_clusters=own), generator, classes)
            options = {
                "n_clusters": self.clusterer.n_clusters,
                "features": OUTPUT_GRADIENT if law.by_output else features,
                "clusterer": self.clusterer,
            }
            names += ["population_power", "centroid_scale"]
        self.state = register(ddp, **options, **{name: getattr(law, name) for name in names})

    def backward(self, outputs: Tensor, losses: Tensor, labels: Tensor) -> None:
        """Leave the gradients of all ranks in ``p.grad``; see ``Backward``."""
        loss = losses.mean()
        whole = loss * self.share
        if self.state is not None:
            self.state.record_loss(whole.detach())
        if self.clusterer is None:
            whole.backward()  # DDP averages over ranks, not over samples
        else:
            self.clusterer.batch_labels = labels
            loss.backward()  # with clusters the state counts the samples

    def metrics(self) -> Measured:
        """Return what the law did to the last gradient, by names of ``SERIES``."""
        if self.state is None:
            return {}
        measured = self.state.metrics()
        return {name: float(measured[name]) for name in SERIES if name in measured}


class _RankRun(TrainingRun):
    """The training run of one rank; the results of all ranks are equal."""

    def _build_backward(self) -> _Hook:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        gpu = [torch.cuda.current_device()] if self.device.type == "cuda" else None
        self.ddp = DistributedDataParallel(self.model, device_ids=gpu)
        task, seed = self.task, self.trial.seed
        self.hook = _Hook(self.ddp, self.trial.law, task.features, seed, task.classes)
        return self.hook

    def _gradients(self, indices: Tensor) -> float:
        inputs, labels = self._samples(indices[self.rank :: self.world])
        outputs = self.ddp(inputs)
        losses = self.task.losses(outputs, labels)
        total = losses.detach().double().sum()
        dist.all_reduce(total)
        loss = total.item() / len(indices)
        if math.isfinite(loss):
            # The ranks' numbers of samples may differ by one.
            self.hook.share = len(labels) * self.world / len(indices)
            self.hook.backward(outputs, self._weighted(losses, labels), labels)
        return loss


def launch(trial: Trial, data: Path | None) -> Record:
    """Run a trial under torchrun and return its record.

    The ranks end with this process, also if it is killed.

    Args:
        trial: the trial.
        data: folder with the files of tasks that need some.

    Raises:
        Refusal: a rank failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trial.json"
        path.write_text(json.dumps(asdict(trial)), encoding="utf-8")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={trial.processes}", "-m", __name__, str(path), scratch,
            *([] if data is None else [str(data)]),
        ]  # fmt: skip
        code, output = guarded(command, {"OMP_NUM_THREADS": "1"})
        record = Store(Path(scratch)).read(trial)  # rank 0 has written it
    if code or record is None:
        raise Refusal(f"torchrun ended with {code}: {output[-1000:]}")
    return record


def run_rank(trial: Trial, data: Path | None) -> Record:
    """Return the record of a trial that every rank of the default process group runs.

    Args:
        trial: the trial.
        data: folder with the files of tasks that need some.
    """
    task: ScoredTask = study_task(trial.task).load(trial.seed, data)
    return _RankRun(trial, task).record()


def _main(path: str, folder: str, data: str | None = None) -> None:
    trial = Trial.of(json.loads(Path(path).read_text(encoding="utf-8")))
    take_device(trial.device, int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if trial.device == "cpu" else "nccl")
    try:
        record = run_rank(trial, Path(data) if data else None)
        if dist.get_rank() == 0:
            Store(Path(folder)).add(record)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
