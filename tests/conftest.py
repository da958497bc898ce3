"""Set-up shared by all tests."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so it must be set before kernels are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `python -m pytest` puts the repository root on the path, where kernels/ and dist/ would be found a
# second time under those names. Without an installed gq_triton the root is all there is: keep it.
ROOT = Path(__file__).resolve().parents[1]
_path = list(sys.path)
sys.path[:] = [entry for entry in _path if Path(entry).resolve() != ROOT]
if importlib.util.find_spec("gq_triton") is None:
    sys.path[:] = _path


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """Return what gives the folder of a run of 2 or 3 ranks that nothing interrupted."""
    from train_runs import SCRIPT, SHORT, start, torchrun  # after the path is put right

    runs = {}

    def folder(ranks):
        if ranks not in runs:
            out = tmp_path_factory.mktemp("whole") / f"{ranks}-ranks"
            if ranks == 2:
                code, shown = torchrun(ranks, SCRIPT, *SHORT, "--task", "digits", "--out", out)
                assert code == 0, shown
            else:
                assert start(ranks, SCRIPT, *SHORT, "--out", out) == [0] * ranks
            runs[ranks] = out
        return runs[ranks]

    return folder


@pytest.fixture(scope="module")
def ranks():
    """Return what gives the ``gq_triton.testing.Ranks`` of a number of ranks.

    All tests of a module share them; after a failure the next test gets new ones.
    """
    from gq_triton.testing import Ranks  # after the path is put right

    started = {}

    def of(world_size):
        if world_size not in started or not started[world_size].alive:
            started[world_size] = Ranks(world_size)
        return started[world_size]

    yield of
    for one in started.values():
        one.close()


def pytest_collection_modifyitems(items):
    """Skip what needs more devices than this machine has."""
    devices = torch.cuda.device_count()
    for item in items:
        if devices < 1 and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="Needs a CUDA device."))
        if devices < 2 and item.get_closest_marker("multi_gpu"):
            item.add_marker(pytest.mark.skip(reason="Needs two CUDA devices."))
