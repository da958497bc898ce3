# Gradients, layers and labels are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
"""Training loops of mixed precision with clusters: loss scales, skipped steps, autocast."""

import copy

import pytest
import torch
from cluster_cases import GPT, MLP, Judge, ResNet
from loop_cases import LABELS, batches, make, square
from torch import nn

from gq_triton import GradQueue


def test_grad_scaler_changes_no_number():
    model, twin = make(), make()
    plain, scaled = Judge(twin, LABELS, 5), make()
    judge = Judge(scaled, LABELS, 5)
    judge.handle.remove()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    judge.queue.attach(judge.optimizer, scaler)
    for number, batch in enumerate(batches(7)):
        judge.optimizer.zero_grad()
        loss = square(scaled, batch).mean()
        if number == 4:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.unscale_(judge.optimizer)
        nn.utils.clip_grad_norm_(scaled.parameters(), 1e6)
        scaler.step(judge.optimizer)
        scaler.update()
        if number != 4:
            plain.optimizer.zero_grad()
            square(twin, batch).mean().backward()
            plain.optimizer.step()
    assert judge.queue.digest() == plain.queue.digest()
    del model
    for actual, expected in zip(scaled.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("unscaled", [False, True])
def test_an_optimizer_that_skips_by_itself_queues_nothing_then(unscaled):
    """A fused optimizer reads on the device that a step is skipped; the host calls every step."""
    model = make()
    queue = GradQueue(
        model, n_clusters=5, features="features", queue_length=3, clusterer=lambda f: LABELS
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    queue.attach(optimizer, scaler)
    for number, batch in enumerate(batches()):
        before = queue.digest(), [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(square(model, batch).mean()).backward()
        if number == 4:
            model.head.weight.grad[0, 0] = torch.inf  # the others are finite
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert queue.digest() == before[0]
    assert set(map(int, queue.state_dict()["queued"].values())) == {4}
    for param, value in zip(model.parameters(), before[1], strict=True):
        assert torch.equal(param, value)


@pytest.mark.parametrize("kind", [MLP, GPT, lambda: ResNet(lambda c: nn.GroupNorm(2, c))])
def test_autocast_bfloat16(kind):
    """The weighted gradient is float32, and as near to that of float32 as plain autocast's is."""
    torch.manual_seed(0)
    model = kind()
    plain = copy.deepcopy(model)
    queue = GradQueue(model, n_clusters=5, features="features", rho=1.0,
                      clusterer=lambda f: LABELS)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    queue.attach(optimizer)
    inputs = {MLP: torch.randn(9, 6), GPT: torch.randint(0, 9, (9, 5))}
    batch = inputs.get(kind, torch.randn(9, 2, 8, 8))
    for m in (model, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (m(batch).float() - 1).square().mean()
        loss.backward()
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert actual.grad.dtype == torch.float32
        scale = expected.grad.abs().max()
        assert float((actual.grad - expected.grad).abs().max() / scale) < 3e-2
    optimizer.step()


@pytest.mark.parametrize("kind", [MLP, GPT, lambda: ResNet(nn.BatchNorm2d)])
def test_autocast_float16_with_a_scaler_and_clipping(kind):
    """The loop is that of torch's documentation of mixed precision, with one overflow."""
    torch.manual_seed(0)
    model = kind()
    plain = copy.deepcopy(model)
    queue = GradQueue(model, n_clusters=5, features="features", rho=1.0,
                      clusterer=lambda f: LABELS)  # fmt: skip
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, plain)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in optimizers]
    queue.attach(optimizers[0], scalers[0])
    inputs = {MLP: torch.randn(9, 6), GPT: torch.randint(0, 9, (9, 5))}
    batch = inputs.get(kind, torch.randn(9, 2, 8, 8))
    for number in range(3):
        norms = []
        for m, optimizer, scaler in zip((model, plain), optimizers, scalers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = (m(batch).float() - 1).square().mean()
            scaler.scale(loss * (1e30 if number == 1 else 1.0)).backward()
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(m.parameters(), 0.5))
            scaler.step(optimizer)
            scaler.update()
        if number != 1:
            # Plain autocast rounds each layer's gradient to float16 (2**-11), and ours is float32.
            # The bound is two such roundings.
            torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=0.0)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0**9
    assert all(int(count) == 2 for count in queue.state_dict()["queued"].values())
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        # Two steps of lr 0.05 and norm 0.5 at most: 0.05 times twice that.
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-4)
