"""Does drawing by score reach the uniform arm's training loss in fewer samples?

python benchmarks/importance.py --task digits --out DIR
python benchmarks/importance.py --task fashion-mnist --data DATA --out DIR

Samples are those of the cost model: one that is trained on counts 1, one that is only scored 1/3.
Every arm's learning rate is the one of the least training loss at the end, on seeds of its own;
all arms try the same ones. The measured seeds have the same weights in every arm. Writes
DIR/TASK.csv, every look at the training loss, and DIR/TASK.png.
"""

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gq_triton.sampling import ImportanceLoader
from gq_triton.tasks import STUDY_TASKS, ScoredTask

ARMS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "by score": {},
    "by score, smooth_mean=0.5": {"smooth_mean": 0.5},
}
LOOKED_AT = 10_000  # training samples whose loss is looked at


@dataclass(frozen=True)
class Plan:
    """The size of a task's runs.

    Attributes:
        batch: samples per step.
        epochs: cost of a run, in passes over the training data.
        looks: looks per epoch.
        rates: learning rates that every arm tries.
        tuning: seeds per learning rate.
        seeds: seeds of the measured runs.
    """

    batch: int
    epochs: int
    looks: int
    rates: tuple[float, ...]
    tuning: int
    seeds: int


PLANS = {
    "digits": Plan(32, 15, 4, (0.01, 0.02, 0.05, 0.07, 0.1, 0.2), tuning=2, seeds=6),
    "fashion-mnist": Plan(64, 4, 6, (0.005, 0.01, 0.02, 0.05), tuning=1, seeds=4),
}
Curve = list[tuple[float, float]]


def steps(
    arm: str, task: ScoredTask, model: nn.Module, plan: Plan, seed: int
) -> Iterator[tuple[float, Tensor, Tensor, Tensor | float]]:
    """Yield the cost so far, inputs, labels and weights of the batches, without an end."""
    inputs, labels = task.train
    if arm == "uniform":
        generator, cost = torch.Generator().manual_seed(seed), 0
        while True:
            for chosen in torch.randperm(len(labels), generator=generator).split(plan.batch):
                cost += len(chosen)
                yield cost, inputs[chosen], labels[chosen], 1.0

    def collate(places: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(places)
        return inputs[chosen], labels[chosen]

    loader = ImportanceLoader(
        range(len(labels)), model, cross_entropy, plan.batch, collate_fn=collate, seed=seed,
        **ARMS[arm],
    )  # fmt: skip
    while True:
        for _, chosen, targets, weights in loader:
            cost = sum(epoch.equivalent for epoch in loader.costs)
            yield cost, chosen, targets, weights


def train(arm: str, task: ScoredTask, plan: Plan, rate: float, seed: int) -> Curve:
    """Return the training loss by cost, in epochs; a run that diverged ends with infinity."""
    torch.manual_seed(seed)
    model = without_dropout(task.model())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    inputs, labels = (part[:LOOKED_AT] for part in task.train)
    samples, curve = len(task.train[1]), []
    for cost, x, y, weights in steps(arm, task, model, plan, seed):
        optimizer.zero_grad()
        (weights * cross_entropy(model(x), y, reduction="none")).mean().backward()
        optimizer.step()
        if cost / samples < (len(curve) + 1) / plan.looks:
            continue
        model.eval()
        with torch.no_grad():
            loss = float(cross_entropy(model(inputs), labels))
        model.train()
        curve.append((cost / samples, loss if math.isfinite(loss) else math.inf))
        if len(curve) == plan.epochs * plan.looks or not math.isfinite(loss):
            return curve
    raise AssertionError("batches have no end")


def without_dropout(model: nn.Module) -> nn.Module:
    """Return the model without dropout, which scoring switches off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tuned(arm: str, task: ScoredTask, plan: Plan) -> tuple[float, dict[float, float]]:
    """Return the learning rate with the least loss at the end, and the losses of all."""
    ends = {}
    for rate in plan.rates:
        # At the last quarter of the looks, since single looks are noisy.
        found = [tail(train(arm, task, plan, rate, 1000 + n)) for n in range(plan.tuning)]
        ends[rate] = statistics.mean(found)
    return min(ends, key=lambda rate: ends[rate]), ends


def tail(curve: Curve) -> float:
    """Return the median loss of the last quarter of a curve; infinity if it diverged."""
    if math.isinf(curve[-1][1]):
        return math.inf
    return statistics.median(loss for _, loss in curve[-max(1, len(curve) // 4) :])


def reached(curve: Curve, target: float) -> float:
    """Return the cost at which a curve first is at a loss; infinity if never."""
    return next((cost for cost, loss in curve if loss <= target), math.inf)


def draw(task: str, curves: dict[str, list[Curve]], rates: dict[str, float], path: Path) -> None:
    """Write the picture: the median and the range over seeds by cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (arm, runs) in enumerate(curves.items()):
        length = min(map(len, runs))
        costs = [statistics.median(run[k][0] for run in runs) for k in range(length)]
        losses = [sorted(run[k][1] for run in runs) for k in range(length)]
        middle = [statistics.median(found) for found in losses]
        axes.plot(costs, middle, color=f"C{number}", label=f"{arm}, lr {rates[arm]:g}")
        low, high = [f[0] for f in losses], [f[-1] for f in losses]
        axes.fill_between(costs, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("cost in epochs: trained samples and a third of the scored ones")
    axes.set_ylabel("training loss in nats")
    seeds = len(next(iter(curves.values())))
    axes.set_title(f"{task}: median and range of {seeds} seeds")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=PLANS, required=True)
    parser.add_argument("--data", type=Path, help="folder with the files of the task")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    plan, begin = PLANS[given.task], time.perf_counter()
    task = STUDY_TASKS[given.task].load(0, given.data)
    rates, curves = {}, {}
    for arm in ARMS:
        rates[arm], ends = tuned(arm, task, plan)
        print(f"{arm}: " + ", ".join(f"lr {rate:g} {loss:.4g}" for rate, loss in ends.items()))
        at_edge = rates[arm] in (plan.rates[0], plan.rates[-1])
        print(f"  best lr {rates[arm]:g}" + (", at the edge of the grid" if at_edge else ""))
        curves[arm] = [train(arm, task, plan, rates[arm], seed) for seed in range(plan.seeds)]
        sys.stdout.flush()
    for arm, runs in curves.items():
        ratios = []
        for run, base in zip(runs, curves["uniform"], strict=True):
            target = tail(base)
            ratios.append(reached(run, target) / reached(base, target))
        ends = sorted(tail(run) for run in runs)
        print(f"{arm}: loss at the end {', '.join(f'{end:.3g}' for end in ends)}")
        costs = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"  cost to the uniform run's loss, by that of the uniform run: {costs}")
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / f"{given.task}.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["arm", "lr", "seed", "cost in epochs", "training loss"])
        for arm, runs in curves.items():
            for seed, run in enumerate(runs):
                rows.writerows(
                    [arm, rates[arm], seed, f"{c:.4f}", f"{loss:.6g}"] for c, loss in run
                )
    draw(given.task, curves, rates, given.out / f"{given.task}.png")
    print(f"{time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
