"""The files of docs/study: enough to compute the page's numbers again, and no more."""

import csv
import re
from pathlib import Path

import pytest

from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.study_file import read_toml
from gq_triton.study.report.statistics import compare

DOCS = Path(__file__).resolve().parents[2] / "docs"
KEPT = DOCS / "study"


def test_every_picture_that_is_kept_is_shown_and_every_one_shown_is_kept():
    pages = "".join((DOCS / name).read_text() for name in ("study.md", "questions.md"))
    shown = set(re.findall(r"\]\((study/\S+\.png)\)", pages))
    assert shown == {path.relative_to(DOCS).as_posix() for path in KEPT.rglob("*.png")}


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in KEPT.rglob("*") if path.is_file()) < 3e6


@pytest.mark.parametrize("path", sorted(KEPT.rglob("*study.toml")), ids=lambda p: p.parent.name)
def test_a_kept_study_can_be_asked_for_again(path):
    config = StudyConfig.of(read_toml(path))
    with path.with_name(path.name.replace("study.toml", "results.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert len(config.tasks) == 1  # so the rows need no column for it
    assert "task" not in rows[0]
    assert {row["arm"] for row in rows} <= set(config.arms)
    assert {row["control"] for row in rows} - {""} <= set(config.controls)


@pytest.mark.parametrize(
    ("study", "arms", "size", "said"),
    [
        ("python-lm-beta1", ("adamw", "gq-adamw-clusters"), 128, "-.021 [-.126, +.087]"),
        ("python-lm-beta1-fixed", ("adamw", "gq-adamw-clusters"), 128, "+.158 [+.138, +.185]"),
        ("python-lm-sgd", ("sgdm", "gq-sgdm-clusters"), 128, "-.023 [-.138, +.071]"),
        ("bursts-rho10", ("gq-sgdm", "sgdm"), 32, "+.016 [+.009, +.023]"),
        ("fashion-1024", ("gq-sgdm", "sgdm"), 1024, "-.014 [-.018, -.011]"),
        ("fashion-1024", ("gq-adamw-clusters", "adamw"), 1024, "-.008 [-.011, -.004]"),
        ("fashion-16384", ("gq-adamw", "adamw"), 16384, "-.008 [-.011, -.005]"),
        ("python-lm-deep", ("adamw", "gq-adamw-clusters"), 32, "-.098 [-.109, -.090]"),
        ("reuters", ("gq-adamw-clusters", "adamw"), 1024, "+.020 [+.011, +.030]"),
        ("fashion-64", ("gq-sgdm", "sgdm"), 64, "-.003 [-.005, -.001]"),
        ("fashion-longtail-again", ("gq-sgdm-clusters", "sgdm"), 512, "+.045 [+.030, +.064]"),
        ("python-lm-all", ("adamw", "gq-adamw-clusters"), 128, "+.158 [+.105, +.232]"),
        ("python-lm-400", ("adamw", "gq-adamw"), 64, "-.038 [-.050, -.027]"),
        ("longtail", ("gq-sgdm", "sgdm"), 256, "-.014 [-.022, -.007]"),
        ("hidden", ("gq-sgdm", "sgdm"), 256, "-.122 [-.155, -.095]"),
    ],
)
def test_the_differences_on_the_page_come_from_the_rows(study, arms, size, said):
    """A difference is the first arm minus the second.

    For bits per byte, where less is better, the baseline comes first.
    """
    scores = {}
    with (KEPT / study / "results.csv").open() as file:
        for row in csv.DictReader(file):
            if row["batch_size"] == str(size) and not row["control"]:
                scores.setdefault(row["arm"], {})[row["seed"]] = float(row["score"])
    first, second = (scores[arm] for arm in arms)
    found = compare([first[seed] - second[seed] for seed in first])
    text = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]".replace("0.", ".")
    assert text == said
    assert said in (DOCS / "study.md").read_text().replace("**", "")
