"""Runs of launch/train.py in many processes, and the comparison of what they left behind."""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from torch.distributed.run import main as torchrun_main

from gq_triton.testing import PRELOAD, server
from gq_triton.training.checkpoints import load_newest_checkpoint
from gq_triton.training.metrics import read_metrics

# What every run of train.py imports and compiles takes most of its time.
PRELOAD.extend(["sklearn.datasets", "sklearn.model_selection", "matplotlib.figure"])
PRELOAD.extend(["matplotlib.backends.backend_agg", "compiled_ahead"])

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "train.py"
# 6 steps per epoch, the last of them smaller and, with 2 ranks, of unequal shares.
SHORT = ("--device", "cpu", "--epochs", "4", "--batch-size", "256", "--loss-window", "3")

# A script that runs train.py. A test puts the code that makes the run fail in the place of FATAL.
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

# Code that kills a process in a step; the condition selects the ranks and the attempts.
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
    """Run commands at once; return exit codes and outputs. No process outlives the call."""
    with ExitStack() as stack:
        done = []
        for command, env in zip(commands, envs, strict=True):
            # The output goes to a file: a full pipe would block a process that nobody reads yet.
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
    """Run a script under torchrun; return its exit code and output.

    torchrun and its ranks are forked from a process that has imported torch, which torchrun would
    have every rank do anew after every restart. Agent, rendezvous and restarts are torchrun's own.
    """
    command = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    command += [str(script), *map(str, args)]
    (done,) = torchruns([command], [env or {}])
    return done


def torchruns(
    commands: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]]
) -> list[tuple[int, str]]:
    """Run what follows ``torchrun`` in its commands at once; return exit codes and outputs.

    The scripts of the commands must be files.
    """
    own = ["--start-method=forkserver", "--run-path", "--tee=3", "--monitor-interval=0.1"]
    done = _be_at_once(_be_torchrun, [[*own, *command] for command in commands], envs)
    # Without the words that say whose line it is.
    return [(code, re.sub(r"^\[\w+\]:", "", shown, flags=re.MULTILINE)) for code, shown in done]


def _be_torchrun(command: list[str], env: dict[str, str], log: str, folder: str) -> None:
    """Be ``torchrun command`` in a folder, with both streams in a file."""
    _move(env, log, folder)
    # Its docstring says that children reuse the server of their parent; but they would start one.
    forkserver._forkserver.ensure_running = lambda: None
    torchrun_main(["--log-dir", str(Path(log).with_suffix("")), *command])


def start(ranks: int, script: Path, *args: object) -> list[int]:
    """Run a script as torchrun does, without the time that torchrun takes; return exit codes."""
    return [code for code, _ in start_and_listen(ranks, script, *args)]


def start_and_listen(
    ranks: int, script: Path, *args: object, timeout: float = 300
) -> list[tuple[int, str]]:
    """Run a script in processes that need not import torch anew; return what ``finish`` does."""
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    envs = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return _be_at_once(_be_script, [[str(script), *map(str, args)]] * ranks, envs, timeout)


def _be_script(command: list[str], env: dict[str, str], log: str, folder: str) -> None:
    """Be ``python command`` in a folder, with both streams in a file."""
    _move(env, log, folder)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _move(env: dict[str, str], log: str, folder: str) -> None:
    os.chdir(folder)
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= env


def _be_at_once(
    being: Callable[..., None],
    commands: Sequence[list[str]],
    envs: Sequence[Mapping[str, str]],
    timeout: float = 300,
) -> list[tuple[int, str]]:
    """Run commands at once in processes that need not import torch anew, as ``finish`` does."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        done = []
        for number, (command, env) in enumerate(zip(commands, envs, strict=True)):
            log = Path(folder, f"{number}.txt")
            task = (command, dict(env), str(log), os.getcwd())
            process = server().Process(target=being, args=task)
            process.start()
            stack.callback(process.kill)
            done.append((process, log))
        for process, log in done:
            process.join(timeout=timeout)
            assert process.exitcode is not None, f"{commands} hang: {log.read_text()}"
        return [(process.exitcode, log.read_text()) for process, log in done]


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
