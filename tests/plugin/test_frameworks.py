"""The callbacks in training frameworks, on one process and on two, on the CPU."""

import importlib
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed as dist
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


def on_two_ranks_and_then_on_one(rank, folder, port):
    # Set here: the server that ranks are forked from keeps the environment that it began with.
    own = {"MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {**WORLD, **own}
    two_ranks(rank, f"{folder}/two")
    # The same processes go on: to import the frameworks takes as long as to train with them.
    for name in {*WORLD, *own} - {"ACCELERATE_USE_CPU", "HF_HUB_OFFLINE"}:
        del os.environ[name]
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    dist.destroy_process_group()
    if rank == 0:
        alone(f"{folder}/one")
        os.chdir(f"{folder}/one")
        for name in ("lightning_trainer", "transformers_trainer"):
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    # The code that ends the process expects a group.
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)


@pytest.mark.slow
def test_frameworks_train_save_and_resume_and_their_examples_run(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    port = str(free_port())
    spawn(2, on_two_ranks_and_then_on_one, str(tmp_path), port, timeout=300.0)


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
