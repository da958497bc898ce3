"""Starts launch/train.py in many processes and compares what the runs left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from gq_triton.training.files import load_newest_checkpoint, read_metrics

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "train.py"
# 6 steps per epoch, the last of them smaller and, with 2 ranks, of unequal shares.
SHORT = ("--device", "cpu", "--epochs", "4", "--batch-size", "256", "--loss-window", "3")

# Runs train.py, but first lets FATAL(), which a test fills in, replace what is to go wrong.
WRAPPED = f"""
import os, runpy, signal, sys
import torch

def die():
    print("killed by the test", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

FATAL
sys.argv[0] = {str(SCRIPT)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Dies in a step: of every rank and attempt, unless the condition says otherwise.
DIES_IN_A_STEP = """
class Mortal(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        Mortal.steps += 1
        if Mortal.steps == {step} and {condition}:
            die()
        return super().step(closure)

torch.optim.SGD = Mortal
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finish(
    commands: list[list[str]], envs: Sequence[Mapping[str, str]], timeout: float = 300
) -> list[tuple[int, str]]:
    """Run commands side by side; return exit codes and what they said. None outlives the call."""
    with ExitStack() as stack:
        done = []
        for command, env in zip(commands, envs, strict=True):
            # A file: nobody reads a pipe while others are waited for.
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(_kill, process)
            done.append((process, log))
        codes = [process.wait(timeout=timeout) for process, _ in done]
        for _, log in done:
            log.seek(0)
        return [(code, log.read()) for code, (_, log) in zip(codes, done, strict=True)]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its session: torchrun's ranks outlive torchrun."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def torchrun(
    ranks: int, script: Path, *args: object, restarts: int = 0, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run a script under torchrun; return its exit code and output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    (done,) = finish([[*command, str(script), *map(str, args)]], [env or {}])
    return done


def start(ranks: int, script: Path, *args: object) -> list[int]:
    """Do what torchrun does without its seconds; return the exit codes."""
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    envs = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    command = [sys.executable, str(script), *map(str, args)]
    return [code for code, _ in finish([command] * ranks, envs)]


def newest(out: Path) -> dict[str, Any]:
    saved, damaged = load_newest_checkpoint(out / "checkpoints")
    assert saved is not None
    assert not damaged
    return saved


def assert_same_run(actual: Path, expected: Path) -> None:
    """Assert that two runs ended with the same rows, parameters, momentum and queue."""
    assert read_metrics(actual / "metrics.jsonl") == read_metrics(expected / "metrics.jsonl")
    summaries = [json.loads((out / "summary.json").read_text()) for out in (actual, expected)]
    assert summaries[0]["queue_digest"] == summaries[1]["queue_digest"]
    ours, theirs = newest(actual), newest(expected)
    assert ours["step"] == theirs["step"]
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    for name, ring in theirs["queue"]["queue"].items():
        assert torch.equal(ours["queue"]["queue"][name], ring), name
    for index, state in theirs["optimizer"]["state"].items():
        momentum = ours["optimizer"]["state"][index]["momentum_buffer"]
        assert torch.equal(momentum, state["momentum_buffer"])
