"""One trial under torchrun: the batch divided among ranks, Grad Queue through the DDP hook.

The study starts it as ``torchrun -m gq_triton.study.ranks TRIAL.json DIR [DATA]``.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gq_triton.cluster_grad import OUTPUT_GRADIENT
from gq_triton.dist import GradQueueState, register
from gq_triton.study.arms import Law
from gq_triton.study.device import take_device
from gq_triton.study.grouping import Grouping
from gq_triton.study.laws import Measured
from gq_triton.study.records import Record, Store, Trial
from gq_triton.study.trial import SERIES, Run
from gq_triton.tasks import STUDY_TASKS, ScoredTask, sample_losses
from gq_triton.training.options import Refusal

__all__ = ["launch"]


class _Hook:
    """Plain DDP, or Grad Queue in its communication hook: ``backward`` leaves what was reduced.

    Args:
        ddp: the model.
        law: ``"none"`` or ``"queue"``. Of K clusters every rank finds K / W among its own samples,
            rounded down, at least one.
        features: name of the submodule that describes a sample.
        seed: of random clusters.
    """

    def __init__(self, ddp: DistributedDataParallel, law: Law, features: str, seed: int) -> None:
        self.state: GradQueueState | None = None
        self.grouping: Grouping | None = None
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
            self.grouping = Grouping(replace(law, n_clusters=own), generator)
            options = {
                "n_clusters": own,
                "features": OUTPUT_GRADIENT if law.by_output else features,
                "clusterer": self.grouping,
            }
            names += ["population_power", "centroid_scale"]
        self.state = register(ddp, **options, **{name: getattr(law, name) for name in names})

    def backward(self, outputs: Tensor, losses: Tensor, labels: Tensor) -> None:
        """Take this rank's losses, which count as ``share`` says; see ``Backward``."""
        loss = losses.mean()
        whole = loss * self.share
        if self.state is not None:
            self.state.record_loss(whole.detach())
        if self.grouping is None:
            whole.backward()  # DDP averages over ranks, whatever their numbers of samples
        else:
            self.grouping.batch_labels = labels
            loss.backward()  # with clusters the state itself counts the samples

    def metrics(self) -> Measured:
        if self.state is None:
            return {}
        measured = self.state.metrics()
        return {name: float(measured[name]) for name in SERIES if name in measured}


class _RankRun(Run):
    """A trial of which this process is one rank; all ranks come to the same result."""

    def _build_law(self) -> _Hook:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        gpu = [torch.cuda.current_device()] if self.device.type == "cuda" else None
        self.ddp = DistributedDataParallel(self.model, device_ids=gpu)
        self.hook = _Hook(self.ddp, self.trial.law, self.task.features, self.trial.seed)
        return self.hook

    def _gradients(self, indices: Tensor) -> float:
        inputs, labels = self._samples(indices[self.rank :: self.world])
        outputs = self.ddp(inputs)
        losses = sample_losses(outputs, labels)
        total = losses.detach().double().sum()
        dist.all_reduce(total)
        loss = total.item() / len(indices)
        if math.isfinite(loss):
            # Shares of the batch may differ by a sample.
            self.hook.share = len(labels) * self.world / len(indices)
            self.hook.backward(outputs, self._weighted(losses, labels), labels)
        return loss


def launch(
    trial: Trial, folder: Path, data: Path | None, started: Callable[[subprocess.Popen[str]], None]
) -> Record:
    """Run a trial under torchrun and return its record, which rank 0 has written.

    Args:
        trial: what to run.
        folder: of the study.
        data: folder with the files of tasks that need some.
        started: given the process, to stop it with.

    Raises:
        Refusal: a rank failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trial.json"
        path.write_text(json.dumps(asdict(trial)), encoding="utf-8")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={trial.processes}", "-m", __name__, str(path), str(folder),
            *([] if data is None else [str(data)]),
        ]  # fmt: skip
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started(process)
        output, _ = process.communicate()
    record = Store(folder).read(trial)
    if process.returncode or record is None:
        raise Refusal(f"torchrun ended with {process.returncode}: {output[-1000:]}")
    return record


def _main(path: str, folder: str, data: str | None = None) -> None:
    trial = Trial.of(json.loads(Path(path).read_text(encoding="utf-8")))
    take_device(trial.device, int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if trial.device == "cpu" else "nccl")
    try:
        task: ScoredTask = STUDY_TASKS[trial.task].load(trial.seed, Path(data) if data else None)
        record = _RankRun(trial, task).record()
        if dist.get_rank() == 0:
            Store(Path(folder)).add(record)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
