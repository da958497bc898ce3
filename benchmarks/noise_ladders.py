"""Ladders of batch sizes: do the noise scales of runs predict where larger batches stop paying?

python benchmarks/noise_ladders.py --ladder digits-hidden --out runs/ladders
python benchmarks/noise_ladders.py --report --out runs/ladders

Every batch size is trained with AdamW at its own constant learning rate, chosen on one seed by
steps to the target. Fresh seeds at that rate give the ladder's steps, to which ``steps = least * (1
+ critical / batch)`` is fitted, and the noise scales of the same runs give the prediction. Finished
runs are kept in ``--out`` and are not repeated. One thread.
"""

import argparse
import csv
import io
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gq_triton.tasks import STUDY_TASKS, ScoredTask, batches, measure, sample_losses
from gq_triton.variance import NoiseScale
from gq_triton.variance.noise import CONSTANT

# The geometric mean of the critical batches of the six ladders that CONSTANT was fitted to.
SIX = (64 * 44 * 76 * 64 * 11 * 7.5) ** (1 / 6)
# Growth from one look at the validation data to the next.
LOOK = 1.08


@dataclass(frozen=True)
class Ladder:
    """A task, and the scores that its runs must reach.

    Attributes:
        task: its name.
        targets: scores, from the easiest to the hardest; the last one ends a run.
        sizes: batch sizes.
        first_lr: the learning rate tried first at the first size.
        looks_at: validation samples per look.
        most: steps after which a run gives up.
        tuned_on: seeds by whose mean steps the learning rate is chosen.
        seeds: fresh seeds at the chosen learning rate.
    """

    task: str
    targets: tuple[float, ...]
    sizes: tuple[int, ...]
    first_lr: float
    looks_at: int
    most: int
    tuned_on: tuple[int, ...] = (0,)
    seeds: tuple[int, ...] = (1, 2)


LADDERS = {
    "digits-hidden": Ladder(
        "digits-hidden", (0.6,), (8, 16, 32, 64, 128, 256, 512), 2e-3, 540, 12000,
        (10, 11, 12, 13, 14), (1, 2, 3, 4, 5, 6, 7, 8),
    ),
    "python-lm": Ladder(
        "python-lm", (3.3, 3.0), (8, 16, 32, 64, 128, 256), 2e-3, 128, 3000
    ),
    "fashion-mnist": Ladder(
        "fashion-mnist", (0.8,), (8, 16, 32, 64, 128, 256, 512), 1e-3, 1000, 6000,
        (10, 11, 12, 13), (1, 2, 3, 4, 5, 6),
    ),
}  # fmt: skip


class Run:
    """One training run up to the ladder's last target.

    Args:
        ladder: the ladder.
        task: its data.
        size: batch size.
        lr: learning rate.
        seed: of the weights and of the order of samples.
        cap: steps after which the run gives up.
        every: one of so many steps is measured; 0 measures none.
    """

    def __init__(
        self, ladder: Ladder, task: ScoredTask, size: int, lr: float, seed: int, cap: int,
        every: int,
    ) -> None:  # fmt: skip
        self.ladder, self.task, self.size, self.lr, self.seed = ladder, task, size, lr, seed
        self.cap, self.every = cap, every
        self.entry = STUDY_TASKS[ladder.task]

    def __call__(self) -> dict[str, Any]:
        """Train, and return the run's record."""
        torch.manual_seed(self.seed)
        model, started = self.task.model(), time.perf_counter()
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr)
        meter = NoiseScale(model, self.every, clusters=8, seed=self.seed) if self.every else None
        inputs, labels = self.task.train
        looks: list[tuple[int, float]] = [(0, self._score(model))]
        reached: list[float | None] = [None] * len(self.ladder.targets)
        order, epoch, step, due = torch.empty(0, dtype=torch.int64), 0, 0, 1
        while step < self.cap and reached[-1] is None:
            while len(order) < self.size:
                order = torch.cat([order, batches(len(labels), len(labels), self.seed, epoch)[0]])
                epoch += 1
            chosen, order = order[: self.size], order[self.size :]
            loss = sample_losses(model(inputs[chosen]), labels[chosen]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step >= due:
                if not math.isfinite(loss.item()):
                    break
                looks.append((step, self._score(model)))
                due = max(step + 1, math.ceil(step * LOOK))
                for place, target in enumerate(self.ladder.targets):
                    reached[place] = reached[place] or self._crossing(looks, target)
        rows = meter.history if meter is not None else []
        if meter is not None:
            meter.remove()
        return {
            "ladder": self.ladder.task, "size": self.size, "lr": self.lr, "seed": self.seed,
            "reached": reached, "steps": step, "noise": [self._noise(rows, end) for end in reached],
            "seconds": time.perf_counter() - started,
        }  # fmt: skip

    @torch.no_grad()
    def _score(self, model: nn.Module) -> float:
        number, groups = self.ladder.looks_at, self.task.groups
        inputs, labels = (t[:number] for t in self.task.validation)
        model.eval()
        outputs = model(inputs)
        model.train()
        chosen = None if groups is None else groups[0][:number]
        return measure(outputs, labels, chosen)[self.entry.score]

    def _crossing(self, looks: Sequence[tuple[int, float]], target: float) -> float | None:
        """Return the step at which the last look reached the target, between two looks."""
        (before, old), (after, new) = looks[-2:]
        if not self.entry.gain(new, target) >= 0:
            return None
        share = 1.0 if new == old else (target - old) / (new - old)
        return before + max(0.0, min(1.0, share)) * (after - before)

    @staticmethod
    def _noise(rows: Sequence[dict[str, float]], end: float | None) -> float | None:
        """Return the noise scale over the steps to a target; None where it was not reached."""
        used = [row for row in rows if end is not None and row["step"] <= math.ceil(end)]
        variance, signal = (math.fsum(row[n] for row in used) for n in ("variance", "signal"))
        return variance / signal if signal > 0 else None


class Records:
    """The finished runs of a folder, one line each."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "runs.jsonl"
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        self.all = [json.loads(line) for line in text.splitlines()]

    def of(self, run: Run) -> dict[str, Any]:
        """Return the record of a run, which is trained unless that was done before."""
        key = {"ladder": run.ladder.task, "size": run.size, "lr": run.lr, "seed": run.seed}
        for record in self.all:
            if all(record[name] == value for name, value in key.items()) and (
                record["reached"][-1] is not None or record["steps"] >= run.cap
            ):
                return record
        record = run()
        self.all.append(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
        return record


def climb(ladder: Ladder, task: ScoredTask, records: Records) -> None:
    """Train a ladder: for every batch size a learning rate by factors of 2, then fresh seeds."""
    lr = ladder.first_lr
    for size in ladder.sizes:

        def steps(rate: float, best: float, size: int = size) -> float:
            """Return the mean steps over the seeds; infinity where it is not below ``best``."""
            total, left = 0.0, best * len(ladder.tuned_on)
            for seed in ladder.tuned_on:
                cap = math.ceil(min(left - total, ladder.most))
                found = records.of(Run(ladder, task, size, rate, seed, max(cap, 1), 0))
                total += found["reached"][-1] or math.inf
                if total >= left:
                    return math.inf
            return total / len(ladder.tuned_on)

        best = steps(lr, ladder.most)
        for factor in (2.0, 0.5):
            rate = lr * factor
            # A run that is slower than the best one is of no use.
            while (found := steps(rate, min(best, ladder.most))) < best:
                best, lr, rate = found, rate, rate * factor
        for seed in ladder.seeds:
            records.of(Run(ladder, task, size, lr, seed, ladder.most, 1))
        lr *= math.sqrt(2)


class Result:
    """What a ladder says of one target.

    Args:
        ladder: the ladder.
        place: which of its targets.
        runs: its records of fresh seeds.
    """

    def __init__(self, ladder: Ladder, place: int, runs: Sequence[dict[str, Any]]) -> None:
        self.name = f"{ladder.task} to {ladder.targets[place]:g}"
        self.task, self.target = ladder.task, ladder.targets[place]
        self.rows = [
            (run["size"], run["lr"], run["seed"], run["reached"][place], run["noise"][place])
            for run in runs
            if run["reached"][place] is not None and run["noise"][place] is not None
        ]
        self.sizes = sorted({row[0] for row in self.rows})
        steps = [[row[3] for row in self.rows if row[0] == size] for size in self.sizes]
        noise = [[row[4] for row in self.rows if row[0] == size] for size in self.sizes]
        self.steps, self.noise = ([_mean(some) for some in values] for values in (steps, noise))
        self.critical, self.least = (found[0] for found in self._fit([self.steps]))
        generator = torch.Generator().manual_seed(0)
        drawn = [
            [_mean([some[i] for i in torch.randint(len(some), (len(some),), generator=generator)])
             for some in steps]
            for _ in range(1000)
        ]  # fmt: skip
        spread = torch.tensor(self._fit(drawn)[0]).quantile(torch.tensor([0.025, 0.975]))
        self.low, self.high = spread.tolist()
        self.predicted = CONSTANT * _mean(self.noise)

    def _fit(self, steps: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
        """Return critical batches and least steps, by least squares of logarithms."""
        grid = torch.logspace(-1, 4.5, 2000)
        curves = torch.log1p(grid[:, None] / torch.tensor(self.sizes))  # (grid, sizes)
        left = torch.tensor(steps).log()[:, None] - curves  # (fits, grid, sizes)
        level = left.mean(dim=2)
        best = (left - level[:, :, None]).square().sum(dim=2).argmin(dim=1)
        return grid[best].tolist(), level.gather(1, best[:, None])[:, 0].exp().tolist()


def _mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def write(out: Path, records: Records) -> None:
    """Write the runs of fresh seeds as CSV and the picture, and print a table of the results."""
    results = []
    for ladder in LADDERS.values():
        runs = [r for r in records.all if r["ladder"] == ladder.task and r["seed"] in ladder.seeds]
        results += [Result(ladder, place, runs) for place in range(len(ladder.targets)) if runs]
    with (out / "ladders.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["task", "target", "batch", "lr", "seed", "steps", "noise_scale"])
        for found in results:
            for size, lr, seed, steps, noise in found.rows:
                table.writerow([found.task, found.target, size, f"{lr:.3g}", seed,
                                f"{steps:.1f}", f"{noise:.4g}"])  # fmt: skip
    print("| ladder | batches | noise scale | predicted | fitted | fitted / predicted | constant |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r.name} | {r.sizes[0]} to {r.sizes[-1]} | {min(r.noise):.0f} to {max(r.noise):.0f}"
            f" | {r.predicted:.0f} | {r.critical:.0f} [{r.low:.0f}, {r.high:.0f}]"
            f" | {r.critical / r.predicted:.2f} | {r.critical / SIX:.2f} |"
        )
    (out / "ladders.png").write_bytes(draw(results))


def draw(results: Sequence[Result]) -> bytes:
    """Return a picture: steps against batch size, the fit, and what was predicted."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(4 * len(results), 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, found in zip(panels, results, strict=True):
        grid = [found.sizes[0] * 2 ** (n / 8) for n in range(8 * len(found.sizes))]
        grid = [size for size in grid if size <= found.sizes[-1]]

        def curve(critical: float, found: Result = found, grid: list[float] = grid) -> list[float]:
            """Return steps by the law with this critical batch, through the ladder's middle."""
            level = _mean([s / (1 + critical / b) for s, b in zip(found.steps, found.sizes,
                                                                 strict=True)])  # fmt: skip
            return [level * (1 + critical / size) for size in grid]

        panel.plot([row[0] for row in found.rows], [row[3] for row in found.rows], ".",
                   color="#8A8A8A", label="runs")  # fmt: skip
        panel.plot(found.sizes, found.steps, "o", color="#0072B2", label="mean of seeds")
        panel.plot(grid, curve(found.critical), color="#0072B2",
                   label=f"fitted, critical batch {found.critical:.0f}")  # fmt: skip
        panel.plot(grid, curve(found.predicted), "--", color="#D55E00",
                   label=f"predicted, {found.predicted:.0f}")  # fmt: skip
        panel.fill_between(grid, curve(found.predicted / 2), curve(found.predicted * 2),
                           color="#D55E00", alpha=0.15, label="half to twice that")  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set(title=found.name, xlabel="batch size", ylabel="steps to the target")
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ladder", choices=[*LADDERS], action="append", help="train this ladder")
    parser.add_argument("--data", type=Path, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished runs")
    parser.add_argument("--report", action="store_true", help="write ladders.csv and ladders.png")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    records = Records(given.out)
    for name in given.ladder or []:
        climb(LADDERS[name], STUDY_TASKS[name].load(0, given.data), records)
    if given.report:
        write(given.out, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
