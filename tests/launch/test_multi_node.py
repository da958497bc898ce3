"""launch/multi_node.sh and launch/slurm.sh: two torchrun agents, as two nodes, on the loopback."""

import os
import socket
import subprocess
import sys

import pytest
from train_runs import DIES_IN_A_STEP, SCRIPT, SHORT, WRAPPED, assert_same_run, finish

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


@pytest.mark.slow
def test_two_nodes_survive_a_killed_rank_bit_for_bit(tmp_path, whole_run):
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    death = DIES_IN_A_STEP.format(step=15, condition="os.environ['RANK'] == '1' and first_time()")
    once = ONCE.replace("MARK", repr(str(tmp_path / "died")))
    script, out = tmp_path / "wrapped.py", tmp_path / "out"
    script.write_text(WRAPPED.replace("FATAL", once + death))
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
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
    assert code == 0, shown
    assert shown.count("killed by the test") == 1, shown
    assert_same_run(out, whole_run(2))


def test_what_is_missing_is_named():
    command, env = LAUNCH / "multi_node.sh", {"PATH": os.environ["PATH"], "NNODES": "2"}
    done = subprocess.run([command, "x.py"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("multi_node.sh: set RDZV_ENDPOINT;")
