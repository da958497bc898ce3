"""Studies on a GPU: refused without one, and with one the same bits in every run."""

import json

import pytest
import torch
from test_study_command import start

from gq_triton.commands import cli
from gq_triton.commands.refusal import Refusal
from gq_triton.study.run import device
from gq_triton.study.run.device import check_device

STUDY = [
    "--tasks", "lines-disc", "digits", "digits-hidden", "python-lm",
    "--arms", "adamw", "gq-sgdm-adaptive", "gq-sgdm-clusters", "gq-sgdm-clusters-rank",
    "sgdm-class-weighted", "gq-sgdm-clusters-gradient",
    "--batch-sizes", "32", "--optimal-batch", "8", "--steps", "12",
    "--trials", "1", "--tuning-seeds", "1", "--seeds", "2", "--lr-sgd", "0.01", "0.02",
    "--controls", "shuffled", "random-clusters",
    "--jobs", "4",
]  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "processes", "words"),
    [
        (0, 1, "--device cuda needs a GPU, and this machine has 0"),
        (1, 2, "--device cuda needs a GPU for each of 2 processes, and this machine has 1"),
    ],
)
def test_a_study_without_the_gpus_it_needs_is_refused(gpus, processes, words, monkeypatch):
    monkeypatch.setattr(device.torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(Refusal, match=words):
        check_device("cuda", processes)
    check_device("cpu", processes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="There is a GPU here.")
def test_no_gpu_is_one_line_and_nothing_is_written(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["study", "run", "--out", str(out), *STUDY, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def results(out, where):
    process = start(out, *STUDY, "--device", where)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert cli.main(["study", "report", str(out)]) == 0
    records = [json.loads(path.read_text()) for path in out.glob("trials/*.json")]
    return (out / "results.csv").read_bytes(), records


def asked(record):
    return json.dumps({k: v for k, v in record["trial"].items() if k != "device"}, sort_keys=True)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_gpu_gives_the_same_bits_again_and_starts_as_the_cpu_does(tmp_path):
    first, records = results(tmp_path / "first", "cuda")
    again, _ = results(tmp_path / "again", "cuda")
    assert first == again
    _, of_cpu = results(tmp_path / "cpu", "cpu")
    expected = {asked(record): record for record in of_cpu}
    for record in records:
        assert record["environment"]["gpu"]
        # A control's learning rate depends on measurements, so that it may have no counterpart.
        other = expected.get(asked(record))
        if other is not None:
            # Data, weights and order are the same. In the first steps only float32 sums differ.
            mine, theirs = (r["result"]["losses"][:3] for r in (record, other))
            assert mine == pytest.approx(theirs, rel=1e-4), record["trial"]
    assert sum(asked(record) in expected for record in records) > len(records) / 2
