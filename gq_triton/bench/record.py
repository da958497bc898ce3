"""A run's lines as a table for the terminal, as Markdown and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from gq_triton.bench.run import Line

__all__ = ["as_csv", "as_markdown", "as_table", "cell", "from_csv"]

_OWN = [name for name in Line.__dataclass_fields__ if name != "more"]


def cell(value: Any) -> str:
    """Return a value with three digits."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _more(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line.more))


def _cells(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a table for readers, without columns that are empty."""
    more = _more(lines)
    head = ["case", "step", "median", "20 to 80 %", "ratio", "20 to 80 %", *more, "note"]
    rows = []
    for line in lines:
        shown = f"{cell(line.median)} {line.unit}" if line.median != "" else ""
        ranges = [
            f"{cell(low)} to {cell(high)}" if low != "" else ""
            for low, high in ((line.low, line.high), (line.ratio_low, line.ratio_high))
        ]
        rows.append(
            [line.case, line.step, shown, ranges[0], cell(line.ratio), ranges[1]]
            + [cell(line.more.get(name, "")) for name in more]
            + [line.note]
        )
    kept = [n for n in range(len(head)) if n < 2 or any(row[n] for row in rows)]
    return [head[n] for n in kept], [[row[n] for n in kept] for row in rows]


def as_table(title: str, lines: Sequence[Line]) -> Any:
    """Return the lines as a table of rich."""
    from rich.table import Table

    head, rows = _cells(lines)
    table = Table(*head, title=title)
    before = ""
    for row in rows:
        table.add_row("" if row[0] == before else row[0], *row[1:])
        before = row[0]
    return table


def as_markdown(lines: Sequence[Line]) -> str:
    """Return the lines as a table in Markdown."""
    head, rows = _cells(lines)
    written = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(c.replace("|", "/") for c in row) + " |\n" for row in written)


def as_csv(lines: Sequence[Line], facts: Mapping[str, str]) -> str:
    """Return the lines as CSV, below the facts about hardware and versions as ``# name: fact``."""
    more = _more(lines)
    written = io.StringIO()
    written.writelines(f"# {name}: {fact}\n" for name, fact in facts.items())
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow([*_OWN, *more])
    for line in lines:
        own = [getattr(line, name) for name in _OWN] + [line.more.get(name, "") for name in more]
        writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in own])
    return written.getvalue()


def from_csv(text: str) -> tuple[list[Line], dict[str, str]]:
    """Return the lines and the facts that ``as_csv`` wrote."""
    rows = text.splitlines()
    head = [row[2:] for row in rows if row.startswith("# ")]
    facts = dict(row.split(": ", 1) for row in head)
    lines = []
    for row in csv.DictReader(rows[len(head) :]):
        own = {name: _value(name, row.pop(name)) for name in _OWN}
        more = {name: _value(name, value) for name, value in row.items() if value}
        lines.append(Line(**own, more=more))
    return lines, facts


def _value(name: str, text: str) -> Any:
    words = name in ("part", "case", "step", "unit", "note") or not text
    return text if words else float(text)
