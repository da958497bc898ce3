"""Set-up shared by all tests."""

import gc
import importlib.util
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

# Tests compute on small tensors, and several workers share the cores: each worker takes one thread,
# and so does every process that it starts. torch reads the variable when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so it must be set before kernels are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The server that ranks are forked from imports a module of the helpers; before Python 3.13 it does
# not learn this process's sys.path.
HELPERS = str(Path(__file__).with_name("helpers"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HELPERS, os.environ.get("PYTHONPATH")]))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# `python -m pytest` puts the repository root on the path, where kernels/ and dist/ would be found a
# second time under those names. Without an installed gq_triton the root is all there is: keep it.
ROOT = Path(__file__).resolve().parents[1]
_path = list(sys.path)
sys.path[:] = [entry for entry in _path if Path(entry).resolve() != ROOT]
if importlib.util.find_spec("gq_triton") is None:
    sys.path[:] = _path

if INTERPRETED and importlib.util.find_spec("triton") is not None:
    import quick_interpreter  # after the path is put right

    quick_interpreter.install()


# The longest files, longest first: a long file that begins late would let one worker run alone.
LONGEST = [
    "test_dist_clusters.py",
    "test_kernel_compile.py",
    "test_study_command.py",
    "test_dist_shard.py",
    "test_restart.py",
    "test_optim_batches.py",
    "test_train.py",
    "test_cluster_compile.py",
    "test_dist_hook.py",
    "test_multi_node.py",
    "test_study_ranks.py",
    "test_documentation.py",
    "test_frameworks.py",
    "test_optim_fsdp2.py",
]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """Return a function from a number of ranks, 2 or 3, to the folder of an uninterrupted run.

    The workers of pytest-xdist share the runs: the worker that first needs a run makes it.
    """
    from train_runs import SCRIPT, SHORT, start, torchrun  # after the path is put right

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def folder(ranks):
        out = base / f"whole-{ranks}-ranks"
        with FileLock(f"{out}.lock"):
            if not (out / "summary.json").exists():
                shutil.rmtree(out, ignore_errors=True)
                if ranks == 2:
                    code, shown = torchrun(ranks, SCRIPT, *SHORT, "--task", "digits", "--out", out)
                    assert code == 0, shown
                else:
                    assert start(ranks, SCRIPT, *SHORT, "--out", out) == [0] * ranks
        return out

    return folder


@pytest.fixture(scope="module")
def ranks():
    """Return a function from a number of ranks to their ``gq_triton.testing.Ranks``.

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


def pytest_configure(config):
    """Be a worker of pytest-xdist: take ranks from the server of the controller."""
    if address := getattr(config, "workerinput", {}).get("server"):
        import one_server  # after the path is put right

        one_server.use(address)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist: its controller starts a worker
def pytest_configure_node(node):
    """Start the server of the ranks of all workers; it prepares while they collect."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        import one_server  # after the path is put right

        node.workerinput["server"] = one_server.started()


def pytest_collection_finish():
    """Keep what was imported out of every garbage collection: it is most of the heap, and stays.

    Many tests collect garbage to see what a deleted object leaves behind.
    """
    gc.collect()
    gc.freeze()


LEFT_OUT = pytest.StashKey[int]()
RARE = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config, items):
    """Leave out rare cases and tests without their CUDA device; begin with the longest files."""
    if not torch.cuda.is_available():
        kept = [item for item in items if item.get_closest_marker("gpu") is None]
        config.stash[LEFT_OUT] = len(items) - len(kept)
        items[:] = kept
    if os.environ.get("GQ_TRITON_EVERY_CASE") != "1":
        kept = [item for item in items if item.get_closest_marker("rare") is None]
        config.stash[RARE] = len(items) - len(kept)
        items[:] = kept
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))
    if hasattr(config, "workeroutput"):
        config.workeroutput["left out"] = config.stash.get(LEFT_OUT, 0)
        config.workeroutput["rare"] = config.stash.get(RARE, 0)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist: its workers collect, its controller reports
def pytest_testnodedown(node):
    """Keep the number of tests that a worker left out; all workers leave out the same."""
    # A worker that died has no output.
    output = getattr(node, "workeroutput", {})
    node.config.stash[LEFT_OUT] = output.get("left out", 0)
    node.config.stash[RARE] = output.get("rare", 0)


def pytest_terminal_summary(terminalreporter, config):
    """Print in one line how many tests were left out, instead of a skip for each."""
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"Left out: {count} tests that need a CUDA device.")
    if count := config.stash.get(RARE, 0):
        terminalreporter.write_line(f"Left out: {count} rare cases, which make test-all runs.")
