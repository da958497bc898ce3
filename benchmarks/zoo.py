"""Write docs/models.md: how GradQueue's clusters treat the architectures of the zoo.

    python benchmarks/zoo.py
    python benchmarks/zoo.py --models GPT-2 Swin

The zoo is in tests/helpers. Each model is measured in a process of its own, and one that was
measured before, by the same command, is not measured again: --again does.
"""

import argparse
import copy
import datetime
import json
import multiprocessing
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gq_triton import GradQueue
from gq_triton.bench.harness import in_turns
from gq_triton.bench.peak import in_process, peak

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from zoo import SMALL, Case, batch_of, cases, losses_of, prepared  # noqa: E402
from zoo_oracle import TIERS, feature_layer, judge  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
ROWS = ROOT / "out" / "models.jsonl"
# With two or four samples the rows of most layers are a multiple of the batch, with five they are
# not, and with eight the batch is as long as the sequences.
BATCHES = (2, 4, 5, 8)
CLUSTERS, SAMPLES, TURNS = 8, 16, 7


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def compared(case: Case) -> dict[str, Any]:
    """Return shares of elements, largest errors and what a strict queue says."""
    row: dict[str, Any] = {}
    try:
        verdicts = [judge(case, samples) for samples in BATCHES]
        row["elements"] = sum(verdicts[0].elements.values())
        row["shares"] = verdicts[0].shares()
        row["error"] = max(verdict.worst[1] for verdict in verdicts)
        row["wrong"] = sorted({line for verdict in verdicts for line in verdict.problems()})
        row["warned"] = verdicts[0].warned
    except (RuntimeError, ValueError) as error:
        row["refused"] = first_line(error)
    try:
        row["microbatch"] = judge(case, mode="microbatch").worst[1]
    except (RuntimeError, ValueError) as error:
        row["microbatch"] = first_line(error)
    try:
        judge(case, steps=1, strict=True)
        row["strict"] = "passes"
    except (RuntimeError, ValueError) as error:
        row["strict"] = first_line(error)
    return row


def timed(case: Case, threads: int) -> dict[str, float]:
    """Return time and peak memory of a step with clusters over those of the plain step."""
    torch.set_num_threads(threads)
    plain = prepared(case, SMALL, torch.float32, moved=False)
    batch = batch_of(case, SMALL, SAMPLES, torch.float32, seed=1)
    ours = copy.deepcopy(plain)
    layer = case.features or feature_layer(case, copy.deepcopy(plain), batch)
    queue = GradQueue(ours, n_clusters=CLUSTERS, features=layer)

    def step_of(model: torch.nn.Module, clustered: bool) -> Callable[[], None]:
        params = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.SGD(params, lr=0.0, momentum=0.9)
        if clustered:
            queue.attach(optimizer)

        def step() -> None:
            optimizer.zero_grad()
            losses_of(case, model, batch).mean().backward()
            optimizer.step()

        return step

    steps = [step_of(plain, False), step_of(ours, True)]
    for _ in range(6):  # fills the queue
        steps[1]()
    steps[0]()
    other, mine = in_turns(steps, TURNS)
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    peaks = [peak(step, torch.device("cpu")) for step in steps]
    return {"plain_ms": 1000 * other[-1], "time": statistics.median(ratios),
            "memory": peaks[1] / max(peaks[0], 4096), "plain_mib": peaks[0] / 2**20}  # fmt: skip


def measure(name: str, threads: int) -> dict[str, Any]:
    """Return the row of one model."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    case = cases()[name]
    row = {"name": name, "group": case.group, **compared(case)}
    if "refused" not in row:
        row |= timed(case, threads)
    return row


def row_of(name: str, threads: int) -> dict[str, Any]:
    """Return the row of one model from a process of its own."""
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    died = {"name": name, "group": cases()[name].group, "refused": "the process died"}
    return in_process(context, measure, name, threads) or died


def share(value: float) -> str:
    if value == 0:
        return ""
    if value > 0.9999999:
        return "100 %"
    return f"{100 * value:.1f} %" if 0.001 < value < 0.999 else ("< 0.1 %", "> 99.9 %")[value > 0.5]


def cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row of the page."""
    if "refused" in row:
        return [row["name"], *[""] * len(TIERS), f"refused: {row['refused']}", "", "", "", ""]
    strict = "passes" if row["strict"] == "passes" else "refuses"
    micro = row["microbatch"]
    micro = micro if isinstance(micro, str) else f"{micro:.0e}"
    shares = [share(row["shares"][tier]) for tier in TIERS]
    wrong = f"**{row['error']:.0e}**" if row["wrong"] else f"{row['error']:.0e}"
    ratios = [f"{row['time']:.2f}", f"{row['memory']:.2f}"]
    return [row["name"], *shares, wrong, micro, strict, *ratios]


def page_of(rows: list[dict[str, Any]], threads: int) -> str:
    """Return the text of docs/models.md."""
    import importlib.metadata as metadata

    versions = ", ".join(
        f"{package} {metadata.version(package)}"
        for package in ("torch", "transformers", "timm", "peft")
        if any(case.needs == package for case in cases().values())
    )
    whole = [row for row in rows if "shares" in row]
    summed = {tier: sum(row["shares"][tier] > 0.9999999 for row in whole) for tier in TIERS}
    text = [
        HEAD.format(
            count=len(rows), batches=", ".join(map(str, BATCHES[:-1])), last=BATCHES[-1],
            taken=len(whole), native=summed[TIERS[0]],
            right=sum(not row["wrong"] for row in whole),
            strict=sum(row["strict"] == "passes" for row in whole), clusters=CLUSTERS,
            samples=SAMPLES, threads=threads, versions=versions, machine=platform.machine(),
            date=datetime.date.today(), turns=TURNS,
        )
    ]  # fmt: skip
    columns = ["model", *TIERS, "largest error", "microbatch", "`strict=True`", "time", "memory"]
    for group in dict.fromkeys(row["group"] for row in rows):
        title = group if "." in group else f"{group[0].upper()}{group[1:]}"
        text += ["", f"## {title}", ""]
        text += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        text += [f"| {' | '.join(cells(row))} |" for row in rows if row["group"] == group]
    reasons = [f"- {row['name']}: {row['strict']}" for row in whole if row["strict"] != "passes"]
    if reasons:
        text += ["", "## Why `strict=True` refuses", "", *reasons]
    return "\n".join(text) + "\n"


HEAD = """# Models

Clusters were tried on {count} architectures, built from their public configurations, small and
random, and run as they are. Without options {taken} of them train; every parameter of {right} has
the gradient that K plain backward passes and the law in plain torch give. {strict} pass
`strict=True`.

`python benchmarks/zoo.py` writes this page; the models are in `tests/helpers/zoo.py` and the files
beside it.

- **native**, **expanded**, **fallback**, **one cluster**: the share of the model's elements whose
  gradient is summed by cluster by the layer itself, by expanding a parameter over the batch, by one
  more pass of the layer, or weighted as one cluster.
- **largest error**: of any parameter in any step, relative to the norm of its gradient, in float64,
  for batches of {batches} and {last} samples whose cluster changes from sample to sample. A
  parameter that is weighted as one cluster is compared with the law of its whole gradient. Dropout
  is off and batch norms use their running statistics, since otherwise no sample has a gradient of
  its own.
- **microbatch**: the same with `mode="microbatch"`.
- **time**, **memory**: of a step with {clusters} clusters of {samples} samples over the plain step,
  in float32, time as the median of {turns} turns of one run; memory is that above what is held
  between steps, so without the queue ({threads} threads, {machine}, {versions}, {date}).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", help="names, or parts of names; all by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure again what was measured")
    args = parser.parse_args()
    known = list(cases())
    chosen = [n for n in known if not args.models or any(part in n for part in args.models)]
    rows: dict[str, dict[str, Any]] = {}
    if ROWS.exists():
        rows = {row["name"]: row for row in map(json.loads, ROWS.read_text().splitlines())}
    ROWS.parent.mkdir(exist_ok=True)
    console = Console()
    for name in chosen:
        if args.again or name not in rows:
            with console.status(name):
                rows[name] = row_of(name, args.threads)
            console.print(" | ".join(cells(rows[name])), markup=False, soft_wrap=True)
            ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    PAGE.write_text(page_of([rows[name] for name in known if name in rows], args.threads))


if __name__ == "__main__":
    main()
