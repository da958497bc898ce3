"""benchmarks/gpu.py on the CPU, in its reduced form: it checks, it times, it names what fails."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def record(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import record  # pyright: ignore[reportMissingImports]

    yield record
    sys.modules.pop("record", None)


@pytest.mark.slow
def test_all_parts_run_on_the_cpu(tmp_path):
    file = tmp_path / "result.csv"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--turns", "1", "--csv", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    with open(file, newline="") as source:
        lines = list(csv.DictReader(source))
    assert {line["part"] for line in lines} == {
        "check", "optimizers", "clusters", "k-means", "hook",
    }  # fmt: skip
    for line in lines:
        assert float(line["ours"]) >= 0
        assert line["torch"] == torch.__version__
        assert line["part"] == "check" or float(line["low"]) <= float(line["ratio"])


def test_what_fails_or_has_no_time_is_named(record):
    run = record.Run(torch.device("cpu"), 1000.0, turns=3)
    taken = iter([4.0, 2.0, 9.0, 3.0, 5.0, 5.0])
    run.taken = lambda step, calls: next(taken)
    with run.case("part", "first") as begins:
        assert begins
        line = run.compare("part", "first", lambda: None, lambda: None)
    assert (line.ours, line.rival, line.ratio, line.low, line.high) == (5.0, 3.0, 2.0, 1.0, 3.0)
    with run.case("part", "second"):
        raise RuntimeError("no room\nfor details")
    assert run.failures == ["part, second: RuntimeError: no room"]
    late = record.Run(torch.device("cpu"), -1.0, turns=3)
    with late.case("part", "third") as begins:
        assert not begins
    assert [line.note for line in run.lines + late.lines] == [
        "", "failed: RuntimeError: no room", "left out: no time",
    ]  # fmt: skip
