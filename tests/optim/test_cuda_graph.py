# pyright: reportAttributeAccessIssue=false
"""What a captured step copies, checks and replays, with a recording in place of the graph."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETED, QUIET
from one_rank import one_rank
from optim_cases import PAIR, assert_same, both_optimizers, snapshot
from replay import Recording, captured
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gq_triton import GradQueue, cuda_graph
from gq_triton.dist import register
from gq_triton.holders import DDP_WARMUP, Holders

pytestmark = [
    *QUIET,
    pytest.mark.skipif(not INTERPRETED, reason="Kernels are recorded in the interpreter."),
]
LENGTH = 3
CASES = {
    "plain": ("adamw", {}),
    "match_norm": ("sgd", {"match_norm": True}),
    "losses, scaled": ("sgd", {"loss_window": 2, "min_queue_length": 2, "scaled": True}),
}


class Loop:
    """A model with its optimizer, scheduler and loss scaler; ``step`` is the whole step."""

    def __init__(self, variant, scaled=False, **options):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.optimizer = variant.build(
            self.model.parameters(), queue_length=LENGTH, backend="triton", **options
        )
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0)
        self.measured = "loss_window" in options

    def step(self, x, power=2):
        self.optimizer.zero_grad()
        loss = self.model(x).abs().pow(power).mean()
        self.scaler.scale(loss).backward()
        if self.measured:
            self.optimizer.record_loss(loss)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {"loss": loss, "power": power}

    def holders(self) -> tuple[Any, ...]:
        return (self.optimizer,)

    def tensors(self):
        """Return all that a step changes, apart from gradients."""
        groups = self.optimizer.param_groups
        yield from self.model.parameters()
        for state in self.optimizer.state.values():
            yield from state.values()
        yield from (group["losses"] for group in groups if "losses" in group)
        yield from filter(torch.is_tensor, vars(self.scaler).values())


class PlugInLoop(Loop):
    """The same with torch's SGD and a queue."""

    def __init__(self):
        torch.manual_seed(0)
        self.model, self.measured = nn.Linear(4, 3), False
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.queue = GradQueue(self.model, queue_length=2, backend="triton")
        self.queue.attach(self.optimizer)

    def holders(self):
        return self.optimizer, self.queue

    def tensors(self):
        yield from super().tensors()
        yield from self.queue._tensors()


def batch(step, size=5):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(step))


def without_rates(loop):
    return snapshot(loop.optimizer), [float(g["lr"]) for g in loop.optimizer.param_groups]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_captured_loop_is_the_loop(case):
    """20 replays are 20 steps; a scheduler changes the rate in place, and one step is skipped."""
    kind, options = CASES[case]
    ours, twin = Loop(PAIR[kind], **options), Loop(PAIR[kind], **options)
    step, losses, expected = captured(ours), [], []
    for number in range(23 if case == "plain" else 7):
        assert step.captured == (number > 3)
        x = batch(number)
        if "scaled" in options and number == 5:
            x[0] = torch.inf
        losses.append(step(x)["loss"])
        expected.append(twin.step(x)["loss"].detach())
        for loop in (ours, twin):
            loop.schedule.step()
        assert_same(without_rates(ours), without_rates(twin))
    assert_same(losses, expected)
    assert not step._graph.recording.dangling()


def test_memory_that_is_freed_after_a_capture_is_seen():
    kept, dropped, recording = torch.ones(3), torch.ones(3), Recording()
    with recording():
        _ = (kept + 1) * dropped
    assert not recording.dangling()
    del dropped
    assert recording.dangling() == ["aten.mul.Tensor of (3,)"]


def test_what_does_not_fit_runs_as_it_is():
    """A last batch that is smaller, another number: the graph goes on afterwards."""
    log = []
    ours, twin = Loop(PAIR["adamw"]), Loop(PAIR["adamw"])
    step = captured(ours, warmup=2, log=log)
    calls = [(5, 2), (5, 2), (5, 2), (2, 2), (5, 2), (5, 3)]
    for number, (size, power) in enumerate(calls):
        step(batch(number, size), power=power)
        twin.step(batch(number, size), power=power)
        assert_same(snapshot(ours.optimizer), snapshot(twin.optimizer))
    assert log == ["step", "step", "capture", "replay", "step", "replay", "step"]


@pytest.mark.slow
@both_optimizers
def test_a_checkpoint_is_resumed_between_replays(variant):
    log = []
    ours, twin = Loop(variant), Loop(variant)
    step, saved = captured(ours, warmup=2, log=log), None
    for number in range(8):
        if number == 3:
            saved = [copy.deepcopy((o.model.state_dict(), o.optimizer.state_dict()))
                     for o in (ours, twin)]  # fmt: skip
        if number == 5 and saved is not None:
            for loop, (model, optimizer) in zip((ours, twin), saved, strict=True):
                loop.model.load_state_dict(model)
                loop.optimizer.load_state_dict(optimizer)
        step(batch(number))
        twin.step(batch(number))
        assert_same(snapshot(ours.optimizer), snapshot(twin.optimizer))
    assert log == ["step", "step", "capture", *3 * ["replay"], "step", "step", "capture", "replay"]


def test_a_queue_that_was_loaded_is_captured_anew():
    """Its rings lie in new memory; the graph would write to memory that is free."""
    log = []
    ours, twin = PlugInLoop(), PlugInLoop()
    step = captured(ours, warmup=2, log=log)
    for number in range(7):
        if number == 4:
            for loop in (ours, twin):
                loop.queue.load_state_dict(loop.queue.state_dict())
        step(batch(number))
        twin.step(batch(number))
        assert ours.queue.digest() == twin.queue.digest()
    assert log == ["step", "step", "capture", "replay", "replay", "step", "step", "capture",
                   "replay"]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda group: group.update(lr=0.5), "lr"),
        (lambda group: group.update(weight_decay=0.5), "weight_decay"),
    ],
)
def test_a_number_that_a_replay_cannot_see_is_refused(change, name):
    loop = Loop(PAIR["adamw"])
    step = captured(loop, warmup=2)
    for number in range(3):
        step(batch(number))
    change(loop.optimizer.param_groups[0])
    before = snapshot(loop.optimizer)
    with pytest.raises(RuntimeError, match=f"^{name} of group 0 of GQAdamW was changed after"):
        step(batch(3))
    assert_same(snapshot(loop.optimizer), before)
    step.reset()
    step(batch(3))


def test_a_capture_that_fails_leaves_no_graph():
    loop = Loop(PAIR["adamw"])
    step = captured(loop, warmup=2)
    fine = step._step
    step(batch(0))
    step(batch(1))
    step._step = lambda x: fine(x)["loss"].item()
    with pytest.raises(AssertionError, match="reads a value of the device"):
        step(batch(2))
    step._step = fine
    step(batch(2))
    assert not step.captured


def test_wrong_arguments_are_named(monkeypatch):
    loop = Loop(PAIR["adamw"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA device, found none"):
        cuda_graph(loop.step, loop.optimizer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="needs the optimizers that the step steps"):
        cuda_graph(loop.step)
    with pytest.raises(ValueError, match="warmup must be at least 2, got 1"):
        cuda_graph(loop.step, loop.optimizer, warmup=1)


class Plain:
    """A loop in plain torch whose step does what it is told."""

    def __init__(self, optimizer: Callable[..., Any] = torch.optim.SGD, **options: Any):
        self.model = nn.Linear(4, 1)
        self.optimizer: Any = optimizer(self.model.parameters(), lr=0.1, **options)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.calls, self.every = 0, 1
        self.inside: Callable[[], Any] = lambda: None

    def step(self, x):
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        loss.backward()
        self.calls += 1
        if self.calls % self.every == 0:
            self.optimizer.step()
        self.inside()
        return loss

    def holders(self):
        return (self.optimizer,)

    def tensors(self):
        yield from self.model.parameters()


class Counts(torch.optim.SGD):
    """It keeps a number in the place that ``keep`` names."""

    keep = "group"

    def step(self, closure=None):
        super().step()
        param = self.param_groups[0]["params"][0]
        if self.keep == "group":
            self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
        elif self.keep == "state":
            self.state[param]["count"] = self.state[param].get("count", 0) + 1
        else:
            self.state[param]["count"] = torch.zeros((), device="meta")


def test_what_only_python_changes_is_refused():
    counting = [Plain(type("Counts", (Counts,), {"keep": keep})) for keep in ("group", "state")]
    elsewhere, seldom, stepped = (
        Plain(type("Counts", (Counts,), {"keep": "meta"})),
        Plain(),
        Plain(),
    )
    seldom.every = 2
    stepped.inside = stepped.schedule.step
    ours = Plain(PAIR["adamw"].build, backend="torch")
    ours.inside = ours.schedule.step
    for loop, sentence in [
        (counting[0], "Counts keeps count as a number of Python"),
        (counting[1], "Counts keeps count as a number of Python"),
        (elsewhere, "Counts keeps count on meta, where no replay changes it"),
        (seldom, "a call stepped SGD 0 times, and a replay repeats one call"),
        (stepped, "SGD keeps lr as a number of Python"),
        (ours, "the learning rate changes within the step"),
    ]:
        step = captured(loop)
        for _ in range(2):
            with contextlib.suppress(RuntimeError):
                step(batch(0))
        with pytest.raises(RuntimeError, match=sentence):
            step(batch(0))


def test_hooks_and_frozen_parameters_are_captured_anew():
    """Another plug-in, or a parameter that trains no more: the graph would not see it."""
    loop, log = Plain(), []
    step = captured(loop, warmup=2, log=log)
    for number in range(9):
        if number == 3:
            loop.model.bias.requires_grad_(False)
        if number == 6:
            queue = GradQueue(loop.model, backend="triton")
            queue.attach(loop.optimizer)
        step(batch(number))
    once = ["step", "step", "capture", "replay"]
    assert log == 3 * once


def as_it_is(loop, twin, why):
    """Assert that every call is the step itself, and that the first one warns."""
    log = []
    step = captured(loop, warmup=2, log=log)
    for number in range(4):
        with pytest.warns(UserWarning, match=why) if number == 0 else contextlib.nullcontext():
            loss = step(batch(number))
        assert torch.equal(loss, twin.step(batch(number)))
    assert not log
    assert not step.captured


@pytest.mark.slow
def test_a_step_on_ranks_runs_as_it_is(monkeypatch):
    """A refusal would end the training that ran on one device."""
    with one_rank():
        for hooked in (True, False):
            ours, twin = Plain(), Plain()
            twin.model.load_state_dict(ours.model.state_dict())
            ours.model, twin.model = (DistributedDataParallel(loop.model) for loop in (ours, twin))
            states = [register(loop.model, backend="torch") for loop in (ours, twin) if hooked]
            why = "hook of .* needs Python in every step" if hooked else "give warmup=11 if it was"
            as_it_is(ours, twin, f"^cuda_graph runs this step as it is, without a graph: .*{why}")
            assert len({state.digest() for state in states}) == hooked
            # Who follows torch's rules gets a graph, without a hook.
            refused = Holders([ours.optimizer]).kept_from_a_graph(DDP_WARMUP)
            assert (refused is not None) == hooked
            del ours.model, twin.model, states
    ours, twin = Plain(), Plain()
    twin.model.load_state_dict(ours.model.state_dict())
    monkeypatch.setattr("gq_triton.holders.dtensor", lambda: (nn.Parameter,))
    as_it_is(ours, twin, "divided among processes, as by fully_shard")
