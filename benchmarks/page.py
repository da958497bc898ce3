"""Write the tables of docs/benchmarks.md from the newest results of `gq-triton bench`.

    python benchmarks/page.py

Between ``<!-- bench: DEVICE THEME -->`` and ``<!-- end -->`` stands what the newest file of
benchmarks/results/ says of that device and theme: the hardware, and the ratios. Where there is no
file, the text stays. The theme ``summary`` is a sentence from several files.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from gq_triton.bench.optimizer import PAIRS
from gq_triton.bench.record import cell, from_csv
from gq_triton.bench.run import Line

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
# Columns that get a table of their own, where a case has one row.
WIDE = {"optimizer": ["of a copy"], "clusters": ["peak MiB"], "kmeans": []}


def ratio(line: Line) -> str:
    """Return the ratio of a step and its quantiles; the base has its time."""
    if line.note:
        return line.note.partition(":")[0]
    if line.ratio == line.ratio_low == line.ratio_high == 1:
        return f"{cell(line.median)} {line.unit}"
    return f"{cell(line.ratio)} ({cell(line.ratio_low)} to {cell(line.ratio_high)})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    written = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in written)


def by_case(lines: Sequence[Line], value: Callable[[Line], str]) -> str:
    """Return a table with a row for each case and a column for each step.

    The optimizers have a table each, since few columns hold for both.
    """
    last = [line.case.rpartition(", ")[2] for line in lines]
    kinds = list(dict.fromkeys(last)) if set(last) <= {*PAIRS} else [""]
    text = []
    for kind in kinds:
        mine = [line for line in lines if line.case.endswith(kind)]
        steps = list(dict.fromkeys(line.step for line in mine))
        rows = []
        for case in dict.fromkeys(line.case for line in mine):
            found = {line.step: value(line) for line in mine if line.case == case}
            rows.append([case.removesuffix(f", {kind}"), *[found.get(step, "") for step in steps]])
        text.append(table([kind, *steps], rows))
    return "\n".join(text)


def by_step(lines: Sequence[Line]) -> str:
    """Return a table for each case, with a row for each step."""
    more = list(dict.fromkeys(name for line in lines for name in line.more))
    text = []
    for case in dict.fromkeys(line.case for line in lines):
        rows = [
            [line.step, ratio(line), *[cell(line.more.get(name, "")) for name in more]]
            for line in lines
            if line.case == case
        ]
        text.append(table([case, "time", *more], rows))
    return "\n".join(text)


def newest(device: str, theme: str) -> Path | None:
    """Return the newest file of a device and theme, if there is one."""
    return max(RESULTS.glob(f"*_{device}_{theme}.csv"), default=None)


def lines_of(device: str, theme: str) -> list[Line]:
    file = newest(device, theme)
    return from_csv(file.read_text(encoding="utf-8"))[0] if file else []


def spread(lines: Sequence[Line]) -> str:
    """Return the least and the greatest ratio in words."""
    found = sorted(float(line.ratio) for line in lines if line.ratio != "")
    return " to ".join(dict.fromkeys(f"{value:.1f}" for value in (found[0], found[-1])))


def summary(device: str) -> str | None:
    """Return a sentence on what the doors cost, or None where a theme was not measured."""
    steps = [
        line for line in lines_of(device, "optimizer")
        if line.step in ("GQAdamW", "GQSGD") and "tensors" not in line.case
    ]  # fmt: skip
    clusters = [
        line for line in lines_of(device, "clusters")
        if line.step == "clusters" and line.case.endswith("K = 8")
    ]  # fmt: skip
    # The first row of a model has its usual batch.
    usual = {line.case.partition(",")[0]: line for line in reversed(clusters)}.values()
    small = [line for line in clusters if line not in usual]
    also = f" ({spread(small)} times in small batches)" if small else ""
    hook = [line for line in lines_of(device, "hook") if line.step == "n_clusters=None"]
    if not (steps and clusters and hook):
        return None
    return textwrap.fill(
        f"On the {device.upper()} a step of the optimizers takes {spread(steps)} times as long as "
        f"torch's fused one, a step with 8 clusters {spread(list(usual))} times as long as the "
        f"plain step{also}, and one with the DDP hook {spread(hook)} times as long as with plain "
        "DDP.",
        120,
    )


def section(device: str, theme: str) -> str | None:
    """Return what stands between the marks of a device and theme."""
    if theme == "summary":
        return summary(device)
    file = newest(device, theme)
    if file is None:
        return None
    lines, facts = from_csv(file.read_text(encoding="utf-8"))
    machine = [line for line in lines if line.case == "machine"]
    lines = [line for line in lines if line.case != "machine"]
    told = [facts.pop("device"), f"{facts.pop('threads')} threads", facts.pop("date")]
    told += [f"{name} {fact}" for name, fact in facts.items()]
    told += [f"{line.step} {cell(line.median)} {line.unit}" for line in machine]
    text = [f"*{', '.join(told)}; `gq-triton bench --only {theme}`, {file.name}*", ""]
    if theme not in WIDE:
        return "\n".join([*text, by_step(lines)])
    text.append(by_case(lines, ratio))
    for name in WIDE[theme]:
        text += [f"{name[0].upper()}{name[1:]}:", ""]
        having = [line for line in lines if name in line.more]
        text.append(by_case(having, lambda line, name=name: cell(line.more[name])))
    return "\n".join(text)


def page(text: str) -> str:
    """Return the page with its tables made anew."""

    def made(found: re.Match[str]) -> str:
        new = section(found[2], found[3])
        return found[0] if new is None else f"{found[1]}\n{new}\n{found[4]}"

    marks = r"(<!-- bench: (\w+) (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(marks, made, text, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
