"""The loop of a run, from its first step or from a checkpoint to its summary."""

import json
import platform
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import gq_triton
from gq_triton.commands.files import whole_file
from gq_triton.training.checkpoints import save_checkpoint
from gq_triton.training.folder import CHECKPOINTS, CURVES, METRICS, SUMMARY
from gq_triton.training.metrics import json_line, read_metrics
from gq_triton.training.place import launch_id
from gq_triton.training.plots import draw_curves
from gq_triton.training.trainer import Trainer

if TYPE_CHECKING:
    from gq_triton.training.terminal import Terminal

__all__ = ["fit", "result", "summarise"]


def fit(trainer: Trainer, out: Path, every: int, seconds: float, terminal: "Terminal") -> float:
    """Take the steps that are left, and return the seconds that all steps of the run took.

    Args:
        trainer: the trainer of this rank; rank 0 alone writes.
        out: folder of the run.
        every: steps between checkpoints.
        seconds: seconds of the steps before, which a checkpoint holds.
        terminal: display of the run.
    """
    started = time.perf_counter() - seconds
    first = trainer.place.rank == 0

    def checkpoint() -> None:
        content = trainer.state_dict()
        if first:
            spent = time.perf_counter() - started
            content |= {"seconds": spent, "launch": launch_id()}
            save_checkpoint(out / CHECKPOINTS, trainer.step, content)

    if trainer.step == 0:
        checkpoint()
    # A power cut may have left the last checkpoint and not the last row of the metrics.
    lost = trainer.step == trainer.steps and trainer.place.from_first(_lacks_end, out, trainer.step)
    with (out / METRICS).open("a", encoding="utf-8") if first else nullcontext() as metrics:

        def write(row: dict[str, Any]) -> None:
            if metrics is not None:
                metrics.write(json_line(row))
                metrics.flush()

        for epoch in range(trainer.step // trainer.epoch_steps, trainer.settings["epochs"]):
            for indices in trainer.batches_left(epoch):
                row = trainer.train_step(indices)
                write(row)
                terminal.step(row)
                if trainer.step == (epoch + 1) * trainer.epoch_steps:
                    row = trainer.evaluate()
                    write(row)
                    terminal.epoch(row)
                if trainer.step % every == 0 or trainer.step == trainer.steps:
                    checkpoint()
        if lost:
            write(trainer.evaluate())
    return time.perf_counter() - started


def _lacks_end(out: Path, step: int) -> bool:
    """Return whether the metrics lack the row of the epoch that ended with a step."""
    rows = read_metrics(out / METRICS)
    return not any(row["kind"] == "epoch" and row["step"] == step for row in rows)


def summarise(trainer: Trainer, out: Path, seconds: float) -> dict[str, Any]:
    """Return the summary of a finished run; rank 0 writes it and the picture into ``out``."""
    summary = {
        "world_size": trainer.place.world,
        "device": trainer.device.type,
        "steps": trainer.step,
        "skipped": trainer.skipped,
        "seconds": round(seconds, 3),
        "queue_digest": trainer.place.gather(trainer.state.digest()),
        "settings": trainer.settings,
        "versions": {
            "gq_triton": gq_triton.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    if trainer.place.rank == 0:
        rows = read_metrics(out / METRICS)
        last = [row for row in rows if row["kind"] == "epoch"][-1]
        summary = {n: last[n] for n in ("test_accuracy", "train_accuracy")} | summary
        with whole_file(out / SUMMARY) as file:
            file.write((json.dumps(summary, indent=2) + "\n").encode())
        title = (
            "{task}, {optimizer}, batch {batch_size}, rho {rho:g}, L {queue_length}, "
        ).format_map(trainer.settings)
        if trainer.settings["n_clusters"] is not None:
            title += f"{trainer.settings['n_clusters']} clusters in each of "
        title += f"{trainer.place.world} processes: {last['test_accuracy']:.2%} on the test set"
        with whole_file(out / CURVES) as file:
            draw_curves(rows, title, file)
    return summary


def result(summary: dict[str, Any], out: Path) -> dict[str, str]:
    """Return the lines that a terminal shows at the end of a run, by name."""
    digests = summary["queue_digest"]
    equal = "equal on all ranks" if len(set(digests)) == 1 else "DIFFERENT between ranks"
    return {
        "test accuracy": f"{summary['test_accuracy']:.2%}",
        "training accuracy": f"{summary['train_accuracy']:.2%}",
        "steps": f"{summary['steps']}, of them skipped: {summary['skipped']}",
        "time": f"{summary['seconds']:.1f} s on {summary['world_size']} x {summary['device']}",
        "queue": f"{digests[0][:12]}, {equal}",
        "written to": str(out),
    }
