"""Trials of several ranks: what they share with one process, and what needs one process."""

from dataclasses import replace

import pytest
import torch
from study_trials import OPTIONS, run_and_store, trial
from train_runs import torchruns

from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.law import StudyLaw
from gq_triton.study.design.protocol import cells
from gq_triton.study.run import ranks as study_ranks
from gq_triton.study.run.records import Store
from gq_triton.study.trials.clusterer import StudyClusterer
from gq_triton.study.trials.training import run_trial


def of_ranks(ranks, asked, folder):
    """Return the result of a trial, from ranks that all tests share instead of torchrun's."""
    ranks(asked.processes).run(run_and_store, asked, folder)
    record = Store(folder).read(asked)
    assert record is not None
    return record.result


def from_the_server(command, env):
    """Be ``guarded`` for a torchrun that is forked, with its ranks, from the tests' server."""
    assert command[1:3] == ["-m", "torch.distributed.run"]
    module = command.index("-m", 3)
    assert command[module + 1] == study_ranks.__name__
    file = study_ranks.__file__  # of the module: a script that does not import torch anew
    words = [*command[3:module], file, *command[module + 2 :]]
    (done,) = torchruns([words], [env])
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    "own_processes", [pytest.param(True, marks=pytest.mark.rare), False], ids=["torchrun", "forked"]
)
def test_two_ranks_come_to_what_one_process_does(own_processes, monkeypatch):
    if not own_processes:
        monkeypatch.setattr(study_ranks, "guarded", from_the_server)
    asked = trial(task="digits-longtail", law=StudyLaw("queue"), batch_size=31, processes=2)
    shared = study_ranks.launch(asked, None)
    alone = run_trial(replace(asked, processes=1))
    assert shared.trial == asked
    assert shared.trial.key != alone.trial.key
    names = "train_loss", "validation_loss", "norm_ratio", "mean_weight"
    ours, theirs = ([r.result[name] for name in names] for r in (shared, alone))
    # float32 sums in another order, over 20 steps
    assert ours == pytest.approx(theirs, rel=1e-4)


CLUSTERED = [
    # A cluster per rank and class, which one process can name by labels.
    StudyLaw("queue", n_clusters=4, cluster_by="labels", population_power=0.0, match_norm=True),
    StudyLaw("queue", n_clusters=4, cluster_by="labels", centroid_scale="standard_error"),
    # K / W rounds down to 1, so that the mean of each rank's samples is a centroid.
    StudyLaw("queue", n_clusters=3, cluster_by="output_gradient"),
]


@pytest.mark.slow
@pytest.mark.parametrize("law", CLUSTERED, ids=lambda law: repr(law).replace("queue", ""))
def test_clusters_of_two_ranks_are_those_of_one_process(law, ranks, tmp_path, monkeypatch):
    def of_both_ranks(self, features):
        rank = torch.arange(len(features)) % 2  # the ranks take samples in turn, 16 and 15 of 31
        return self.batch_labels * 2 + rank if self.law.cluster_by == "labels" else rank

    asked = trial(task="digits-longtail", law=law, batch_size=31, processes=2)
    shared = of_ranks(ranks, asked, tmp_path)
    monkeypatch.setattr(StudyClusterer, "__call__", of_both_ranks)
    alone = run_trial(replace(asked, processes=1)).result
    names = "train_loss", "validation_loss", "norm_ratio", "mean_weight"
    # float32 sums in another order, over 20 steps
    assert [shared[name] for name in names] == pytest.approx(
        [alone[name] for name in names], rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("by", ["features", "random"])
def test_each_rank_finds_clusters_among_its_own_samples(by, ranks, tmp_path):
    law = StudyLaw("queue", n_clusters=6, cluster_by=by)
    asked = trial(task="digits-longtail", law=law, batch_size=31, processes=2)
    result = of_ranks(ranks, asked, tmp_path)
    assert result["diverged_at"] is None
    one = run_trial(trial(task="digits-longtail", law=replace(law, n_clusters=None), batch_size=31))
    # The mean of few samples is further from the queue's mean than that of the whole batch.
    assert result["mean_weight"] > 1.1 * one.result["mean_weight"]


def test_ranks_leave_out_what_needs_one_process():
    options = OPTIONS | {"nproc_per_trial": 2}
    of = {c.arm.name: c for c in cells(StudyConfig.of(options)) if c.batch_size == 16}
    plain = ["norm-ratio", "mean-weight", "same-lr", "lower-momentum"]
    assert of["gq-sgdm"].controls() == plain
    assert of["gq-sgdm-clusters"].controls() == [
        *plain, "random-clusters", "label-clusters", "rho1-population", "rho1-equal",
    ]  # fmt: skip
    four = {c.arm.name: c for c in cells(StudyConfig.of(options | {"nproc_per_trial": 4}))
            if c.batch_size == 16}  # fmt: skip
    assert "random-clusters" not in four["gq-sgdm-clusters"].controls()  # one cluster per rank
    for cell in of.values():
        assert {one.processes for trials in cell.tuning for one in trials} == {2}
    for arm in ("gq-sgdm-weighted-queue", "gq-sgdm-rank", "gq-sgdm-tensor"):
        with pytest.raises(Refusal, match=f"{arm} runs in one process"):
            StudyConfig.of(options | {"arms": [arm]})
    with pytest.raises(Refusal, match="at least --nproc-per-trial"):
        StudyConfig.of(options | {"nproc_per_trial": 8})
