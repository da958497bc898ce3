"""A captured step depends on nothing that Python does between two replays."""

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import INTERPRETED, QUIET
from optim_cases import (
    PAIR,
    assert_same,
    both_optimizers,
    gradients_of,
    parameters,
    set_gradients,
    snapshot,
    values,
)
from replay import Recording

from gq_triton import GQAdamW, GradQueue, ring
from gq_triton.kernels import launch

pytestmark = [
    *QUIET,
    pytest.mark.skipif(not INTERPRETED, reason="Kernels are recorded in the interpreter."),
]
LENGTH = 3


class Loop:
    """A loop over memory that stays where it is: gradients and learning rate."""

    def __init__(self, variant):
        self.params = parameters()[3:6]
        self.optimizer = variant.build(
            self.params, lr=torch.tensor(0.1), queue_length=LENGTH, backend="triton"
        )
        for param in self.params:
            param.grad = torch.empty_like(param)

    def feed(self, step):
        """Write the numbers of a step to where the step reads them."""
        new = set_gradients([torch.empty_like(p) for p in self.params], step)
        for grad, value in zip(gradients_of(self.params), new, strict=True):
            grad.copy_(value)

    def step(self):
        self.optimizer.step()


@pytest.mark.slow
def test_a_state_that_was_loaded_between_replays_goes_on():
    """Its values are copied into the memory that the graph reads."""
    captured, eager = Loop(PAIR["adamw"]), Loop(PAIR["adamw"])
    graph, saved = Recording(), snapshot(captured.optimizer)
    for step in range(4):
        for loop in (captured, eager):
            loop.feed(step)
        eager.step()
        if step < 2:
            captured.step()
        elif step == 2:
            with graph():
                captured.step()
        else:
            graph.replay()
        if step == 1:
            saved = snapshot(captured.optimizer)
    params, states, _ = saved
    with torch.no_grad():
        for loop in (captured, eager):
            for param, value, state in zip(loop.params, params, states.values(), strict=True):
                param.copy_(value)
                for key, entry in state.items():
                    loop.optimizer.state[param][key].copy_(entry)
    for loop in (captured, eager):
        loop.feed(9)
    graph.replay()
    eager.step()
    assert_same(snapshot(captured.optimizer), snapshot(eager.optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"loss_window": 2}, {"match_norm": True}], ids=str)
def test_replays_of_the_plug_in_are_steps(options):
    def build():
        model = torch.nn.Linear(5, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        queue = GradQueue(model, queue_length=LENGTH, backend="triton", **options)
        queue.attach(optimizer)
        for param in model.parameters():
            param.data.fill_(0.5)
            param.grad = torch.empty_like(param)
        return model, optimizer, queue, torch.zeros(())

    captured, eager, graph = build(), build(), Recording()

    def step_of(model, optimizer, queue, loss):
        if options.get("loss_window"):
            queue.record_loss(loss)
        optimizer.step()

    for step in range(7):
        for model, _, _, loss in (captured, eager):
            new = set_gradients([torch.empty_like(p) for p in model.parameters()], step)
            for grad, value in zip(gradients_of(model.parameters()), new, strict=True):
                grad.copy_(value)
            loss.fill_(20.0 - step)
        if step < 2:
            step_of(*captured)
        elif step == 2:
            with graph():
                step_of(*captured)
        else:
            graph.replay()
        step_of(*eager)
        assert captured[2].digest() == eager[2].digest()
        assert captured[2].metrics() == eager[2].metrics()
        assert_same(values(captured[0].parameters()), values(eager[0].parameters()))


@both_optimizers
def test_a_first_step_cannot_be_captured(variant, monkeypatch):
    """A replay would empty the state that the step makes."""
    monkeypatch.setattr(ring, "capturing", lambda device: True)
    loop = Loop(variant)
    loop.feed(0)
    with pytest.raises(RuntimeError, match="a queue cannot be made while a CUDA graph is captured"):
        loop.step()


def test_tables_of_a_capture_are_copied_from_pinned_memory_that_is_kept(monkeypatch):
    """torch refuses other memory in a capture, and every replay copies from it again."""
    pins = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=1))
    monkeypatch.setattr(launch, "_build", lambda *args: pins.append(args[3]) or "a table")
    kept, cache = len(launch._captured), {}
    launch.tables(torch.device("cuda"), "key", cache, lambda: [(1, 0, 16)], lambda _: True)
    assert pins == [True]
    assert launch._captured[kept:] == [["a table"]]
    assert not cache
    del launch._captured[kept:]


def test_a_table_is_made_once_for_each_set_of_addresses():
    """It is found whether it was the last or an earlier one; the one that was used least goes."""
    made, cache = [], {}

    def table(key):
        def rows():
            made.append(key)
            return [(1, 0, 16)]

        return launch.tables(torch.device("cpu"), (key,), cache, rows, lambda _: True)

    first, second = table("first"), table("second")
    assert table("second") is second
    assert table("first") is first
    for key in range(launch._CACHE_SIZE - 1):
        table(key)
    assert table("first") is first
    assert table("second") is not second
    assert made == ["first", "second", *range(launch._CACHE_SIZE - 1), "second"]


def test_capturable_is_taken():
    GQAdamW(parameters(), capturable=True)
