"""benchmarks/kernels.py without a GPU: both sides of a pair agree; the script asks for a GPU."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICES, QUIET

from gq_triton.bench.run import Run

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"
pytestmark = QUIET


def load():
    # The module gets another name, since test_packaging.py forbids a top-level module "kernels".
    spec = importlib.util.spec_from_file_location("benchmark_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_kernels"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SMALL = {
    "bias": {"rows": 60, "width": 20, "clusters": 3},
    "layer_norm": {"batch": 9, "positions": 5, "width": 20, "clusters": 3},
    "group_norm": {"batch": 9, "channels": 64, "side": 3, "clusters": 3},
    "linear": {
        "batch": 9, "positions": 5, "outputs": 20, "inputs": 17, "clusters": 3,
        "dtype": torch.float32,
    },
    "convolution": {"batch": 9, "channels": 8, "side": 4, "clusters": 3, "dtype": torch.float32},
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SMALL)
def test_both_sides_of_a_pair_agree(device, name):
    torch.manual_seed(0)
    case = getattr(load(), name)(torch.device(device), **SMALL[name])
    results = {step: function() for step, function in case.steps.items()}
    for ours, rival in case.pairs:
        if rival == "sum of all":  # it has no clusters
            ours = "total"
        scale = max(float(part.abs().max()) for part in results[rival])
        for mine, theirs in zip(results[ours], results[rival], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * scale)


def test_a_kernel_is_compared_with_torch():
    module, run = load(), Run(torch.device("cpu"), 100.0, turns=1)
    module.compare(run, "bias", module.bias(torch.device("cpu"), **SMALL["bias"]), calls=1)
    assert [line.step for line in run.lines] == ["torch", "position_sums"]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    module = load()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    with pytest.raises(SystemExit, match=r"^2$"):
        module.main()
    assert capsys.readouterr().err == "benchmarks/kernels.py needs a CUDA device: none was found.\n"
