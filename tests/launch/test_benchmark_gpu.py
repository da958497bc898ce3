"""benchmarks/gpu.py on the CPU, in its reduced form: it checks, it times, it names what fails."""

from pathlib import Path

import pytest
import torch
from train_runs import start_and_listen

from gq_triton.bench.record import from_csv

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
PARTS = "optimizers", "clusters", "compiled", "k-means"


@pytest.mark.slow
def test_parts_run_on_the_cpu(tmp_path):
    file = tmp_path / "result.csv"
    # gq-triton bench, which is tested too, has the same checks and steps on ranks.
    options = ["--device", "cpu", "--turns", "1", "--csv", file, "--parts", *PARTS]
    ((code, said),) = start_and_listen(1, SCRIPT, *options)
    assert code == 0, said
    lines, facts = from_csv(file.read_text())
    assert facts["torch"] == torch.__version__
    assert {line.part for line in lines} == {"optimizers", "clusters", "k-means"}
    assert any("compiled" in line.case for line in lines)
    for line in lines:
        assert float(line.median) >= 0
        assert float(line.ratio_low) <= float(line.ratio)
