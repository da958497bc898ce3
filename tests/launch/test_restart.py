"""Runs with killed ranks and torn checkpoints, which end with the same result bit for bit."""

import random
import re
import signal

import pytest
import torch
from train_runs import (
    DIES_IN_A_STEP,
    SCRIPT,
    SHORT,
    WRAPPED,
    assert_same_run,
    newest,
    start,
    start_and_listen,
    torchrun,
)

from gq_triton.commands.files import whole_file
from gq_triton.training.checkpoints import load_newest_checkpoint, save_checkpoint
from gq_triton.training.metrics import read_metrics

# Rank 0 dies in the second attempt, while the checkpoint of step 20 is half written.
DIES_IN_A_SAVE = """
import io
save = torch.save

def torn(content, file, **options):
    second = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
    if second and isinstance(content, dict) and content["step"] == 20:
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()
    save(content, file, **options)

torch.save = torn
"""


@pytest.fixture
def wrapped(tmp_path):
    def script(*fatal):
        path = tmp_path / "wrapped.py"
        path.write_text(WRAPPED.replace("FATAL", "\n".join(fatal)))
        return path

    return script


@pytest.mark.rare
@pytest.mark.parametrize(
    ("ranks", "every", "step", "saved"),
    # DDP changes its buckets after its first pass, and with three ranks the buckets decide the
    # order of sums. A run of three ranks must therefore also resume exactly after one step.
    [(2, 4, 15, 12), (3, 1, 2, 1)],
)
def test_a_killed_run_is_resumed_bit_for_bit(
    tmp_path, wrapped, whole_run, ranks, every, step, saved
):
    killed = tmp_path / "killed"
    script = wrapped(DIES_IN_A_STEP.format(step=step, condition="True"))
    codes = start(ranks, script, *SHORT, "--checkpoint-every", every, "--out", killed)
    assert -signal.SIGKILL in codes
    assert not (killed / "summary.json").exists()
    assert newest(killed)["step"] == saved
    # The metrics have rows of steps after the checkpoint, which the resumed run takes again.
    assert read_metrics(killed / "metrics.jsonl")[-1]["step"] == step - 1

    assert start(ranks, SCRIPT, "--resume", killed) == [0] * ranks
    assert_same_run(killed, whole_run(ranks))


@pytest.mark.rare  # two nodes do, too, in test_multi_node.py
def test_torchrun_restarts_a_killed_rank_bit_for_bit(tmp_path, wrapped, whole_run):
    out = tmp_path / "out"
    first = "os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    script = wrapped(DIES_IN_A_STEP.format(step=15, condition=first), DIES_IN_A_SAVE)
    options = (*SHORT, "--checkpoint-every", 4, "--out", out)
    code, shown = torchrun(2, script, *options, restarts=4)
    assert code == 0, shown
    assert shown.count("killed by the test") == 2, shown
    assert_same_run(out, whole_run(2))
    assert len(list((out / "checkpoints").iterdir())) == 2  # the half-written one is gone


PAGE = SCRIPT.parents[1] / "docs" / "nodes.md"
DIES_ONCE = """
    if step == 57 and rank == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_the_script_of_the_page_survives(tmp_path):
    (block,) = re.findall(r"```python\n(import gc.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    step, path = "    optimizer.step()\n", 'Path("checkpoint.pt")'
    assert block.count(step) == block.count(path) == 1
    results = []
    for name, lethal in (("whole", ""), ("killed", DIES_ONCE)):
        saved = tmp_path / f"{name}.pt"
        script = tmp_path / f"{name}.py"
        text = block.replace(step, step + lethal)
        script.write_text(text.replace(path, f"Path({str(saved)!r})"))
        if lethal:
            env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the page says
            code, shown = torchrun(2, script, restarts=2, env=env)
            assert code == 0, shown
            # The agent names the rank that it saw first: the killed one, or one that lost it.
            assert re.search(r"exitcode: (-9|1)\b", shown), shown
        else:
            ranks = start_and_listen(2, script)
            shown = "".join(said for _, said in ranks)
            assert [code for code, _ in ranks] == [0, 0], shown
        digests = sorted(re.findall(r"^([01]) ([0-9a-f]{64})$", shown, re.MULTILINE))
        assert [rank for rank, _ in digests] == ["0", "1"], shown
        results.append((digests, torch.load(saved, weights_only=True)))
    (digests, whole), (others, killed) = results
    assert digests == others
    assert torch.equal(whole["model"]["weight"], killed["model"]["weight"])
    assert not (tmp_path / "killed.tmp").exists()


def content(step):
    return {"step": step, "model": {"weight": torch.full((40,), float(step))}, "names": ["a", "b"]}


def test_a_damaged_checkpoint_is_never_loaded(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, content(step))
    older, newer = sorted(tmp_path.iterdir())
    assert [older.name, newer.name] == ["step-00000002.pt", "step-00000003.pt"]
    whole = newer.read_bytes()
    torn = [whole[:length] for length in range(0, len(whole), 97)]
    torn += [bytes(length) + whole[length:] for length in range(1, len(whole), 97)]
    draws = random.Random(0)
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draws.randrange(8)
        torn.append(bytes(flipped))
    rejected = 0
    for damage in torn:
        newer.write_bytes(damage)
        saved, damaged = load_newest_checkpoint(tmp_path)
        assert saved is not None
        rejected += bool(damaged)
        # A flipped bit in the padding leaves the checkpoint whole.
        step = 2 if damaged else 3
        assert damaged in ([], [newer])
        assert {**saved, "model": None} == {**content(step), "model": None}
        assert torch.equal(saved["model"]["weight"], content(step)["model"]["weight"])
    assert rejected > len(torn) / 3
    older.write_bytes(whole[:100])
    newer.write_bytes(whole[:100])
    assert load_newest_checkpoint(tmp_path) == (None, [newer, older])


def fill_the_disk(path):
    with whole_file(path) as file:
        file.write(b"half")
        raise OSError("disk full")


def test_a_save_that_fails_leaves_the_last_one(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, content(step))
    (tmp_path / "step-00000003.pt.tmp").write_bytes(b"half")  # as SIGKILL leaves it
    saved, damaged = load_newest_checkpoint(tmp_path)
    assert saved is not None
    assert (saved["step"], damaged) == (2, [])
    before = (tmp_path / "step-00000002.pt").read_bytes()
    with pytest.raises(OSError, match="disk full"):
        fill_the_disk(tmp_path / "step-00000002.pt")
    assert (tmp_path / "step-00000002.pt").read_bytes() == before
    save_checkpoint(tmp_path, 3, content(3))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000002.pt", "step-00000003.pt"]
