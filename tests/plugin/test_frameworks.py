"""The callbacks in training frameworks, on one process and on two, on the CPU."""

import importlib
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from framework_checks import alone, two_ranks
from train_runs import free_port

from gq_triton.testing import spawn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# Variables that torchrun sets for its processes, and those that keep libraries off the network.
WORLD = {
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "TORCHELASTIC_RUN_ID": "test",
    "ACCELERATE_USE_CPU": "true",
    "HF_HUB_OFFLINE": "1",
}


def rank_of_torchrun(rank, folder, port):
    # Set here: the server that ranks are forked from keeps the environment that it began with.
    own = {"MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {**WORLD, **own}
    two_ranks(rank, folder)


@pytest.mark.slow
def test_frameworks_train_save_and_resume(tmp_path):
    spawn(2, rank_of_torchrun, str(tmp_path), str(free_port()), timeout=300.0)


def one_process(rank, folder):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    alone(rank, folder)
    os.chdir(folder)
    for name in ("lightning_trainer", "transformers_trainer"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.slow
def test_the_examples_run_on_one_device(tmp_path):
    spawn(1, one_process, str(tmp_path), timeout=300.0)


@pytest.mark.parametrize("framework", ["accelerate", "lightning", "transformers"])
def test_a_missing_framework_is_named_with_the_install_line(framework, monkeypatch):
    for name in ("accelerate", "lightning", "transformers"):
        monkeypatch.delitem(sys.modules, f"gq_triton.integrations.{name}", raising=False)
    if framework == "transformers":  # it imports the module of Accelerate's callback, too
        stand_in = ModuleType("accelerate")
        monkeypatch.setattr(stand_in, "Accelerator", object, raising=False)
        monkeypatch.setitem(sys.modules, "accelerate", stand_in)
    monkeypatch.setitem(sys.modules, framework, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {framework}: pip install "):
        importlib.import_module(f"gq_triton.integrations.{framework}")
