"""benchmarks/ranks.py on a small model: its rows, the queue's memory, the bytes sent."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "ranks.py"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # it imports models.py beside it
    monkeypatch.delitem(sys.modules, "models", raising=False)
    spec = importlib.util.spec_from_file_location("benchmark_ranks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    yield loaded
    sys.modules.pop("models", None)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--models", "small", *options]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=240
    )


def test_resnet50_is_the_one_of_imagenet(module):
    with torch.device("meta"):
        model = module.MODELS["resnet50"]()
    assert sum(param.numel() for param in model.parameters()) == 25_557_032
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


def test_ratios_are_those_of_a_turn(module):
    cells = module.row("K", [0.002, 0.009, 0.004], [0.001, 0.003, 0.004], 3 << 20, 1.5 * 2**20)
    assert cells == ["K", "4.0", "2.00", "1.00 to 3.00", "3.000", "1.500"]


def table_of(output: str) -> dict[str, list[str]]:
    rows = [re.split(r"\s*│\s*", line)[1:-1] for line in output.splitlines() if line[:1] == "│"]
    return {cells[0]: cells[1:] for cells in rows}


@pytest.mark.slow
def test_fsdp2_with_clusters_sends_three_more_numbers_per_element(module):
    done = run("--wrap", "fsdp", "--steps", "1", "--batch", "4", "--cases", "clusters")
    assert done.returncode == 0, done.stderr
    table = table_of(done.stdout)
    assert list(table) == ["plain FSDP2", "n_clusters=4, features=features"]
    size = sum(param.nbytes for param in module.MODELS["small"]().parameters()) / 2**20
    plain, clustered = (float(cells[4]) for cells in table.values())
    # Two ranks send half of each payload: mean, 1 / sigma and the raw gradient.
    assert clustered - plain == pytest.approx(1.5 * size, rel=0.02)


@pytest.mark.rare
@pytest.mark.slow
def test_two_ranks_print_one_table(module):
    done = run("--steps", "1", "--batch", "4", "--backend", "torch")
    assert done.returncode == 0, done.stderr
    assert len(re.findall("ratio to plain DDP", done.stdout)) == 1
    table = table_of(done.stdout)
    assert list(table) == [
        "plain DDP",
        "n_clusters=None",
        "n_clusters=None, shard_queue=True",
        "n_clusters=4, features=features",
        "n_clusters=4, features=features, shard_queue=True",
    ]
    assert table["plain DDP"][1] == "1.00"
    model = module.MODELS["small"]()
    size = sum(param.nbytes for param in model.parameters()) / 2**20
    queues, wires = ([float(cells[place]) for cells in table.values()] for place in (3, 4))
    near = 0.0006  # the table has three decimals; padding and votes add a few bytes
    # Slices with clusters also hold the mean and 1 / sigma of all elements.
    assert queues == pytest.approx([0, 5 * size, 2.5 * size, 5 * size, 4.5 * size], abs=near)
    # Each of two ranks sends the payload of an all-reduce once, and on average half a broadcast's.
    buffers = sum(buffer.nbytes for buffer in model.buffers()) / 2**20 / 2
    plain = size + buffers
    # With clusters two float64 numbers per parameter say what a rank's samples count.
    masses = sum(16 for _ in model.parameters()) / 2**20
    clustered = plain + size + masses
    every = [plain, plain, plain, clustered, clustered + 0.5 * size]
    assert wires == pytest.approx(every, abs=near)


def test_no_steps_are_refused(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--models", "small", "--steps", "0"])
    with pytest.raises(SystemExit, match=r"^2$"):
        module.main()
    assert "--steps must be at least 1" in capsys.readouterr().err
