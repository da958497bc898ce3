"""launch/multi_node.sh and launch/slurm.sh: two torchrun agents, as two nodes, on the loopback."""

import json
import os
import socket
import subprocess
import sys

import pytest
from train_runs import DIES_IN_A_STEP, SCRIPT, SHORT, WRAPPED, assert_same_run, finish, torchruns

LAUNCH = SCRIPT.parent
LOOPBACK = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))

# Two commands of SLURM, for two nodes that are both this machine. Their agents meet as on others.
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\n127.0.0.1\\n"
"""
SRUN = """#!/bin/sh
[ "$1" = --kill-on-bad-exit=1 ] || exit 3
shift
"$@" & one=$!
"$@" & two=$!
wait $one && wait $two
"""

# Rank 1 must die only once. A file marks it, since the agents count their attempts differently.
ONCE = """
def first_time():
    try:
        os.close(os.open(MARK, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
"""


def job_with_a_free_port():
    for job in range(1000 + os.getpid() % 5000, 10_000):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", 20_000 + job))
            except OSError:
                continue
            return job
    raise AssertionError("no free port")


@pytest.fixture
def two_nodes(tmp_path):
    """Return a function that has two nodes run a script which is killed once, in a torchrun each.

    It takes the interpreter that launch/slurm.sh starts, and returns the folder of the run, the
    exit code and the output.
    """
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    death = DIES_IN_A_STEP.format(step=15, condition="os.environ['RANK'] == '1' and first_time()")
    once = ONCE.replace("MARK", repr(str(tmp_path / "died")))
    script, out = tmp_path / "wrapped.py", tmp_path / "out"
    script.write_text(WRAPPED.replace("FATAL", once + death))

    def run(python):
        env = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": str(python),
            "NPROC_PER_NODE": "1",
            "LOCAL_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": LOOPBACK,
            "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_ID": str(job_with_a_free_port()),
        }
        command = [str(LAUNCH / "slurm.sh"), str(script), *SHORT, "--checkpoint-every", "4"]
        ((code, shown),) = finish([[*command, "--out", str(out)]], [env])
        return out, code, shown

    return run


# Stands for the interpreter: writes down what it was started with.
NOTES = """#!{python} -S
import json, os, sys
with open({folder!r} + "/" + str(os.getpid()) + ".json", "w") as file:
    json.dump([sys.argv[1:], dict(os.environ)], file)
"""


@pytest.mark.slow
def test_two_nodes_survive_a_killed_rank_bit_for_bit(tmp_path, two_nodes, whole_run):
    """The scripts say how both nodes start torchrun; both are then forked from the tests' server.

    There torch is imported once, and not by two agents, two ranks and two ranks after the restart.
    """
    started, python = tmp_path / "started", tmp_path / "python"
    started.mkdir()
    python.write_text(NOTES.format(python=sys.executable, folder=str(started)))
    python.chmod(0o755)
    out, code, shown = two_nodes(python)
    assert code == 0, shown
    nodes = [json.loads(path.read_text()) for path in started.iterdir()]
    assert len(nodes) == 2
    assert all(words[:2] == ["-m", "torch.distributed.run"] for words, _ in nodes)
    assert all(env["OMP_NUM_THREADS"] == "1" for _, env in nodes)
    done = torchruns([words[2:] for words, _ in nodes], [env for _, env in nodes])
    shown = "\n".join(said for _, said in done)
    assert [code for code, _ in done] == [0, 0], shown
    assert shown.count("killed by the test") == 1, shown
    assert_same_run(out, whole_run(2))


@pytest.mark.rare
def test_two_nodes_as_slurm_starts_them(two_nodes, whole_run):
    out, code, shown = two_nodes(sys.executable)
    assert code == 0, shown
    assert shown.count("killed by the test") == 1, shown
    assert_same_run(out, whole_run(2))


def test_what_is_missing_is_named():
    command, env = LAUNCH / "multi_node.sh", {"PATH": os.environ["PATH"], "NNODES": "2"}
    done = subprocess.run([command, "x.py"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("multi_node.sh: set RDZV_ENDPOINT;")
