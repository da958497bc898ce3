"""Studies of a user's command, and records of trials that ran elsewhere."""

import csv
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from study_trials import trial
from test_study_command import repeated
from train_runs import start_and_listen

from gq_triton.commands import cli
from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.commanded import NAMES
from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.law import StudyLaw
from gq_triton.study.design.protocol import cells
from gq_triton.study.design.study_file import command_line, read_toml, write_toml
from gq_triton.study.design.trial import TUNE
from gq_triton.study.run import watch, worker
from gq_triton.study.trials.told import record_of, scores_in, settings_of, words_of

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_script.py"
COMMAND = (
    f"{shlex.quote(sys.executable)} {shlex.quote(str(EXAMPLE))} --lr {{lr}} --beta1 {{beta1}} "
    "--batch-size {batch_size} --seed {seed} --law {law} --rho {rho} --queue-length {queue_length}"
)
STUDY = {"command": COMMAND, "arms": ["sgdm", "gq-sgdm"], "batch_sizes": [8], "warmup": [0.0],
         "score": "accuracy", "trials": 1, "tuning_seeds": 1, "seeds": 2}  # fmt: skip


def forked(words):
    """Be ``guarded`` for a script that is forked from the tests' server."""
    assert words[0] == sys.executable
    ((code, said),) = start_and_listen(1, *words[1:])
    return code, said


@pytest.mark.slow
def test_the_example_prints_its_scores(monkeypatch):
    monkeypatch.setattr(worker, "guarded", forked)
    of = cells(StudyConfig.of(STUDY))
    (first,) = of[1].tuning[0]
    record = worker.run_command(first)
    assert record.trial == first
    assert 0.3 < record.result["validation_score"] <= 1
    assert record.result["norm_ratio"] > 0
    assert record.result["score"] is None
    assert record.timing["seconds"] > 0


def run_told(cells, store, *, done, **others):
    """Be ``run_study`` with a command that takes no time: scores that follow from the settings."""
    from gq_triton.study.design.protocol import missing

    for cell in cells:
        while todo := missing(cell, store):
            for one in todo:
                assert one.command == COMMAND
                value = 0.5 + one.lr / 100 + one.seed % 7 / 100
                queued = {"norm_ratio": 1.5, "mean_weight": 1.2} if one.law.queued else {}
                record = record_of(one, {"validation_score": value, "test_score": value} | queued)
                store.add(record)
                done(record)


@pytest.mark.slow
def test_a_study_of_a_command_has_the_controls_that_it_can_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "run_study", run_told)
    out = tmp_path / "out"
    assert cli.main(["study", "run", "--command", COMMAND, "--arms", "sgdm", "gq-sgdm",
                     "--batch-sizes", "8", "--warmup", "0", "--score", "accuracy", "--trials", "2",
                     "--tuning-seeds", "1", "--seeds", "2", "--out", str(out)]) == 0  # fmt: skip
    assert cli.main(["study", "report", str(out)]) == 0
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert {path.name for path in out.glob("*.png")} == {
        "command-scores.png", "command-gq-sgdm-controls.png",
    }  # fmt: skip
    plain = {"", "norm-ratio", "mean-weight", "same-lr", "lower-momentum"}
    assert {row["control"] for row in rows} == plain
    assert {row["score_name"] for row in rows} == {"accuracy"}
    rates = {row["control"]: float(row["lr"]) for row in rows if row["arm"] == "gq-sgdm"}
    assert rates["norm-ratio"] == pytest.approx(1.5 * rates[""], rel=1e-5)
    # The command stands in the study's file as it was given.
    config = StudyConfig.of(read_toml(out / "study.toml"))
    assert config.command == COMMAND
    path = tmp_path / "again.toml"
    path.write_text(write_toml(config))
    assert StudyConfig.of(read_toml(path)) == config
    assert repeated(command_line(config, "out")) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"command": "train --lr {lr}"}, "--command needs {seed}"),
        ({"command": COMMAND + " {speed}"}, "--command holds {speed}; there are optimizer, lr"),
        ({"command": "t {lr} {seed} {beta1}"}, "--command needs {rho} for the Grad Queue arms"),
        ({"arms": ["gq-sgdm-clusters"]}, "--command needs {n_clusters} for the arms with clusters"),
        ({"arms": ["sgdm", "adamw"]}, "--command needs {optimizer} for arms of several"),
        ({"warmup": [0.0, 0.1]}, "--command needs {warmup}, or --warmup one value"),
        ({"arms": ["gq-sgdm-rank"]}, "arm gq-sgdm-rank cannot be told to a command"),
        ({"tasks": ["digits"]}, "--command runs in place of a task"),
        ({"better": "more"}, "--better must be higher or lower"),
        ({"command": "", "tasks": ["digits"]}, "--score and --better belong to --command"),
        ({"command": "t '{lr}"}, "--command is no line of words"),
    ],
)
def test_a_command_that_cannot_run_the_arms_is_refused(changes, words):
    with pytest.raises(Refusal, match=re.escape(words)):
        StudyConfig.of(STUDY | changes)


def test_settings_stand_in_place_of_their_names():
    asked = trial(command="run 'a b' --lr={lr} {n_clusters} {rho} {} {other}", lr=0.25)
    assert set(settings_of(asked)) == set(NAMES)
    asked = replace(asked, command=asked.command.replace(" {other}", ""))
    assert words_of(asked) == ["run", "a b", "--lr=0.25", "1", "1.0", "{}"]
    assert asked.key != trial(lr=0.25).key


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("print('loss 3')", "printed no JSON line of scores; its end was: loss 3"),
        ("print('{\"test_score\": 1}')", "the scores must hold validation_score, got test_score"),
        ("print('{\"validation_score\": NaN}')", "validation_score must be a finite number"),
        ("raise SystemExit('out of data')", "ended with 1: out of data"),
    ],
)
def test_a_command_without_scores_is_refused_with_what_it_said(program, words):
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    with pytest.raises(Refusal, match=re.escape(words)):
        worker.run_command(trial(command=command, purpose=TUNE))


def test_the_last_line_of_json_counts():
    assert scores_in('{"a": 1}\n{"a": 2}\n{no json\nend') == {"a": 2}


def test_a_record_needs_the_test_score_only_to_evaluate():
    scores = {"validation_score": 0.5, "steps_to_target": 7, "diverged": True}
    record = record_of(trial(purpose=TUNE), scores)
    assert record.result["diverged_at"] == 20
    assert record.result["steps_to_target"] == 7
    with pytest.raises(Refusal, match="must hold test_score"):
        record_of(trial(), scores)
    json.dumps(record.result, allow_nan=False)
    with pytest.raises(Refusal, match="must hold norm_ratio"):
        record_of(trial(purpose=TUNE, law=StudyLaw("queue")), scores)
