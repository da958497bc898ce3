"""Does Grad Queue end in other minima? Generalisation gap and sharpness of a study's tuned arms.

python benchmarks/sharpness.py DIR --out OUT

DIR is the folder of a finished study. The evaluation runs of every arm train again, which gives the
same weights, and are looked at on training and on test data. Sharpness is the largest eigenvalue of
the Hessian of the loss on the first 2000 training samples, by 30 power iterations from one random
direction. Writes OUT/sharpness.csv and OUT/sharpness.png.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.protocol import Cell, cells
from gq_triton.study.design.study_file import CONFIG, read_toml
from gq_triton.study.design.trial import Trial
from gq_triton.study.report.canvas import COLOURS, figure, finish, png
from gq_triton.study.report.statistics import compare
from gq_triton.study.run.records import Store
from gq_triton.study.trials.training import TrainingRun
from gq_triton.tasks import ScoredTask, study_task

SAMPLES, ITERATIONS = 2000, 30
SHOWN = {
    "train_loss": "training loss in nats",
    "test_loss": "test loss in nats",
    "gap": "test loss - training loss",
    "sharpness": "largest eigenvalue",
}


def sharpness(model: nn.Module, task: ScoredTask) -> float:
    """Return the largest eigenvalue of the Hessian of the mean training loss."""
    inputs, labels = (part[:SAMPLES] for part in task.train)
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(
        task.losses(model(inputs), labels).mean(), params, create_graph=True
    )
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator) for p in params]
    value = 0.0
    for _ in range(ITERATIONS):
        norm = torch.stack([d.square().sum() for d in direction]).sum().sqrt()
        direction = [d / norm for d in direction]
        product = torch.autograd.grad(
            grads, params, grad_outputs=direction, retain_graph=True, allow_unused=True
        )
        curved = [torch.zeros_like(d) if h is None else h
                  for h, d in zip(product, direction, strict=True)]  # fmt: skip
        value = sum((h * d).sum().item() for h, d in zip(curved, direction, strict=True))
        direction = curved
    return value


@torch.no_grad()
def measured(model: nn.Module, task: ScoredTask, pair: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return the measures of a model on a set of samples."""
    outputs = torch.cat([model(part) for part in pair[0].split(1024)])
    return task.measure(outputs, pair[1], None)


def row(cell: Cell, trial: Trial, data: Path | None) -> dict[str, Any]:
    """Train an evaluation run again and return what it ended in."""
    task = study_task(trial.task).load(trial.seed, data)
    run = TrainingRun(trial, task)
    run.record()
    model = task.model()  # without hooks of Grad Queue, which no second derivative passes
    model.load_state_dict(run.model.state_dict())
    model.eval()
    train, test = (measured(model, task, pair) for pair in (task.train, task.test))
    name = cell.entry.score
    return {
        "arm": cell.arm.name, "batch_size": trial.batch_size, "seed": trial.seed,
        "train_loss": train["loss"], "test_loss": test["loss"], "gap": test["loss"] - train["loss"],
        f"train_{name}": train[name], f"test_{name}": test[name],
        "sharpness": sharpness(model, task),
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], title: str) -> bytes:
    """Return the picture: a panel per measure, a column of seeds per arm."""
    drawn = figure(10.0, 3.4)
    arms = list(dict.fromkeys(one["arm"] for one in rows))
    for panel, (name, label) in zip(drawn.subplots(1, len(SHOWN)), SHOWN.items(), strict=True):
        for place, arm in enumerate(arms):
            values = [one[name] for one in rows if one["arm"] == arm]
            panel.plot([place] * len(values), values, ".", color=COLOURS[place], alpha=0.5)
            panel.plot(place, sum(values) / len(values), "_", color="k", markersize=16)
        panel.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize=8)
        panel.set_title(label, loc="left", fontsize=10)
        panel.margins(x=0.2)
        finish(panel)
    drawn.suptitle(title, x=0.01, ha="left", fontsize=10)
    return png(drawn)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", type=Path, metavar="DIR", help="folder of a finished study")
    parser.add_argument("--data", type=Path, help="folder with the files of the task")
    parser.add_argument("--arms", nargs="+", help="some of the study's; default: all")
    parser.add_argument("--batch-size", type=int, help="of these runs; default: the study's first")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = StudyConfig.of(read_toml(given.study / CONFIG))
    size = given.batch_size or config.batch_sizes[0]
    store = Store(given.study)
    store.load()
    rows: list[dict[str, Any]] = []
    for cell in cells(config):
        choice = cell.choice(store)
        wanted = cell.batch_size == size and cell.arm.name in (given.arms or config.arms)
        if choice is None or not wanted:
            continue
        rows += [row(cell, trial, given.data) for trial in cell.evaluation(choice)]
        mine = [one for one in rows if one["arm"] == cell.arm.name]
        base = [one for one in rows if one["arm"] == cell.arm.baseline]
        for name in SHOWN:
            text = f"{cell.arm.name} {name} {sum(one[name] for one in mine) / len(mine):.4g}"
            if base:
                pairs = zip(mine, base, strict=True)
                result = compare([one[name] - other[name] for one, other in pairs])
                text += f", to {cell.arm.baseline} {result.mean:+.4g}"
                text += f" [{result.low:+.4g}, {result.high:+.4g}]"
            print(text, flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "sharpness.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in one.items()} for one in rows
        )
    title = f"{config.tasks[0]}, batch {size}, {config.steps} steps: seeds and mean of tuned arms"
    (given.out / "sharpness.png").write_bytes(draw(rows, title))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
