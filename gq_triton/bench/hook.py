"""The themes ``hook`` and ``fsdp2``: a training step on several ranks against the plain one.

The ranks are gloo ranks on this machine's CPU, with one thread each, or NCCL ranks with a GPU each.
A step is forward pass, backward pass and SGD with momentum; the queue is full. The ranks start each
step together, and the slowest rank's time counts. Bytes are those of the payloads of all
collectives, as each would be sent on a ring. FSDP2 divides every block of the model. The 16-bit
hook sends bfloat16, or float16 on the CPU, where torch refuses the other.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from gq_triton.bench.models import GPT, ResNet18, ResNet50
from gq_triton.bench.ranks import FILL, held, in_turns, make_step, narrow, on_ranks, power_sgd, sent
from gq_triton.bench.run import Line, Run

__all__ = ["fsdp2", "hook"]

CLUSTERS = {"n_clusters": 4, "features": "features"}
SLICES = {"n_clusters": None, "shard_queue": True}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {
        "plain DDP": None,
        "n_clusters=None": {"n_clusters": None},
        "n_clusters=None, shard_queue=True": SLICES,
        "n_clusters=4": CLUSTERS,
        "n_clusters=4, shard_queue=True": {**CLUSTERS, "shard_queue": True},
        "16-bit hook of torch": narrow,
        "PowerSGD of torch, rank 1": power_sgd,
    },
    "fsdp": {
        "plain FSDP2": None,
        "n_clusters=None": {"n_clusters": None},
        "n_clusters=4": CLUSTERS,
    },
}


class Work(NamedTuple):
    """A model and the batch of each rank; no side means sequences of 128 bytes."""

    build: Callable[[], nn.Module]
    name: str
    batch: int
    side: int = 0

    @property
    def words(self) -> str:
        """Return model and batch in words."""
        what = f"images of {self.side} x {self.side}" if self.side else "x 128 bytes"
        return f"{self.name}, {self.batch} {what} per rank"


def _tiny() -> nn.Module:
    return ResNet50((1, 1, 1, 1), width=8, classes=10)


TINY = Work(_tiny, "tiny ResNet", 4, 16)


def hook(run: Run) -> None:
    """Time the DDP hook on two and on four ranks."""
    work = Work(ResNet18, "ResNet-18", 4, 32)
    if run.on_gpu:
        work = Work(ResNet50, "ResNet-50", 64, 224)
    for ranks in (2,) if run.small else (2, 4):
        _ranks(run, "hook", "ddp", work, ranks)


def fsdp2(run: Run) -> None:
    """Time FSDP2 with and without clusters on two ranks."""
    works = [Work(ResNet18, "ResNet-18", 8, 32), Work(GPT, "GPT of 3.3 M", 16)]
    if run.on_gpu:
        works = [Work(ResNet50, "ResNet-50", 64, 224), Work(GPT, "GPT of 3.3 M", 64)]
    for work in works[:1] if run.small else works:
        _ranks(run, "fsdp2", "fsdp", work, 2)


def _ranks(run: Run, part: str, wrap: str, work: Work, ranks: int) -> None:
    """Time all cases of a wrapper on some ranks; keep a line for each."""
    work = TINY if run.small else work
    backend = "NCCL" if run.on_gpu else "gloo"
    case = f"{work.words}, {ranks} {backend} ranks"
    with run.case(part, case) as begins, tempfile.TemporaryDirectory() as folder:
        if not begins:
            return
        if run.on_gpu and torch.cuda.device_count() < ranks:
            found = f"left out: needs {ranks} GPUs, found {torch.cuda.device_count()}"
            run.lines.append(Line(part, case, note=found))
            return
        file = Path(folder, "found.json")
        # Four ranks on two cores take twice as long: those with clusters are left out there.
        crowded = not run.on_gpu and ranks > 2
        names = [name for name in CASES[wrap] if not (crowded and "n_clusters=4" in name)]
        on_ranks(ranks, _measure, wrap, names, work, run.device.type, run.turns, str(file))
        times, memory, wire = json.loads(file.read_text())
        lines = run.note(part, case, "ms", dict(zip(names, times, strict=True)))
        for line, kept, bytes_sent in zip(lines, memory, wire, strict=True):
            line.more |= {"held per rank, MiB": kept / 2**20}
            line.more |= {"sent per rank, MiB": bytes_sent / 2**20}


def _measure(
    rank: int, wrap: str, names: list[str], work: Work, kind: str, turns: int, file: str
) -> None:
    """Time the cases on one rank; rank 0 writes the result."""
    device, group = torch.device(kind), None
    if kind == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl")
        assert isinstance(group, dist.ProcessGroup)
    torch.manual_seed(0)
    model = work.build().to(device)
    torch.manual_seed(1 + rank)
    if work.side:
        images = torch.randn(work.batch, 3, work.side, work.side, device=device)
        batch = images, torch.randint(10, (work.batch,), device=device)
    else:
        tokens = torch.randint(256, (2, work.batch, 128), device=device)
        batch = tokens[0], tokens[1]
    made = [
        make_step(copy.deepcopy(model), CASES[wrap][name], batch, group, wrap) for name in names
    ]
    steps = [step for step, _ in made]
    for (step, _), name in zip(made, names, strict=True):
        options = CASES[wrap][name]
        if isinstance(options, dict):  # the queue is filled on few samples
            for _ in range(FILL):
                step(options["n_clusters"] or 2)  # one has no batch norm
        for _ in range(3 if callable(options) else 2):  # PowerSGD begins with the third
            step()
    wires = [sent(step) for step in steps]
    times = 1000 * in_turns(steps, turns).T
    if rank == 0:
        kept = [held(holder) for _, holder in made]
        Path(file).write_text(json.dumps([times.tolist(), kept, wires]))
