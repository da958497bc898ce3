"""benchmarks/gpu.py on the CPU, in its reduced form: it checks, it times, it names what fails."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gq_triton.bench.record import from_csv

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
PARTS = "optimizers", "clusters", "compiled", "k-means"


@pytest.mark.slow
def test_parts_run_on_the_cpu(tmp_path):
    file = tmp_path / "result.csv"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--turns", "1", "--csv", str(file)]
    # gq-triton bench, which is tested too, has the same checks and steps on ranks.
    command += ["--parts", *PARTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines, facts = from_csv(file.read_text())
    assert facts["torch"] == torch.__version__
    assert {line.part for line in lines} == {"optimizers", "clusters", "k-means"}
    assert any("compiled" in line.case for line in lines)
    for line in lines:
        assert float(line.median) >= 0
        assert float(line.ratio_low) <= float(line.ratio)
