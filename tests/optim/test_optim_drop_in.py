"""GQSGD and GQAdamW in place of torch's: the same arguments, taken or refused in a sentence."""

import inspect
import re
from typing import Any

import pytest
import torch
from optim_cases import assert_same, set_gradients, small_parameters, values
from torch import nn

from gq_triton import GQSGD, GQAdamW

PAIRS = [(GQSGD, torch.optim.SGD), (GQAdamW, torch.optim.AdamW)]
pairs = pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=["sgd", "adamw"])
CHOICES = [
    {"fused": True}, {"fused": False}, {"fused": None}, {"foreach": True}, {"foreach": False},
    {"differentiable": False, "maximize": True},
]  # fmt: skip
REFUSED = [
    (GQSGD, "differentiable", "a step is not recorded by autograd"),
    (GQAdamW, "differentiable", "a step is not recorded by autograd"),
    (GQAdamW, "amsgrad", "no maximum of the second moments is kept"),
]


@pairs
def test_every_argument_of_torchs_optimizer_is_known(ours, torchs):
    known = inspect.signature(ours).parameters
    for name, wanted in inspect.signature(torchs).parameters.items():
        assert name in known
        assert known[name].default == wanted.default, name


def test_gqadamw_takes_adamws_arguments_in_the_same_places():
    def places(kind):
        parameters = inspect.signature(kind).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert places(GQAdamW) == places(torch.optim.AdamW)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pairs
def test_how_torch_would_run_a_step_changes_nothing(ours, torchs, choice):
    """In the constructor and in a group; until queues are full the step is torch's own."""
    makes = (
        lambda kind, params: kind(params, lr=0.1, **choice),
        lambda kind, params: kind([{"params": params, **choice}], lr=0.1),
    )
    for make in makes:
        params, twins = small_parameters(), small_parameters()
        optimizer, twin = make(ours, params), make(torchs, twins)
        for step in range(3):
            set_gradients(params, step)
            set_gradients(twins, step)
            optimizer.step()
            twin.step()
        torch.testing.assert_close(values(params), values(twins))
        assert {name: optimizer.param_groups[0][name] for name in choice} == choice


@pytest.mark.parametrize(("kind", "name", "why"), REFUSED)
def test_an_option_that_would_change_the_step_is_refused(kind, name, why):
    message = re.escape(f"{name} must be False, got True: {why}")
    with pytest.raises(ValueError, match=message):
        kind(small_parameters(), lr=0.1, **{name: True})
    with pytest.raises(ValueError, match=message):
        kind([{"params": small_parameters(), name: True}], lr=0.1)
    params = small_parameters()
    optimizer = kind(params, lr=0.1)
    set_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = True
    with pytest.raises(ValueError, match=message):
        kind(small_parameters(), lr=0.1).load_state_dict(saved)


@pytest.mark.parametrize("name", ["fused", "foreach", "capturable"])
def test_a_switch_is_a_switch(name):
    options: Any = {name: "yes"}
    with pytest.raises(ValueError, match=f"{name} must be None, True or False, got 'yes'"):
        GQAdamW(small_parameters(), **options)


def test_a_checkpoint_of_adamw_with_amsgrad_is_refused():
    params = small_parameters()
    adamw = torch.optim.AdamW(params, amsgrad=True)
    set_gradients(params, 0)
    adamw.step()
    optimizer = GQAdamW(params)
    with pytest.raises(ValueError, match="amsgrad must be False, got True"):
        optimizer.load_state_dict(adamw.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
@pairs
def test_a_checkpoint_of_torch_with_switches_goes_on(ours, torchs, options):
    params, twins = small_parameters(), small_parameters()
    optimizer, twin = ours(params, lr=0.1), torchs(twins, lr=0.1, **options)
    set_gradients(twins, 0)
    twin.step()
    for param, other in zip(params, twins, strict=True):
        param.data.copy_(other.data)
    optimizer.load_state_dict(twin.state_dict())
    set_gradients(params, 1)
    set_gradients(twins, 1)
    optimizer.step()
    twin.step()
    torch.testing.assert_close(values(params), values(twins))


class TinyText(nn.Module):
    """A model that builds its own optimizer: decay for matrices, none for the rest."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4, bias=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.table.weight = self.head.weight

    def forward(self, tokens):
        return self.head(self.norm(self.table(tokens)))

    def configure_optimizers(self, kind, weight_decay, learning_rate, betas):
        params = [p for p in self.parameters() if p.requires_grad]
        optim_groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = "fused" in inspect.signature(kind).parameters
        extra_args = {"fused": True} if fused else {}
        return kind(optim_groups, lr=learning_rate, betas=betas, **extra_args)


def test_a_model_that_configures_its_own_adamw_takes_ours():
    finals = []
    for kind in (torch.optim.AdamW, GQAdamW):
        model = TinyText()
        optimizer = model.configure_optimizers(kind, 0.1, 6e-4, (0.9, 0.95))
        for step in range(5):  # as many as a queue is long, so every weight is 1
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (step + 1)
            tokens = torch.arange(6).view(2, 3) + step % 2
            logits = model(tokens)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finals.append(values(list(model.parameters())))
    torch.testing.assert_close(*finals)


def test_switches_of_a_group_survive_a_checkpoint():
    optimizer = GQAdamW(small_parameters(), fused=True)
    saved = optimizer.state_dict()
    other = GQAdamW(small_parameters())
    other.load_state_dict(saved)
    assert_same(other.param_groups[0]["fused"], True)
