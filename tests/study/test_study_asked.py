"""Studies whose trials are asked for and told from outside."""

import pytest
from study_trials import OPTIONS, run_here

from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.protocol import cells
from gq_triton.study.protocol import Study
from gq_triton.study.report.results import collect, results_csv
from gq_triton.study.run.records import Store
from gq_triton.study.trials.training import run_trial

SMALL = OPTIONS | {"batch_sizes": [4], "arms": ["sgdm", "gq-sgdm"], "steps": 4}


def rows(folder):
    store = Store(folder)
    assert store.load() == 0
    return results_csv(collect(cells(StudyConfig.of(SMALL)), store))


@pytest.mark.slow
def test_a_study_that_is_asked_and_told_is_the_one_that_the_command_runs(tmp_path):
    study = Study(tmp_path / "told", **SMALL)
    first = study.ask(most=1)
    assert len(first) == 1
    rest = study.ask()
    assert first[0] not in rest
    assert study.ask() == []  # the others follow from these
    study.forget(first[0])
    assert study.ask() == first
    for trial in reversed(first + rest):
        study.tell(trial, run_trial(trial))
    study = Study(tmp_path / "told", **SMALL)  # the folder remembers
    while trials := study.ask():
        for trial in trials:
            study.tell(trial, run_trial(trial))
    finished, total = study.progress
    assert finished == total
    every = cells(StudyConfig.of(SMALL))
    run_here(every, Store(tmp_path / "run"), data=None, done=lambda record: None)
    assert rows(tmp_path / "told") == rows(tmp_path / "run")


def test_scores_that_lack_something_are_refused_and_not_kept(tmp_path):
    study = Study(tmp_path, **SMALL)
    (trial,) = study.ask(most=1)
    with pytest.raises(Refusal, match="must hold validation_score"):
        study.tell(trial, test_score=1.0)
    assert study.progress[0] == 0
