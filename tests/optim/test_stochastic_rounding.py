# Gradients are set before they are read.
# pyright: reportOptionalMemberAccess=false
"""Weights of bfloat16 rounded at random: unbiased, alike in all engines, repeated by a resume."""

import copy

import pytest
import torch
from optim_cases import PAIR, assert_same, both_optimizers, copies, small_parameters, train
from torch import nn

from gq_triton import GQSGD, GQAdamW, reference
from gq_triton.rounding import key_of, random_bits, stochastic_bfloat16

BF16 = torch.bfloat16
ENGINES = ("torch", "numba", "triton")


def test_rounding_is_that_of_the_oracle_and_unbiased():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=generator) * torch.exp2(40 * torch.rand(20000) - 20)
    bits = random_bits(key_of(3, 1), 0, 20000, x.device)
    assert torch.equal(stochastic_bfloat16(x, bits), reference.stochastic_bfloat16(x, bits))
    exact = x.bfloat16().float()
    assert torch.equal(stochastic_bfloat16(exact, bits).float(), exact)
    bad = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert_same(stochastic_bfloat16(bad, bits[:3]), bad.bfloat16())
    # A quarter of the way from 1 to the next number: the mean and the odds are right.
    third = stochastic_bfloat16(torch.full((20000,), 1 + 2.0**-9), bits).float()
    assert set(third.tolist()) == {1.0, 1 + 2.0**-7}
    assert abs(float((third > 1).float().mean()) - 0.25) < 5 * (0.1875 / 20000) ** 0.5
    # Bits of other steps, tensors and elements are others, and all values are as frequent.
    for other in (random_bits(key_of(4, 1), 0, 20000, x.device),
                  random_bits(key_of(3, 2), 0, 20000, x.device),
                  random_bits(key_of(3, 1), 1, 20000, x.device)):  # fmt: skip
        both = torch.stack([bits, other]).double()
        assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / 20000**0.5
        counts = torch.bincount(other >> 12, minlength=16).double()
        assert float(((counts - 1250).square() / 1250).sum()) < 50  # chi squared, 15 degrees


@pytest.mark.filterwarnings("ignore:overflow encountered")  # z of an empty queue
@both_optimizers
def test_engines_round_alike_and_other_types_as_ever(variant):
    """The first steps, of weight 1, with numbers that no engine rounds on the way."""
    exact = {"lr": 2.0**-9, "queue_length": 3}
    exact |= {"betas": (0.5, 0.75), "weight_decay": 0.0} if variant is PAIR["adamw"] else {}
    ends = []
    for backend in ENGINES:
        params = small_parameters(BF16)
        train(variant.build(params, backend=backend, stochastic_rounding=True, **exact), params, 1)
        ends.append(params)
    same = [torch.cat([(a == b).flatten() for a, b in zip(ends[0], end, strict=True)])
            for end in ends[1:]]  # fmt: skip
    assert bool(same[0].all())
    # AdamW's root and quotient may differ in the last place of float32.
    assert float(same[1].float().mean()) > (0.95 if variant is PAIR["adamw"] else 0.999)
    plain = small_parameters(BF16)
    train(variant.build(plain, backend="torch", **exact), plain, 1)
    assert not torch.equal(plain[0], ends[0][0])
    ends = []
    for rounding in (False, True):
        params = small_parameters()
        train(variant.build(params, stochastic_rounding=rounding, backend="torch"), params, 5)
        ends.append(params)
    assert_same(*ends)


@both_optimizers
@pytest.mark.parametrize("match_norm", [False, True])
def test_a_resumed_run_repeats_the_bits(variant, match_norm):
    params = small_parameters(BF16)
    options = {"stochastic_rounding": True, "queue_length": 2, "match_norm": match_norm}
    optimizer = variant.build(params, backend="torch", **options)
    train(optimizer, params, 4)
    saved, twins = copy.deepcopy(optimizer.state_dict()), copies(params)
    resumed = variant.build(twins, backend="torch")
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["stochastic_rounding"]
    train(optimizer, params, 4, start=4)
    train(resumed, twins, 4, start=4)
    assert_same(twins, params)


@pytest.mark.parametrize("kind", [GQSGD, GQAdamW])
def test_small_updates_arrive_in_the_mean(kind):
    """Updates of a sixteenth of the last place are all lost to the nearest number."""
    ends = {}
    for dtype, rounding in ((BF16, False), (BF16, True), (torch.float32, False)):
        param = torch.ones(2000, dtype=dtype, requires_grad=True)
        optimizer = kind([param], lr=2.0**-12, rho=1.0, weight_decay=0.0, backend="torch",
                         stochastic_rounding=rounding)  # fmt: skip
        for _ in range(256):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends[dtype, rounding] = param.detach().float()
    assert torch.equal(ends[BF16, False], torch.ones(2000))
    assert torch.allclose(ends[torch.float32, False], torch.tensor(1 - 2.0**-4), rtol=1e-4)
    # A step's variance is at most a quarter of the squared last place, 2 ** -8 below 1.
    spread = (256 * 2.0**-16 / 4 / 2000) ** 0.5
    assert abs(float(ends[BF16, True].mean()) - (1 - 2.0**-4)) < 5 * spread


def test_the_option_is_a_switch():
    with pytest.raises(ValueError, match="stochastic_rounding must be True or False, got 1"):
        GQSGD(small_parameters(), stochastic_rounding=1)  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # z of an empty queue
@pytest.mark.parametrize("kind", [GQSGD, GQAdamW])
@pytest.mark.parametrize("backend", ENGINES)
def test_tensors_of_different_groups_are_rounded_apart(kind, backend):
    """Equal weights and gradients end apart, whether or not they share a group and a batch."""
    params = [nn.Parameter(torch.ones(200, dtype=BF16)) for _ in range(4)]
    groups = [{"params": params[:1]}, {"params": params[1:3]}, {"params": params[3:]}]
    optimizer = kind(groups, lr=2.0**-10, weight_decay=0.0, stochastic_rounding=True,
                     backend=backend)  # fmt: skip
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    ends = {tuple(param.tolist()) for param in params}
    assert len(ends) == len(params)
