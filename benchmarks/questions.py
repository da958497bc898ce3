"""What do the queue's length, rho and the clusters' layer do where everything else is tuned?

python benchmarks/questions.py queue-length --out DIR
python benchmarks/questions.py rho --out DIR
python benchmarks/questions.py features --out DIR

Every value of what is asked about is an arm of its own: its learning rate, momentum, warm-up, and
rho and the queue's length if they are not asked about, are tuned as in a study, and its runs on
fresh seeds are compared with the tuned baseline's. DIR/trials keeps the records; the same command
goes on where it stopped. Writes DIR/results.csv with a row per run, DIR/tuning.csv with what became
of the tuning runs, and DIR/QUESTION.png.
"""

import argparse
import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.protocol import Cell, cells, missing
from gq_triton.study.design.trial import Trial
from gq_triton.study.report.canvas import COLOURS, figure, finish, png
from gq_triton.study.report.results import Group, collect, gains, results_csv
from gq_triton.study.report.statistics import compare
from gq_triton.study.run.records import Store
from gq_triton.study.trials.training import TrainingRun, run_trial
from gq_triton.tasks import study_task

Value = float | str


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        label: of the axis.
        values: of what is asked about.
        options: function that returns the options of a study with a value.
        places: the tasks.
    """

    label: str
    values: Sequence[Value]
    options: Callable[[Any], dict[str, Any]]
    places: Sequence[str]


PLACES: dict[str, dict[str, Any]] = {
    "lines-disc": {"batch_sizes": [5], "steps": 300, "lr_sgd": [0.03, 10.0]},
    "digits-bursts": {"batch_sizes": [32], "steps": 300, "lr_sgd": [0.01, 3.0]},
    "digits-longtail": {"batch_sizes": [64], "steps": 100, "lr_sgd": [0.01, 3.0]},
}
COMMON: dict[str, Any] = {
    "arms": ["sgdm", "gq-sgdm"], "trials": 16, "tuning_seeds": 2, "seeds": 12, "first_seed": 200,
    "eval_every": 100, "controls": [],
}  # fmt: skip

# Clusters of the digits' pixels, of the hidden layer before its ReLU, of the logits; and of the
# gradient of the loss in the logits.
LAYERS = "pixels", "hidden", "logits"
CLUSTERED: dict[str, Any] = {
    "batch_sizes": [256], "optimal_batch": 32, "controls": ["random-clusters"],
}  # fmt: skip


def _by_layer(layer: str) -> dict[str, Any]:
    if layer in LAYERS:
        arms = ["sgdm", "gq-sgdm-clusters"]
        return CLUSTERED | {"tasks": [f"study_tasks:{layer}"], "arms": arms}
    return CLUSTERED | {"arms": ["sgdm", "gq-sgdm-clusters-gradient"]}


QUESTIONS = {
    "queue-length": Question(
        "queue length L", (2, 4, 10, 32), lambda one: {"queue_length": [one]}, [*PLACES]
    ),
    "rho": Question("rho", (1.1, 3, 10, 100), lambda one: {"rho": [one, one]}, [*PLACES]),
    "features": Question(
        "what is clustered", (*LAYERS, "gradient"), _by_layer, ["digits-longtail"]
    ),
}


@dataclass(frozen=True)
class Variant:
    """One value of what is asked about, on one task.

    Attributes:
        value: the length, rho, or the layer.
        base: the baseline's runs.
        group: those of Grad Queue with this value.
        controls: those of its controls.
        unstable: the share of the tuning runs that ended at a loss above that of the first step.
        plain: the same of the baseline.
    """

    value: Value
    base: Group
    group: Group
    controls: list[Group]
    unstable: float
    plain: float


def unstable(cell: Cell, store: Store) -> float:
    """Return the share of a cell's tuning runs that ended worse than they began."""
    records = [store.get(trial) for trials in cell.tuning for trial in trials]
    results = [record.result for record in records if record is not None]
    return sum(_worse(result) for result in results) / len(results)


def _worse(result: dict[str, Any]) -> bool:
    if result["diverged_at"] is not None:
        return True
    return result["train_loss"] > result["losses"][0]


def activity(trial: Trial) -> float:
    """Return how steady the gradients of a run are in time, averaged over the elements.

    It is ``(mean |g|)^2 / mean g^2`` over the steps: 1 if an element always has the same size, 0.64
    if it is Gaussian, near 0 if it comes in a few steps only.
    """
    run = TrainingRun(trial, study_task(trial.task).load(trial.seed, None))
    params = [p for p in run.model.parameters() if p.requires_grad]
    sizes = [torch.zeros_like(p) for p in params]
    squares = [torch.zeros_like(p) for p in params]

    def note(*_: Any) -> None:
        for param, size, square in zip(params, sizes, squares, strict=True):
            assert param.grad is not None
            size += param.grad.abs()
            square += param.grad.square()

    run.optimizer.register_step_pre_hook(note)
    run.record()
    size, square = (torch.cat([t.flatten() for t in some]) for some in (sizes, squares))
    moved = square > 0
    return (size[moved].square() / square[moved]).mean().item() / trial.steps


def run(config: StudyConfig, store: Store) -> list[Group]:
    """Run the trials of a study that have no record, and return its groups."""
    every = cells(config)
    for cell in every:
        while trials := missing(cell, store):
            for trial in trials:
                store.add(run_trial(trial))
    return collect(every, store)


def variants(question: str, task: str, store: Store) -> list[Variant]:
    """Return the variants of a question on a task."""
    asked = QUESTIONS[question]
    found = []
    for value in asked.values:
        config = StudyConfig.of(COMMON | PLACES[task] | {"tasks": [task]} | asked.options(value))
        base, group, *controls = run(config, store)
        shares = unstable(group.cell, store), unstable(base.cell, store)
        found.append(Variant(value, base, group, controls, *shares))
        result = compare(gains(group, base))
        settings = " ".join(f"{name} {one:g}" for name, one in group.choice.settings.items())
        print(
            f"{task}, {question} {value}: {result.mean:+.4f} [{result.low:+.4f}, "
            f"{result.high:+.4f}] against {sum(base.scores) / len(base.scores):.4f}, better on "
            f"{result.wins} and worse on {result.losses} of {result.n}; {settings}; unstable "
            f"{shares[0]:.2f}, the baseline {shares[1]:.2f}",
            flush=True,
        )
        for control in controls:
            result = compare(gains(group, control))
            print(
                f"  to {control.control} {result.mean:+.4f} [{result.low:+.4f}, {result.high:+.4f}]"
            )
    return found


def draw(question: str, found: dict[str, list[Variant]], steady: dict[str, float]) -> bytes:
    """Return the picture: gains over the tuned baseline above, unstable tuning runs below."""
    drawn = figure(3.6 + 2.2 * len(found), 5.2)
    panels = drawn.subplots(2, len(found), squeeze=False, height_ratios=(3, 2))
    for column, (task, some) in enumerate(found.items()):
        upper, lower = panels[:, column]
        numbers = all(isinstance(variant.value, (int, float)) for variant in some)
        values: list[Any] = [v.value if numbers else place for place, v in enumerate(some)]
        results = [compare(gains(variant.group, variant.base)) for variant in some]
        means = [result.mean for result in results]
        below = [result.mean - result.low for result in results]
        above = [result.high - result.mean for result in results]
        upper.axhline(0, color="#8A8A8A", linewidth=1)
        line = "-" if numbers else "none"  # nothing lies between two layers
        shown = {"marker": "o", "capsize": 3, "linestyle": line}
        upper.errorbar(values, means, yerr=[below, above], color=COLOURS[0], **shown)
        for number, control in enumerate(some[0].controls):
            others = [compare(gains(v.controls[number], v.base)).mean for v in some]
            upper.plot(values, others, "D", color="#8A8A8A", label=f"control: {control.control}")
            upper.legend(frameon=False, fontsize=9)
        unstable = [variant.unstable for variant in some]
        lower.plot(values, unstable, color=COLOURS[1], marker="s", linestyle=line)
        lower.axhline(some[0].plain, color="#8A8A8A", linestyle="--", linewidth=1)
        upper.set_title(
            f"{task}, batch {some[0].group.cell.batch_size}\nactivity {steady[task]:.2f}",
            loc="left", fontsize=10,
        )  # fmt: skip
        for panel in (upper, lower):
            if numbers:
                panel.set_xscale("log")
            panel.set_xticks(values, [str(variant.value) for variant in some])
            panel.minorticks_off()
        lower.set_ylim(bottom=0)
        lower.set_xlabel(QUESTIONS[question].label)
        finish(upper)
        finish(lower)
    panels[0, 0].set_ylabel("gain over tuned sgdm\n(95 % interval)")
    panels[1, 0].set_ylabel("unstable tuning runs\n(dashes: sgdm)")
    return png(drawn)


def write(out: Path, found: dict[str, list[Variant]]) -> None:
    """Write ``results.csv`` and ``tuning.csv``."""
    text, known = "", set[str]()
    for some in found.values():
        for variant in some:
            groups = [variant.base, variant.group, *variant.controls]
            rows = results_csv(groups).splitlines(keepends=True)
            text = text or rows[0]
            for row in rows[1:]:
                if row not in known:  # the baseline's runs are those of every variant
                    text += row
                    known.add(row)
    (out / "results.csv").write_text(text)
    with (out / "tuning.csv").open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["task", "value", "unstable", "unstable of the baseline"])
        for task, some in found.items():
            lines.writerows([task, v.value, f"{v.unstable:.4g}", f"{v.plain:.4g}"] for v in some)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    store = Store(given.out)
    store.load()
    places = QUESTIONS[given.question].places
    found = {task: variants(given.question, task, store) for task in places}
    steady = {task: activity(some[0].base.records[0].trial) for task, some in found.items()}
    for task, value in steady.items():
        print(f"{task}: activity {value:.3f}; Gaussian {2 / math.pi:.3f}")
    write(given.out, found)
    (given.out / f"{given.question}.png").write_bytes(draw(given.question, found, steady))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
