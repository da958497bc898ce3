"""Options of a small study, its trials, and ways to run them without worker processes."""

from pathlib import Path

import torch.distributed as dist

from gq_triton.study.design.protocol import missing
from gq_triton.study.design.trial import EVALUATE, Trial
from gq_triton.study.run.ranks import run_rank
from gq_triton.study.run.records import Store
from gq_triton.study.trials.training import run_trial

OPTIONS = {
    "tasks": ["lines-disc"],
    "arms": ["sgdm", "gq-sgdm", "gq-sgdm-clusters"],
    "batch_sizes": [4, 16],
    "trials": 2,
    "tuning_seeds": 1,
    "seeds": 2,
    "steps": 12,
}


def trial(**changes):
    values = {
        "task": "lines-disc", "batch_size": 8, "steps": 20, "schedule": "cosine",
        "looks_every": 5, "target": 0.9, "base": "sgdm", "lr": 0.1, "seed": 0,
        "purpose": EVALUATE,
    }  # fmt: skip
    return Trial(**(values | changes))


def run_and_store(rank: int, asked: Trial, folder: Path) -> None:
    """Be one rank of a trial; rank 0 writes the record."""
    assert asked.processes == dist.get_world_size()
    record = run_rank(asked, None)
    if rank == 0:
        Store(folder).add(record)


def run_here(cells, store, *, data, done, **others):
    """Be ``run_study`` without worker processes, whose start takes longer than a few trials."""
    for cell in cells:
        while todo := missing(cell, store):
            for one in todo:
                record = run_trial(one, data)
                store.add(record)
                done(record)
