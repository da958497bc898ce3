"""gq-triton plan: its refusals, its files, its arithmetic beside the documentation's."""

import csv
import io
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gq_triton.commands.cli import main
from gq_triton.float8 import BYTE, FLOAT8, ring_bytes
from gq_triton.plan import formulas
from gq_triton.plan.command import main as plan
from gq_triton.plan.exchange import Exchange, Stage, exposed
from gq_triton.plan.machine import Machine, Message
from gq_triton.plan.report import best, recommendation
from gq_triton.plan.shapes import Parameter, Shapes, shapes_of
from gq_triton.plan.ways import QUEUES, WAYS, Setup, cost

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine(1e12, 1e11, 5e10, 0.0, 8, 0.3, 2**36)
MODULE = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(1000, 2000), nn.Linear(2000, 10))

def broken():
    return nn.Linear(2, 2).weight.data.mul_(0).item()

def frozen():
    return nn.Linear(2, 2).requires_grad_(False)

number = 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    Path(tmp_path, "my_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_models", None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["my_models:net", "--world-size", "0"], "--world-size: must be an integer from 1"),
        (["my_models:net", "--world-size", "12"], "--world-size must be whole nodes"),
        (["my_models:net", "--memory", "-3"], "--memory: must be a number > 0"),
        (["my_models:net", "--calibrate", "--link", "4"], "--calibrate takes the place of --link"),
        (["my_models:net", "--compute-ms", "4", "--tflops", "1"], "the place of --tflops: leave"),
        (["my_models:net", "--optimizer", "lion"], "--optimizer: invalid choice"),
        (["my_models:net", "--out", "my_models.py"], "--out must be a folder"),
        (["my_models:net", "--out", "my_models.py/plan"], "my_models.py is no folder"),
        (["my_models:net", "--out", "x" * 300], "cannot be made: File name too long"),
        (["my_models:net", "--out", "/proc/plan"], "is no folder one may write to"),
        (["my_models:absent"], "must have a function absent"),
        (["my_models:number"], "must have a function number"),
        (["no_models:net"], "no_models:net cannot be imported"),
        ([":net"], "must be package.module:function"),
        (["my_models:broken"], "cannot be built on the meta device"),
        (["my_models:frozen"], "must have parameters to train"),
        ([], "the following arguments are required: MODEL"),
    ],
)
def test_bad_input_is_refused_in_a_line_and_nothing_is_written(models, capsys, words, said):
    assert plan(words) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not (models / "plan").exists()


def test_an_interrupt_ends_a_command_in_a_line(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("gq_triton.plan.command.main", interrupted)
    assert main(["plan", "gpt2"]) == 130
    assert capsys.readouterr().err == "gq-triton plan: interrupted\n"


@pytest.mark.slow
def test_a_plan_is_printed_and_written(models, capsys):
    assert main(["plan", "my_models:net", "--world-size", "64", "--compute-ms", "10"]) == 0
    said = capsys.readouterr().out
    assert "2.022 M parameters" in said
    assert "torchrun --nnodes=8" in said
    assert (models / "plan" / "plan.txt").read_text() in said
    rows = list(csv.DictReader(io.StringIO((models / "plan" / "plan.csv").read_text())))
    assert {int(row["gpus"]) for row in rows} == {2**n for n in range(15)}
    whole = next(r for r in rows if r["way"] == "DDP hook" and r["queue_dtype"] == "model's")
    assert float(whole["queue"]) == pytest.approx(5 * 4 * 2_022_010, rel=1e-5)
    assert (models / "plan" / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.rare  # copies 512 MiB on each of two ranks
def test_a_calibration_measures_this_machine(models, capsys):
    assert plan(["my_models:net", "--world-size", "2", "--calibrate"]) == 0
    said = capsys.readouterr().out
    assert "memory, link and latency measured (CPU, 2 ranks)" in said
    memory, link, latency = re.findall(r"(?:memory|link|latency) ([\d.e+]+)", said)[:3]
    assert 0.1 < float(memory) < 1e4
    assert 0.001 < float(link) < 1e3
    assert 0.1 < float(latency) < 1e6


@pytest.mark.slow
@pytest.mark.rare  # importing transformers takes seconds
@pytest.mark.parametrize(
    ("what", "numel", "blocks"),
    [("gpt2", 124_439_808, 12), (str(ROOT / "docs/scaling/llama-8b.json"), 8_030_261_248, 32)],
)
def test_configurations_are_built_without_memory(what, numel, blocks):
    from gq_triton.plan.shapes import load

    shapes = load(what)
    assert (shapes.numel, len(shapes.units)) == (numel, blocks + 1)


def test_bytes_per_element_are_those_of_the_kernels_page():
    page = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")

    lines = re.findall(
        r"^\| `(\w+)`(?:, momentum)? \|" + 3 * r"[^|]*= (\d+) \|" + r" (.+) \|$", page, re.M
    )
    said = {kernel: ([*map(int, by_type)], plain) for kernel, *by_type, plain in lines}
    sgd, adamw = (formulas.optimizer(name, 4) for name in ("sgd", "adamw"))
    rings = torch.float32, torch.bfloat16, BYTE
    assert said == {
        "push_": ([formulas.pushed(5, 4, ring) for ring in rings], "-"),
        "weigh_": ([formulas.weighed(5, 4, ring) for ring in rings], "-"),
        "gqsgd_": ([sgd + formulas.law(5, ring) for ring in rings], str(sgd)),
        "gqadamw_": ([adamw + formulas.law(5, ring) for ring in rings], str(adamw)),
    }
    read = re.findall(r"4 K \+ (\d+) \+ 8", page)
    assert [*map(int, read)] == [ring_bytes(5, ring) for ring in rings]
    # The K - 1 sums that are written before are not the kernel's.
    assert formulas.combined(8, 4, 20) - 7 * 4 == 4 * 8 + 20 + 8


def test_units_are_the_blocks_and_the_rest_is_the_models_own():
    tied = nn.Linear(4, 6, bias=False)
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4),
                           "blocks": nn.ModuleList(nn.Linear(9, 9) for _ in range(3)),
                           "head": tied})  # fmt: skip
    model["embedding"].weight = tied.weight
    shapes = shapes_of("m", model)
    assert [sum(p.numel for p in unit) for unit in shapes.units] == [24, 90, 90, 90]
    assert shapes.numel == 294


def test_a_shard_of_few_rows_is_as_large_as_a_row():
    param = Parameter((10, 3), torch.float32)
    assert [param.shard(ranks) for ranks in (1, 3, 10, 16384)] == [30, 12, 3, 3]


def test_a_bucket_that_the_ranks_do_not_divide_is_copied():
    numel = 130_000  # 16 ranks divide it, 32 do not
    for world, copied in ((16, 0), (32, 5 * 4)):
        (whole,) = [c for c in at(world, numel)[0] if c.way.sliced and c.queue_dtype is None]
        assert whole.moved == numel * (36 / world + copied)
        sums = [c for c in at(world, numel, clusters=4)[0] if c.way.sliced]
        by_ring = [4 + 4 + 4 + 28, 4 + 4 + 2 + 18, 4 + 4 + 12 + 14]  # read, pushed, statistics
        for c, ring, raw in zip(sums, by_ring, (4, 2, 4), strict=True):
            read = formulas.combined(4, 4, formulas.STATISTIC)
            assert c.moved == numel * (read + ring / world + (3 * raw if copied else 0))


def test_only_the_last_bucket_waits_where_the_link_is_quick_and_all_do_where_it_is_slow():
    def waited(nbytes):
        sent = [Message(nbytes, 1, 2)]
        stages = [Stage(1, after=sent) for _ in range(4)]
        return exposed(Exchange([Stage(4)], stages), MACHINE)

    quick, slow = 1e9, 1e11  # 5 ms and 500 ms; a stage computes for 50 ms
    assert waited(quick) == pytest.approx(0.005)
    assert waited(slow) == pytest.approx(0.05 + 4 * 0.5 - 0.2)


def test_what_is_fetched_ahead_is_hidden_but_the_first():
    fetched = [Message(2e9, 1, 2)]  # 10 ms; a stage computes for 25 ms
    stages = [Stage(1, before=fetched) for _ in range(4)]
    assert exposed(Exchange(stages, [Stage(4)]), MACHINE) == pytest.approx(0.01)


def test_copies_of_a_shard_share_the_network_of_their_node():
    one, eight = Message(1e9, 2, 4), Message(1e9, 2, 4, among=8)
    assert one.seconds(MACHINE) == pytest.approx(0.015)
    assert eight.seconds(MACHINE) == pytest.approx(8 * 1.5e9 / 5e10)


def at(world, numel=10**9, capacity=2.0**36, clusters=0):
    block = [Parameter((numel // 10_000, 10_000), torch.float32)]
    setup = Setup(Shapes("m", [block], block), "adamw", 5, clusters)
    machine = Machine(1e12, 1e11, 5e10, 1e-6, 8, 0.3, capacity)
    costs = [cost(way, setup, machine, world, q) for way in WAYS for q in QUEUES]
    return [c for c in costs if c is not None], setup, machine


def test_the_quickest_way_that_fits_is_recommended():
    costs, setup, machine = at(8)
    chosen = best(costs, machine)
    assert chosen is not None
    assert chosen.step == min(c.step for c in costs if c.queue_dtype is None)
    assert "--standalone --nproc-per-node=8" in recommendation(costs, setup, machine)


def test_a_queue_that_rounds_is_recommended_only_where_none_fits_that_rounds_less():
    for gigabytes, queue in ((11e9, torch.bfloat16), (7e9, FLOAT8)):
        costs, setup, machine = at(1, capacity=16e9 + gigabytes)  # queue 20, 10 or 6 GB
        chosen = best(costs, machine)
        assert chosen is not None
        assert chosen.queue_dtype == queue
        said = recommendation(costs, setup, machine)
    assert "queue in float8: " in said
    assert 'queue_length=5, queue_dtype="float8")' in said
    costs, setup, machine = at(1, capacity=16e9)
    assert best(costs, machine) is None
    assert recommendation(costs, setup, machine).startswith("Nothing fits: ")


def test_a_queue_type_is_planned_where_it_takes_less():
    for dtype, length, queues in (
        (torch.float32, 5, [*QUEUES]),
        (torch.bfloat16, 5, [None, FLOAT8]),
        (torch.float32, 1, [None, torch.bfloat16]),
    ):
        block = [Parameter((3, 4), dtype)]
        assert Setup(Shapes("m", [block], block), "sgd", length, 0).queues == queues


def test_ways_exist_where_they_mean_something():
    assert {c.way.wrap for c in at(1)[0]} == {"ddp"}
    assert {c.way.wrap for c in at(8)[0]} == {"ddp", "fsdp2"}
    assert {c.way.wrap for c in at(16)[0]} == {"ddp", "fsdp2", "hsdp"}
    assert all(c.way.clusters for c in at(16, clusters=4)[0])


def test_recommended_lines_are_python_with_keywords_that_exist():
    import ast
    import inspect

    import gq_triton
    import gq_triton.dist
    from gq_triton.plan.report import _code

    public = {**vars(gq_triton), "register": gq_triton.dist.GradQueueState}
    for c in (*at(16)[0], *at(16, clusters=4)[0]):
        setup = at(16, clusters=4 if c.way.clusters else 0)[1]
        for call in ast.walk(ast.parse("\n".join(_code(c.way, c, setup)))):
            name = getattr(call.func, "id", None) if isinstance(call, ast.Call) else None
            if isinstance(call, ast.Call) and name in public:
                known = inspect.signature(public[name]).parameters
                assert {k.arg for k in call.keywords} <= set(known)
