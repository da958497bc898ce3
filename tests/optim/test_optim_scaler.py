"""Loss scaling changes no number of an optimizer, and skips a step as a whole."""

import math

import pytest
import torch
from optim_cases import (
    all_backends,
    assert_same,
    both_optimizers,
    copies,
    set_gradients,
    small_parameters,
    snapshot,
)


def losses_of(params, step):
    """Return a loss whose gradients are those of set_gradients."""
    twins = copies(params)
    gradients = set_gradients(twins, step)
    products = [(p * g).flatten() for p, g in zip(params, gradients, strict=True)]
    return torch.cat(products).sum()


@both_optimizers
@all_backends
@pytest.mark.parametrize("match_norm", [False, True])
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale-clip-step"])
def test_a_loss_scaler_changes_no_number(variant, backend, match_norm, unscale):
    """The scale changes during the run: in a queue of scaled gradients, weights would change."""
    ours, theirs = small_parameters(), small_parameters()
    options = {"queue_length": 3, "match_norm": match_norm, "backend": backend}
    optimizer, plain = variant.build(ours, **options), variant.build(theirs, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = set()
    for step in range(9):
        for either in (optimizer, plain):
            either.zero_grad()
        scaler.scale(losses_of(ours, step)).backward()
        losses_of(theirs, step).backward()
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(ours, 2.0)
            torch.nn.utils.clip_grad_norm_(theirs, 2.0)
        scales.add(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        plain.step()
    assert len(scales) > 3
    assert_same(snapshot(optimizer), snapshot(plain))


@both_optimizers
@all_backends
@pytest.mark.parametrize("match_norm", [False, True])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_step_that_overflows_is_skipped_entirely(variant, backend, match_norm, at):
    """Parameters, queues and counters stay as they are, in the first step and in later ones."""
    ours, theirs = small_parameters(), small_parameters()
    options = {"queue_length": 2, "match_norm": match_norm, "backend": backend}
    optimizer, plain = variant.build(ours, **options), variant.build(theirs, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(8):
        optimizer.zero_grad()
        loss = losses_of(ours, step)
        if step == at:
            loss = loss + (ours[0] * torch.tensor([math.inf] + [1.0] * 39)).sum()
        scaler.scale(loss).backward()
        before = snapshot(optimizer)
        scaler.step(optimizer)
        if step == at:
            after = snapshot(optimizer)
            assert_same(after[0], before[0])
            if at:
                assert_same(after, before)
        else:
            set_gradients(theirs, step)
            plain.step()
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_same(snapshot(optimizer), snapshot(plain))
