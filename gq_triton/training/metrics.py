"""The rows of ``metrics.jsonl``: one line of JSON per step and per epoch."""

import json
import math
from pathlib import Path
from typing import Any

from gq_triton.commands.files import whole_file
from gq_triton.saved.rules import Flag, Integer, ListOf, Maybe, Number, Record, Rule

__all__ = ["continue_metrics", "json_line", "read_metrics"]


_MEASURES = "loss", "lr", "grad_norm", "mean_weight", "norm_ratio", "effective_length"
_SCORES = "train_loss", "train_accuracy", "test_loss", "test_accuracy"
_ROWS: dict[str, Rule] = {
    "step": Record(
        {
            **dict.fromkeys(("step", "epoch"), Integer()),
            **dict.fromkeys(_MEASURES, Maybe(Number())),
            "skipped": Flag(),
        },
        {"cluster_sizes": ListOf(ListOf(Integer(), shortest=1), shortest=1)},
    ),
    "epoch": Record(
        {
            **dict.fromkeys(("step", "epoch", "skipped"), Integer()),
            **dict.fromkeys(_SCORES, Maybe(Number())),
        }
    ),
}


def json_line(row: dict[str, Any]) -> str:
    """Return a row as one line of JSON; NaN and infinity, which JSON lacks, become null."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(plain, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file that stand before its first damaged line.

    A killed process leaves half a line at the end; a power cut may damage several lines.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for line in lines[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        kind = _ROWS.get(str(row.get("kind"))) if isinstance(row, dict) else None
        if kind is None or any(kind.problems(row, "")):
            break
        rows.append(row)
    return rows


def continue_metrics(path: Path, step: int) -> None:
    """Drop the rows after a step, which a run that continues from that step writes again."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    with whole_file(path) as file:
        file.writelines(json_line(row).encode() for row in rows)
