"""Tasks of one's own: the protocol, its checks, and the example."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from study_trials import run_here

from gq_triton.commands import cli
from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.study_file import read_toml, write_toml
from gq_triton.study.run import watch
from gq_triton.tasks.own import check_own_task, own_task

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = ["--arms", "sgdm", "gq-sgdm-clusters", "--batch-sizes", "16", "32", "--steps", "20",
         "--trials", "1", "--tuning-seeds", "1", "--seeds", "2", "--lr-sgd", "0.01", "0.02",
         "--controls", "norm-ratio"]  # fmt: skip


@pytest.mark.slow
def test_the_example_is_studied_with_its_score_and_unit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(watch, "run_study", run_here)
    out = tmp_path / "out"
    name = "own_task:make_task"
    assert cli.main(["study", "run", "--task", name, *SMALL, "--target", f"{name}=60",
                     "--out", str(out)]) == 0  # fmt: skip
    assert cli.main(["study", "report", str(out)]) == 0
    assert "gq-sgdm-clusters (absolute error in points)" in capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Progression of diabetes in 442 patients" in page
    assert "absolute error in points, lower is better" in page
    assert (out / "own_task-make_task-scores.png").exists()
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert {row["score_name"] for row in rows} == {"absolute_error"}
    assert all(30 < float(row["score"]) < 66 for row in rows)
    config = StudyConfig.of(read_toml(out / "study.toml"))
    assert config.targets == {name: 60.0}
    path = tmp_path / "again.toml"
    path.write_text(write_toml(config))
    assert StudyConfig.of(read_toml(path)) == config


def right():
    class Own:
        features, chance, target = "0", 0.5, 0.9

        def data(self, seed):
            return tuple((torch.randn(8, 3), torch.zeros(8).long()) for _ in range(3))

        def model(self):
            return torch.nn.Sequential(torch.nn.Linear(3, 2))

        def loss(self, outputs, labels):
            return outputs[:, 0]

        def score(self, outputs, labels):
            return 0.5

    return Own


@pytest.mark.parametrize(
    ("member", "value", "words"),
    [
        ("loss", None, "the task has no loss; it must be a method: loss.outputs, labels"),
        ("chance", "high", "chance must be a number, got 'high'"),
        ("features", "1", "features must name a submodule of the model, got '1'"),
        ("data", lambda self, seed: ((torch.ones(2), torch.ones(3)),), "three pairs of tensors"),
        ("loss", lambda self, outputs, labels: outputs.mean(), r"shape \(4,\), got \(\)"),
        ("score", lambda self, outputs, labels: outputs, "score must return a number"),
    ],
)
def test_a_wrong_task_is_refused_in_one_sentence(member, value, words, monkeypatch):
    own = right()
    if value is None:
        delattr(own, member)
    else:
        setattr(own, member, value)
    module = type(sys)("wrong_task")
    vars(module)["make_task"] = own
    monkeypatch.setitem(sys.modules, "wrong_task", module)
    own_task.cache_clear()
    with pytest.raises(Refusal, match=words):
        check_own_task("wrong_task:make_task")


def test_a_task_that_is_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=r"no module absent\.task in"):
        StudyConfig.of({"tasks": ["absent.task:make"], "arms": ["sgdm"], "batch_sizes": [4]})
    with pytest.raises(Refusal, match="the module math has no function 'make'"):
        own_task("math:make")
