"""The commands ``gq-triton study``, as a user calls them: refusals, kills, resumption, report."""

import html
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone

import pytest
from study_trials import run_here

import gq_triton
from gq_triton.commands import cli
from gq_triton.study import command
from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.study_file import command_line, read_toml
from gq_triton.study.report import canvas, figures
from gq_triton.study.run import watch

STUDY = [
    "--tasks", "lines-disc",
    "--arms", "sgdm", "gq-sgdm", "gq-sgdm-clusters", "sgdm-class-weighted",
    "--batch-sizes", "4", "64", "--steps", "3",
    "--trials", "2", "--tuning-seeds", "1", "--seeds", "2",
    "--controls", "norm-ratio", "rho1-equal",
]  # fmt: skip


def start(out, *options):
    command = [
        sys.executable,
        "-m",
        "gq_triton.commands.cli",
        "study",
        "run",
        "--out",
        str(out),
        *options,
    ]
    # In the background of a shell the tests ignore SIGINT, which their children would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def records(out):
    return len(list(out.glob("trials/*.json")))


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def group_is_gone(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


def interrupt(out, sign, wanted, jobs):
    """Return exit status and output of a study that gets a signal at ``wanted`` records."""
    process = start(out, *STUDY, "--jobs", jobs)
    wait_until(lambda: records(out) >= wanted or process.poll() is not None)
    finished = records(out)
    os.kill(process.pid, sign)
    output, _ = process.communicate(timeout=120)
    wait_until(lambda: group_is_gone(process.pid), seconds=60)  # its workers end too
    return process.returncode, f"{output}\nrecords at the signal: {finished}"


@pytest.mark.slow
def test_a_killed_and_resumed_study_is_the_one_never_killed(tmp_path, monkeypatch, capfd):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with monkeypatch.context() as here:
        here.setattr(watch, "run_study", run_here)
        assert cli.main(["study", "run", "--out", str(whole), *STUDY]) == 0
    total = records(whole)
    for sign, share, jobs in ((signal.SIGKILL, 0.1, "1"), (signal.SIGINT, 0.3, "2")):
        code, output = interrupt(killed, sign, share * total, jobs)
        assert code == {signal.SIGKILL: -9, signal.SIGINT: 130}[sign], output
        assert 0 < records(killed) < total
    assert "the same command continues" in output
    before = {path: path.stat().st_mtime_ns for path in killed.glob("trials/*.json")}
    # Without options the study continues as its own study.toml says.
    capfd.readouterr()
    with monkeypatch.context() as here:
        here.setattr(watch, "run_study", run_here)
        assert cli.main(["study", "run", "--out", str(killed)]) == 0
    assert f"{len(before)} of" in "".join(capfd.readouterr())
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert records(killed) == total
    for out in (whole, killed):
        assert cli.main(["study", "report", str(out)]) == 0
    assert (killed / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    check_report(whole)
    one_panel = (whole / "lines-disc-scores.png").read_bytes()
    monkeypatch.setattr(figures, "_FEW", 3)  # many arms: a panel for each
    assert cli.main(["study", "report", str(whole)]) == 0
    check_report(whole)
    assert (whole / "lines-disc-scores.png").read_bytes() != one_panel


def check_report(out):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert "url(" not in page
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert len(pictures) == len(re.findall('<img alt="', page)) == 5
    for name in ("scores", "steps", "weights", "gq-sgdm-controls", "gq-sgdm-clusters-controls"):
        assert f"lines-disc-{name}.png" in pictures
    rows = (out / "results.csv").read_text().splitlines()
    # Two seeds; four arms at two sizes; two controls of both Grad Queue arms, of which one needs
    # more than one cluster.
    assert len(rows) == 1 + 2 * (4 * 2 + 2 + 2 + 1)
    assert "seconds" not in rows[0]
    assert "2 of the 8 tuning trials and 2 of the 10 evaluation seeds that a verdict needs" in page
    for verdict in ("helps", "hurts", "no difference"):
        assert f"): {verdict} at batch" not in page
    # The page says when the study ran, and which command runs it again.
    assert f"written {datetime.now(timezone.utc):%Y-%m-%d}" in page
    assert re.search(rf"trials finished {datetime.now(timezone.utc):%Y-%m-%d} \d\d:\d\d to ", page)
    assert f"They ran gq_triton {gq_triton.__version__}." in page
    (shown,) = re.findall(r"<pre class=\"command\">(.*)</pre>", page)
    assert repeated(html.unescape(shown)) == StudyConfig.of(read_toml(out / "study.toml"))


def repeated(shown):
    """Return the options of the study that a shown command runs."""
    words = shlex.split(shown)
    assert words[:3] == ["gq-triton", "study", "run"]
    return command._config(command._parser().parse_args(words[2:]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "lines"], "no 'lines'; did you mean lines-disc? There are lines-disc"),
        (["--tasks", "physics"], "no 'physics'; there are lines-disc"),
        (["--batch-sizes", "0"], "--batch-sizes must be a whole number >= 1"),
        (["--batch-sizes", "many"], "invalid int value: 'many'"),
        (["--target", "lines-disc:1"], "must be TASK=NUMBER"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--tasks", "cifar10"], "cifar10 needs --data DIR"),
        (
            ["--tasks", "digits", "lines-disc", "--batch-sizes", "16", "1168"],
            "--batch-sizes: 1168 is more than the 1167 training samples of digits",
        ),
        (["--tasks", "python-lm", "--arms", "sgdm-class-weighted"], "no arm makes sense"),
        (["--config", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["--speed", "3"], "unrecognized arguments: --speed 3"),
    ],
)
def test_bad_options_end_in_one_line_and_write_nothing(options, words, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["study", "run", "--out", str(out), *STUDY, *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not out.exists()


def test_a_folder_without_a_study_is_refused(tmp_path, capsys):
    assert cli.main(["study", "report", str(tmp_path)]) == 2
    assert "holds no study" in capsys.readouterr().err
    assert cli.main(["study", "run", "--out", str(tmp_path)]) == 2
    assert cli.main(["nothing"]) == 2
    assert "no command 'nothing'; there are study" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    assert cli.main(["--version"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("found", ["thesis.tex", "trials/run.json", ".git/config"])
def test_a_folder_of_something_else_is_not_taken_for_a_study(found, tmp_path, capsys):
    path = tmp_path / found
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    assert cli.main(["study", "run", "--out", str(tmp_path), *STUDY]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "holds something else and no study.toml: name a new or an empty folder" in said
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]


def test_a_folder_that_a_study_was_about_to_begin_in_is_taken(tmp_path, capsys):
    (tmp_path / ".lock").touch()  # killed before it wrote its study.toml
    (tmp_path / "study.toml.tmp").touch()
    (tmp_path / "trials").mkdir()
    options = ["--tasks", "lines-disc", "--batch-sizes", "8", "--arms", "sgdm", "--dry-run"]
    assert cli.main(["study", "run", "--out", str(tmp_path), *STUDY, *options]) == 0


def test_a_report_of_nothing_replaces_nothing(tmp_path, capsys):
    # Like the folders of docs/study, this one has an earlier report and no records.
    (tmp_path / "study.toml").write_text('tasks = ["lines-disc"]\narms = ["sgdm"]\n'
                                         "batch_sizes = [4]\n")  # fmt: skip
    (tmp_path / "results.csv").write_text("kept")
    assert cli.main(["study", "report", str(tmp_path)]) == 2
    assert "holds no finished trial" in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text() == "kept"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_arm_without_its_baseline_is_said_to_get_no_verdict(tmp_path, capsys):
    file = tmp_path / "options.toml"
    file.write_text('tasks = ["lines-disc"]\narms = ["sgdm", "gq-sgdm", "gq-adamw"]\n'
                    'batch_sizes = [4]\nsteps = 2\ntrials = 1\ncontrols = "none"\n')  # fmt: skip
    out = str(tmp_path / "out")
    assert cli.main(["study", "run", "--config", str(file), "--out", out, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "gq-adamw gets no verdict, since the study lacks adamw" in said
    assert said.count("\n") == 1


def test_dry_run_counts_and_estimates_and_writes_nothing(tmp_path, capsys):
    options = ["--tasks", "lines-disc", "--batch-sizes", "8", "--arms", "sgdm"]
    assert cli.main(["study", "run", "--out", str(tmp_path / "out"), *STUDY, *options,
                     "--dry-run"]) == 0  # fmt: skip
    assert re.match(r"4 trials, 0 of them finished; about \d+ s with", capsys.readouterr().out)
    assert not (tmp_path / "out").exists()


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["study", "run", "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    for words in ("--dry-run", "--jobs", "gq-sgdm-clusters-norm", "digits-hidden", "rho1-equal",
                  "gq-sgdm-clusters-gradient-norm", "gq-sgdm-weighted-queue"):  # fmt: skip
        assert words in said


def test_every_option_of_a_study_stands_in_the_command_that_repeats_it():
    options = {
        "tasks": ["lines-disc", "digits"], "arms": ["sgdm"], "batch_sizes": [4, 8], "trials": 9,
        "tuning_seeds": 4, "seeds": 11, "first_seed": 5, "steps": 7, "schedule": "constant",
        "eval_every": 2, "controls": [], "optimal_batch": 3, "lr_sgd": [0.01, 0.02],
        "lr_adam": [0.1, 0.25], "beta1": [0.9], "warmup": [0.0, 0.1], "rho": [2.0, 2.0],
        "queue_length": [7], "nproc_per_trial": 2,
        "device": "cuda", "targets": {"digits": 0.5},
    }  # fmt: skip
    config = StudyConfig.of(options)
    of_commands = {"command", "score", "better"}  # test_study_told.py has these
    least = StudyConfig(tasks=("digits",), arms=("adamw",), batch_sizes=(1,)).to_dict()
    same = {name for name, value in config.to_dict().items() if value == least[name]}
    assert same == of_commands
    assert repeated(command_line(config, "some folder")) == config
    assert "--out 'some folder' " in command_line(config, "some folder")


def test_two_processes_do_not_run_one_study(tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl", reason="this system has no file locks")
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.main(["study", "run", "--out", str(out), *STUDY]) == 2
    assert "another process runs the study" in capsys.readouterr().err


def test_a_changed_study_says_what_changed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(watch, "run_study", run_here)
    short = ["--tasks", "lines-disc", "--batch-sizes", "8", "--trials", "1", "--tuning-seeds", "1",
             "--seeds", "2", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main(["study", "run", *short, "--arms", "sgdm", "--steps", "2"]) == 0
    capsys.readouterr()
    assert cli.main(["study", "run", *short, "--arms", "sgdm", "--steps", "3"]) == 0
    said = capsys.readouterr().err
    assert "steps was 2 in" in said
    assert "and is now 3; finished trials are kept" in said
    assert cli.main(["study", "run", *short, "--arms", "sgdm", "--steps", "3"]) == 0
    assert "is now" not in capsys.readouterr().err
    assert cli.main(["study", "run", *short, "--arms", "adamw", "sgdm"]) == 0
    assert "arms was sgdm in" in (said := capsys.readouterr().err)
    assert "and is now adamw sgdm; finished" in said


def test_a_name_longer_than_a_picture_is_not_cut_off():
    drawn = canvas.figure(2.0, 1.0)
    drawn.subplots()
    assert int.from_bytes(canvas.png(drawn)[16:20], "big") < 300  # pixels, of the PNG's header
    drawn.suptitle("a task with a name that is longer than two inches", x=0, ha="left")
    assert int.from_bytes(canvas.png(drawn)[16:20], "big") > 300
