"""A whole step in a CUDA graph of the driver: the numbers of the loop."""

import copy

import pytest
import torch
from gpu_checks import EXACT, F64
from optim_cases import VARIANTS
from torch import nn

from gq_triton import GradQueue, cuda_graph
from gq_triton.optim.base import GradQueueOptimizer

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


class Loop:
    """A model, its optimizer, a scheduler and a loss scaler; ``step`` is the whole step."""

    def __init__(self, kind: str, scaled: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 1))
        self.model.to(DEVICE, F64)
        params = self.model.parameters()
        self.queue = None
        if kind == "plug-in":
            self.optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
            self.queue = GradQueue(self.model, queue_length=3)
            self.queue.attach(self.optimizer)
        else:
            self.optimizer = VARIANTS[kind].build(params, queue_length=3, loss_window=2)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.scaler = torch.amp.GradScaler(DEVICE, enabled=scaled, init_scale=8.0)
        self.holders = [self.optimizer] if self.queue is None else [self.optimizer, self.queue]

    def step(self, x: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        self.scaler.scale(loss).backward()
        if isinstance(self.optimizer, GradQueueOptimizer):
            self.optimizer.record_loss(loss)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss


@pytest.mark.parametrize(
    ("kind", "scaled"),
    [("sgd-momentum", False), ("adamw", False), ("adamw", True), ("plug-in", False)],
)
def test_a_captured_loop_is_the_loop(kind, scaled):
    """The last batch is smaller, a checkpoint is loaded, and the queue becomes full in replays."""
    ours, twin = Loop(kind, scaled), Loop(kind, scaled)
    step = cuda_graph(ours.step, *ours.holders)
    generator = torch.Generator().manual_seed(1)
    for number in range(18):
        if number == 8:
            for loop in (ours, twin):
                loop.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
        x = torch.randn(5 if number == 6 else 20, 6, dtype=F64, generator=generator)
        captured, expected = step(x), twin.step(x.to(DEVICE))
        torch.testing.assert_close(captured, expected, rtol=EXACT, atol=EXACT)
        assert step.captured == (3 <= number < 8 or number >= 11)
        if kind != "plug-in":  # torch's SGD holds a number, which a replay cannot see
            ours.schedule.step()
            twin.schedule.step()
    for left, right in zip(ours.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=EXACT, atol=EXACT)
