"""gq-triton bench: its refusals, its files, and the bytes and memory of its ranks."""

import pytest
import torch

from gq_triton.bench import command, hook
from gq_triton.bench.models import ResNet50
from gq_triton.bench.record import from_csv
from gq_triton.commands.cli import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "queue"], "--only: invalid choice: 'queue'"),
        (["--device", "tpu"], "--device: invalid choice"),
        (["--out", "file"], "--out must be a folder, and file is a file"),
        (["--out", "file/sub"], "--out file/sub cannot be made: "),
        pytest.param(
            ["--device", "cuda"], "--device cuda needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert command.main(words) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_wrong_result_ends_the_run_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    def check(device):
        yield "2 + 2", 1.0, 0.5

    def measure(run):
        raise AssertionError("nothing may be timed")

    theme = command.THEMES["kmeans"]._replace(measure=measure, checks=(check,))
    monkeypatch.setitem(command.THEMES, "kmeans", theme)
    assert command.main(["--only", "kmeans", "--out", str(tmp_path / "out")]) == 1
    assert "2 + 2: error 1, at most 0.5 is allowed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_ends_with_a_line(monkeypatch, capsys):
    def check(device):
        raise KeyboardInterrupt

    theme = command.THEMES["kmeans"]._replace(checks=(check,))
    monkeypatch.setitem(command.THEMES, "kmeans", theme)
    assert command.main(["--only", "kmeans"]) == 130
    assert "stopped; the files of finished themes are kept" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.rare  # half a minute; the ratios of test_bench_* run the same harness
def test_all_themes_are_checked_measured_and_written(tmp_path, capsys):
    assert main(["bench", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    found = {}
    for file in tmp_path.glob("*.csv"):
        theme = file.stem.rpartition("_")[2]
        found[theme], facts = from_csv(file.read_text())
        assert facts["torch"] == torch.__version__
        text = file.with_suffix(".md").read_text()
        assert f"gq-triton bench --device cpu --only {theme}" in text
        assert all(line.note == "" and line.median > 0 for line in found[theme])
    assert set(found) == set(command.THEMES)
    (picture,) = tmp_path.glob("*_optimizer.png")
    assert picture.stat().st_size < 30_000
    assert {"plain", "clusters", "K passes", "vmap(grad)"} <= {
        line.step for line in found["clusters"]
    }
    check_memory_and_bytes(found["hook"], found["fsdp2"])


def check_memory_and_bytes(ddp, fsdp):
    """Assert what two ranks of the tiny ResNet hold and send."""
    model = ResNet50((1, 1, 1, 1), width=8, classes=10)
    size = sum(param.nbytes for param in model.parameters()) / 2**20
    queues = [line.more["held per rank, MiB"] for line in ddp]
    wires = [line.more["sent per rank, MiB"] for line in ddp]
    assert [line.step for line in ddp] == list(hook.CASES["ddp"])
    near = 0.0006  # padding and votes add a few bytes
    # Slices with clusters also hold the mean and 1 / sigma of all elements.
    assert queues[:5] == pytest.approx([0, 5 * size, 2.5 * size, 5 * size, 4.5 * size], abs=near)
    # Each of two ranks sends the payload of an all-reduce once, and on average half a broadcast's.
    plain = size + sum(buffer.nbytes for buffer in model.buffers()) / 2**20 / 2
    # With clusters two float64 numbers per parameter say what a rank's samples count.
    clustered = plain + size + sum(16 for _ in model.parameters()) / 2**20
    every = [plain, plain, plain, clustered, clustered + 0.5 * size, plain - size / 2]
    assert wires[:6] == pytest.approx(every, abs=near)
    assert wires[6] < plain / 3
    plain, _, clustered = (line.more["sent per rank, MiB"] for line in fsdp)
    # Two ranks send half of each payload: mean, 1 / sigma and the raw gradient.
    assert clustered - plain == pytest.approx(1.5 * size, rel=0.02)
