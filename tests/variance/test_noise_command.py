"""The command ``gq-triton noise``: tasks, scripts, and what it refuses."""

import csv
import textwrap

import pytest

from gq_triton.commands.cli import main

SCRIPT = """
    import sys
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.hidden(x).relu())

    assert __name__ == "__main__"
    frozen = torch.nn.Linear(4, 4).requires_grad_(False)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(int(sys.argv[1])):
        with torch.no_grad():
            model(torch.randn(3, 4))
        optimizer.zero_grad()
        model(frozen(torch.randn(16, 4))).square().mean().backward()
        optimizer.step()
    if len(sys.argv) > 2:
        sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return str(path)


@pytest.mark.slow
def test_a_task_is_trained_and_measured(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--task", "lines-disc", "--steps", "20", "--every", "2", "--batch-size", "16"]
    assert main(["noise", *words, "--features", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "lines-disc, adamw, learning rate 0.001, batch 16, 20 steps" in said
    assert "F = " in said
    assert "all 10 measurements of the run: noise scale" in said
    assert (out / "noise.txt").read_text() in said
    rows = list(csv.DictReader((out / "noise.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(2, 21, 2))
    assert float(rows[0]["variance"]) > 0
    assert (out / "noise.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_script_runs_as_it_is_with_a_meter(script, capsys):
    assert main(["noise", "--every", "2", "--out", "found", "--script", script, "9"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("train.py\n")
    # The first forward pass shows the model; 8 of 9 are counted.
    assert "4 measurements, forward passes 2 to 8, batch 16" in said
    assert "head.weight" in said


@pytest.mark.slow
def test_a_script_that_ends_early(script, capsys):
    words = ["noise", "--every", "1", "--clusters", "2", "--script", script]
    assert main([*words, "4", "3"]) == 3
    assert "3 measurements" in capsys.readouterr().out
    with pytest.raises(ValueError, match="invalid literal"):
        main([*words, "x"])
    assert main([*words, "0"]) == 2
    assert "called no model with gradients" in capsys.readouterr().err
    assert main([*words, "2"]) == 0
    assert main(["noise", "--model", "Nothing", "--script", script, "4"]) == 2
    assert "called no model of class Nothing" in capsys.readouterr().err
    assert main(["noise", "--model", "Net", "--script", script, "1"]) == 1
    assert "no step was measured: take a smaller --every" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "one of the arguments --task --script is required"),
        (["--task", "nothing"], "invalid choice"),
        (["--task", "digits", "--every", "0"], "must be an integer >= 1, got '0'"),
        (["--task", "digits", "--lr", "nan"], "must be a number > 0, got 'nan'"),
        (["--task", "digits", "--seed", "-1"], "--seed must be from 0"),
        (["--task", "digits", "--clusters", "1"], "--clusters must be at least 2"),
        (["--task", "lines-disc", "--batch-size", "1000"], "--batch-size must be from 2 to the"),
        (["--task", "lines-disc", "--features", "x"], "features='x' is no submodule"),
        (["--task", "lines-disc", "--lr", "1e30", "--optimizer", "sgdm"], "take a smaller --lr"),
        (["--task", "digits", "--model", "Net"], "--model is the class of a script's model"),
        (["--task", "cifar10"], "cifar10 needs --data DIR"),
        (["--script"], "--script needs a file"),
        (["--script", "nowhere.py"], "there is no nowhere.py"),
        (["--features", "--script", __file__], "needs the name of a layer"),
        (["--out", __file__, "--task", "digits"], "is a file"),
        (["--out", f"{__file__}/noise", "--task", "digits"], "is no folder one may write to"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(words, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["noise", *words]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.startswith("gq-triton noise: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
