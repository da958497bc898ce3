"""Results of a study in TensorBoard and W&B, whose modules are stood in for."""

import sys
import types

import pytest
from study_trials import run_here, trial

from gq_triton.commands import cli
from gq_triton.commands.refusal import Refusal
from gq_triton.study.run import watch
from gq_triton.study.run.tracker import tracker
from gq_triton.study.trials.training import run_trial

SMALL = ["--tasks", "lines-disc", "--arms", "sgdm", "--batch-sizes", "4", "--steps", "3",
         "--trials", "1", "--tuning-seeds", "1", "--seeds", "2"]  # fmt: skip


def test_tensorboard_gets_every_trial_by_one_option(tmp_path, monkeypatch):
    written, closed = {}, []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written[self.folder, name, step] = value

        def close(self):
            closed.append(self.folder)

    stand_in = types.ModuleType("tensorboard")
    vars(stand_in)["SummaryWriter"] = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(watch, "run_study", run_here)
    out = tmp_path / "out"
    assert cli.main(["study", "run", *SMALL, "--out", str(out), "--track", "tensorboard"]) == 0
    assert len(set(closed)) == 3
    assert all(folder.startswith(str(out / "tensorboard" / "lines-disc")) for folder in closed)
    names = [name for _, name, step in written if step == 3]
    assert names.count("final validation score") == 3
    assert names.count("test score") == 2
    assert names.count("training loss") == 3


def test_wandb_gets_settings_and_steps_in_order(tmp_path, monkeypatch):
    said = []

    class Run:
        def log(self, values, step):
            said.append((step, values))

        def finish(self):
            said.append("finished")

    stand_in = types.ModuleType("wandb")
    vars(stand_in)["init"] = lambda **given: said.append(given) or Run()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    asked = trial(steps=2, looks_every=1)
    tracker("wandb", tmp_path)(run_trial(asked))
    first, *steps, last = said
    assert (first["id"], first["config"]["lr"], last) == (asked.key, 0.1, "finished")
    assert [step for step, _ in steps] == [1, 2]
    assert {"validation score", "training loss", "test score"} <= steps[1][1].keys()


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Refusal, match="pip install wandb"):
        tracker("wandb", tmp_path)
