"""Check the weighted gradients of two ranks against the oracle, in float64."""

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from gq_triton import reference
from gq_triton.bench.checks import (
    CLUSTERS,
    F64,
    LABELS,
    LENGTH,
    STEPS,
    Finding,
    expected,
    largest,
    loss_of,
)
from gq_triton.bench.hook import CASES
from gq_triton.bench.models import GPT
from gq_triton.bench.ranks import on_ranks, wrapped

__all__ = ["ranks_agree"]

RANKS = 2


def ranks_agree(device: torch.device, wrap: str) -> Iterator[Finding]:
    """Check every way of a wrapper to have Grad Queue on two ranks of the CPU, with gloo.

    Args:
        device: of the run; nothing is checked on a GPU, of which there may be one only.
        wrap: ``"ddp"`` or ``"fsdp"``.
    """
    if device.type == "cuda":
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        on_ranks(RANKS, _compare, wrap, str(file))
        for name, error in json.loads(file.read_text()).items():
            yield f"weighted gradients on {RANKS} ranks, {name}", error, 1e-9


def _compare(rank: int, wrap: str, file: str) -> None:
    found = {
        name: _error(rank, wrap, options)
        for name, options in CASES[wrap].items()
        if isinstance(options, dict)
    }
    if rank == 0:
        Path(file).write_text(json.dumps(found))


def _error(rank: int, wrap: str, options: dict[str, Any]) -> float:
    """Return the largest error of any gradient in some steps."""
    torch.manual_seed(0)
    model = GPT(16, 8, 24, 2, 1).to(F64)
    twin = copy.deepcopy(model)
    options = {**options, "queue_length": LENGTH}
    labels, count = torch.zeros(RANKS * len(LABELS), dtype=torch.int64), 1
    if options["n_clusters"] is not None:
        options["clusterer"] = lambda features: LABELS
        # The ranks' clusters are kept apart.
        labels = torch.cat([LABELS + CLUSTERS * n for n in range(RANKS)])
        count = CLUSTERS * RANKS
    module, optimizer, _ = wrapped(model, options, dist.group.WORLD, wrap, "cpu")
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # gradients differ from step to step by their batches alone
    rings = {key: reference.Ring(LENGTH) for key, _ in twin.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(STEPS):
        batch = torch.randint(16, (len(labels), 7), generator=generator)
        right = expected(twin, batch, rings, labels, count)
        optimizer.zero_grad()
        loss_of(module(batch.chunk(RANKS)[rank])).mean().backward()
        optimizer.step()  # the plug-in weights what FSDP2 has reduced when a step begins
        for key, param in model.named_parameters():
            assert param.grad is not None
            grad = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
            worst = max(worst, largest(grad, right[key]))
    return worst
