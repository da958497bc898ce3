"""The files that launch/train.py writes, and its refusals; test_restart.py has its restarts."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
from train_runs import SCRIPT, assert_same_run, newest, start, start_and_listen

from gq_triton import tasks
from gq_triton.training.metrics import json_line, read_metrics

STEP_KEYS = {
    "kind",
    "step",
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "mean_weight",
    "norm_ratio",
    "saturated_high",
    "saturated_low",
    "effective_length",
    "skipped",
}
FEW = ("--epochs", "2", "--batch-size", "512")  # 3 steps per epoch


@pytest.fixture
def train():
    """Yield the script as a module, whose `main` runs in this process."""
    spec = importlib.util.spec_from_file_location("launch_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    spec.loader.exec_module(module)
    yield module
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)
    torch.set_rng_state(random)
    del sys.modules[spec.name]


@pytest.mark.slow
def test_torchrun_writes_a_run(whole_run):
    out = whole_run(2)
    check_files(out, 2, epochs=4)


@pytest.mark.slow
def test_clusters_and_a_resumed_run_that_equals_the_whole_one(tmp_path):
    options = ("--n-clusters", "3", *FEW, "--checkpoint-every", "2", "--device", "cpu")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert start(2, SCRIPT, "--out", whole, *options) == [0, 0]
    rows = [row for row in read_metrics(whole / "metrics.jsonl") if row["kind"] == "step"]
    for row in rows:
        assert row.keys() == STEP_KEYS | {"cluster_sizes"}
        assert [len(sizes) for sizes in row["cluster_sizes"]] == [3, 3]
    assert [sum(map(sum, row["cluster_sizes"])) for row in rows[:3]] == [512, 512, 413]
    assert (whole / "curves.png").stat().st_size > 10_000
    # Without the last checkpoint the run continues from the one before.
    shutil.copytree(whole, part)
    max((part / "checkpoints").iterdir()).unlink()
    assert start(2, SCRIPT, "--resume", part) == [0, 0]
    assert_same_run(part, whole)


@pytest.mark.slow
def test_another_number_of_processes_continues_a_run(train, whole_run, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole_run(2), out)
    older, newer = sorted((out / "checkpoints").iterdir())
    newer.unlink()
    step = newest(out)["step"]
    assert older.name == f"step-{step:08d}.pt"
    assert train.main(["--resume", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "continuing with 1 processes instead of 2" in shown
    assert json.loads((out / "summary.json").read_text())["world_size"] == 1
    saved = newest(out)
    assert saved["step"] == 24 > step
    assert {int(count) for count in saved["queue"]["queued"].values()} == {24}
    # The rows up to the checkpoint are those of the run with two processes.
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (out, whole_run(2)))
    assert [row for row in ours if row["step"] <= step] == theirs[: step + step // 6]
    assert len(ours) == len(theirs)


def check_files(out, ranks, epochs):
    rows = read_metrics(out / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 6 * epochs + 1))
    assert all(set(row) == STEP_KEYS for row in steps)
    # Weights are 1 until five gradients are queued.
    assert [row["mean_weight"] for row in steps[:5]] == [1.0] * 5
    assert steps[5]["mean_weight"] != 1.0
    ends = [row for row in rows if row["kind"] == "epoch"]
    assert [(row["epoch"], row["step"]) for row in ends] == [(n, 6 * n) for n in (1, 2, 3, 4)]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["test_accuracy"] == ends[-1]["test_accuracy"]
    assert 0 < ends[-1]["train_accuracy"] <= 1
    assert summary["world_size"] == ranks
    assert summary["steps"] == 6 * epochs
    assert len(summary["queue_digest"]) == ranks
    assert len(set(summary["queue_digest"])) == 1
    assert len(list((out / "checkpoints").iterdir())) == 2
    check_picture(out / "curves.png")


def check_picture(path):
    from matplotlib.image import imread

    height, width, _ = imread(path).shape
    assert width >= 1000
    assert height >= 700


def build(train, ranks, **given):
    return train.build(given, None, ranks, torch.device("cpu"), tasks.TASKS)


def test_unequal_shares_average_to_the_gradient_of_the_batch(train):
    # Of five samples rank 0 has 0, 2 and 4, rank 1 has 1 and 3. One process computes both ranks.
    train.Place.find().connect()
    cpu = torch.device("cpu")
    rows, grads = [], []
    for rank in range(2):
        trainer = train.Trainer(build(train, 2), train.Place(rank, 2, 0, 1), cpu, tasks.batches)
        trainer.model.eval()  # no dropout
        rows.append(trainer.train_step(torch.arange(5)))
        grads.append([param.grad.clone() for param in trainer.model.parameters()])
    twin = build(train, 1)
    twin.model.eval()
    inputs, labels = (tensor[:5] for tensor in twin.task.train)
    expected = torch.nn.functional.cross_entropy(twin.model(inputs), labels)
    expected.backward()
    assert sum(row["loss"] for row in rows) == pytest.approx(expected.item())
    for first, second, param in zip(*grads, twin.model.parameters(), strict=True):
        torch.testing.assert_close((first + second) / 2, param.grad)


@pytest.mark.slow
def test_two_processes_refuse_with_one_line(tmp_path):
    ranks = start_and_listen(2, SCRIPT, "--rho", "0.5", "--out", tmp_path / "out")
    assert [code for code, _ in ranks] == [2, 2]
    (line,) = "".join(said for _, said in ranks).splitlines()
    assert line.startswith("train.py: rho must be")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--rho", "0.5"], "rho"),
        (["--rho", "nan"], "rho"),
        (["--queue-length", "0"], "queue_length"),
        (["--min-queue-length", "6"], "min_queue_length"),
        (["--loss-window", "0"], "--loss-window"),
        (["--lr", "-0.1"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--momentum", "1"], "--momentum"),
        (["--optimizer", "adamw", "--momentum", "0.5"], "--momentum"),
        (["--weight-decay", "x"], "--weight-decay"),
        (["--epochs", "0"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "1438"], "--batch-size"),
        (["--seed", str(2**31)], "--seed"),
        (["--task", "imagenet"], "--task"),
        (["--optimizer", "lion"], "--optimizer"),
        (["--n-clusters", "0"], "--n-clusters"),
        (["--checkpoint-every", "0"], "--checkpoint-every"),
        (["--ou", "x"], "--ou"),
        (["--resume", "x"], "--resume"),
    ],
)
def test_a_bad_value_ends_with_one_line(train, tmp_path, capsys, options, word):
    assert_refused(train, capsys, ["--out", str(tmp_path / "out"), *options], word)
    assert not list(tmp_path.iterdir())


def assert_refused(train, capsys, argv, word):
    capsys.readouterr()
    assert train.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("train.py: ")
    assert word in line


def test_a_batch_smaller_than_the_world_is_refused(train):
    with pytest.raises(train.Refusal, match="--batch-size must be at least 1 for each of the 4"):
        build(train, 4, batch_size=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="There is a GPU here.")
def test_a_gpu_that_is_not_there_is_refused(train, tmp_path, capsys):
    options = ["--out", str(tmp_path / "out"), "--device", "cuda"]
    assert_refused(train, capsys, options, "--device cuda needs a GPU")


def test_the_folder_of_another_run_is_refused(train, tmp_path, capsys):
    assert_refused(train, capsys, [], "--out")
    for name in ("metrics.jsonl", "summary.json"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("precious")
        assert_refused(train, capsys, ["--out", str(out)], "holds another run")
        assert [path.read_text() for path in out.iterdir()] == ["precious"]
    assert_refused(train, capsys, ["--out", str(tmp_path / "summary.json/summary.json")], "file")
    below = tmp_path / "summary.json/summary.json/below"
    assert_refused(train, capsys, ["--out", str(below)], "cannot be made")


@pytest.mark.slow
def test_a_folder_that_no_run_can_have_is_refused(train, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    for out, word in (
        ("", "must name a folder, got nothing"),
        ("/", "is the root of the file system"),
        (".", "holds other files: name a new folder or an empty one"),
        ("notes.txt", "is a file: name a folder"),
        ("x" * 5000, "cannot be made: File name too long"),
        ("a\0b", "cannot be made: embedded null byte"),
    ):
        assert_refused(train, capsys, ["--out", out], word)
    for resume, word in (
        ("", "must name a folder, got nothing"),
        ("/", "there is none"),
        ("notes.txt", "there is none"),
        ("x" * 5000, "cannot be read: File name too long"),
    ):
        assert_refused(train, capsys, ["--resume", resume], word)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_only_a_restart_of_the_same_launch_continues(train, tmp_path, capsys, monkeypatch):
    options = ["--out", str(tmp_path), "--epochs", "1", "--batch-size", "512"]
    draft = tmp_path / "checkpoints" / "step-00000000.pt.tmp"  # a first attempt died early
    draft.parent.mkdir()
    draft.write_text("half")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    assert train.main(options) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train.main(options) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert_refused(train, capsys, [*options, "--lr", "0.5"], "--lr is 0.07 in the run to resume")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    assert_refused(train, capsys, options, "holds another run")
    # Launches of a job without a name differ in the folder that torchrun makes.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert_refused(train, capsys, options, "holds another run")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/one/attempt_0/0/error.json")
    assert train.main(["--resume", str(tmp_path)]) == 0
    assert_refused(train, capsys, options, "holds another run")


def test_help_explains_every_option(train, capsys):
    assert train.main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in train.parse_options.__globals__["DEFAULTS"]:
        assert f"--{name.replace('_', '-')}" in shown
    assert shown.count("(default: ") >= 17


@pytest.mark.slow
def test_a_run_is_quiet_without_a_terminal(train, tmp_path, capsys):
    assert train.main(["--out", str(tmp_path), *FEW]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    first, second, result = shown.out.splitlines()
    assert first.startswith("epoch 1/2: ")
    assert second.startswith("epoch 2/2: ")
    assert result.startswith("test accuracy: ")
    assert "\x1b" not in shown.out


@pytest.mark.slow
def test_resume_refuses_what_is_not_the_run(train, tmp_path, capsys):
    out = tmp_path / "out"
    assert_refused(train, capsys, ["--resume", str(out)], "there is none")
    assert not out.exists()
    assert train.main(["--out", str(out), *FEW]) == 0
    path = sorted((out / "checkpoints").iterdir())[-1]
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    options = ["--resume", str(out), "--lr", "0.5"]
    assert_refused(train, capsys, options, "--lr is 0.07 in the run to resume, got 0.5")
    assert_refused(train, capsys, ["--resume", str(out), "--queue-length", "4"], "--queue-length")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before

    saved = newest(out)
    del saved["model"]["head.bias"]
    torch.save(saved, path)
    assert_refused(train, capsys, ["--resume", str(out)], "head.bias")
    torch.save({"model": {}}, path)
    assert_refused(train, capsys, ["--resume", str(out)], "not written by")
    for damaged in (out / "checkpoints").iterdir():
        damaged.write_bytes(b"nothing")
    assert_refused(train, capsys, ["--resume", str(out)], "all 2 there are damaged")


@pytest.mark.slow
def test_a_truncated_checkpoint_gives_way_to_the_one_before(train, tmp_path, capsys):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for out in (whole, torn):
        assert train.main(["--out", str(out), *FEW]) == 0
    assert_same_run(torn, whole)
    older, newer = sorted((torn / "checkpoints").iterdir())
    assert [older.name, newer.name] == ["step-00000003.pt", "step-00000006.pt"]
    newer.write_bytes(newer.read_bytes()[:-1000])
    with (torn / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "st')  # as a kill leaves it
    capsys.readouterr()
    assert train.main(["--resume", str(torn)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert newer.name in line
    assert "continuing from step 3" in line
    assert_same_run(torn, whole)
    # Resuming a finished run changes nothing.
    assert train.main(["--resume", str(torn)]) == 0
    assert_same_run(torn, whole)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_skipped_and_not_queued(
    train, tmp_path, capsys, monkeypatch
):
    task = tasks.TASKS["digits"]()
    task.train[0][7] = torch.nan  # one sample makes one bad step in each epoch
    monkeypatch.setitem(tasks.TASKS, "digits", lambda: task)
    options = ["--epochs", "3", "--batch-size", "512", "--out", str(tmp_path)]
    assert train.main(options) == 0
    assert "of them skipped: 3" in capsys.readouterr().out
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "step"]
    bad = [row for row in rows if row["skipped"]]
    assert [row["epoch"] for row in bad] == [1, 2, 3]
    assert all(row["loss"] is None and row["grad_norm"] is None for row in bad)
    assert rows[-1]["step"] == 9
    saved = newest(tmp_path)
    assert all(torch.isfinite(value).all() for value in saved["model"].values())
    assert all(torch.isfinite(ring).all() for ring in saved["queue"]["queue"].values())
    # Every sample has a gradient in the bias of the last layer, so only six steps are queued.
    assert int(saved["queue"]["queued"]["head.bias"]) == 6
    assert json.loads((tmp_path / "summary.json").read_text())["skipped"] == 3
    check_picture(tmp_path / "curves.png")


def test_rows_are_json_without_nan():
    row = json.loads(json_line({"kind": "step", "loss": float("nan"), "lr": 0.1}))
    assert row == {"kind": "step", "loss": None, "lr": 0.1}
