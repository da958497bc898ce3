"""The controls with less lag of the momentum, on problems where they must win or must lose."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gq_triton.study.design.controls import LAG, Tuned, altered
from gq_triton.study.design.law import Recipe, StudyLaw
from gq_triton.study.trials.backward import build_backward
from gq_triton.study.trials.optimizers import OPTIMIZERS

# At these learning rates momentum does not overshoot. If it did, a lead would damp it and would win
# under noise as well.
TUNED = {
    "sgdm": Recipe(0.15, beta1=0.5, law=StudyLaw("queue", queue_length=4)),
    "adamw": Recipe(0.1, beta1=0.5, law=StudyLaw("queue", queue_length=4)),
}
STEPS, PERIOD = 160, 40


class Point(nn.Module):
    """A model that is one point; it starts at the optimum."""

    def __init__(self, size):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, optimum):
        return self.place - optimum


def error(base, recipe, optima, noise):
    """Return the mean squared distance to the optimum over the last three quarters of the steps.

    The loss is a quadratic around the step's optimum, plus noise on its gradient.
    """
    model = Point(optima.shape[1])
    optimizer = OPTIMIZERS[base](model.parameters(), recipe.lr, recipe.beta1)
    law = build_backward(recipe.law, model, optimizer, "", 0)
    errors = []
    for optimum, push in zip(optima, noise, strict=True):
        optimizer.zero_grad()
        distance = model(optimum)
        errors.append(distance.detach().square().mean().item())
        loss = distance.square().sum() / 2 + (push * model.place).sum()
        law.backward(distance, loss[None], torch.zeros(1))
        optimizer.step()
    kept = errors[len(errors) // 4 :]
    return sum(kept) / len(kept)


def errors(base, optima, noise):
    """Return the error of the plain optimizer at the arm's settings, and that of each control."""
    tuned = Tuned(TUNED[base], "adam" if base == "adamw" else "sgd", 1.0, 1.0)
    plain = error(base, replace(tuned.recipe, law=StudyLaw()), optima, noise)
    return plain, {name: error(base, altered(name, tuned), optima, noise) for name in LAG}


@pytest.mark.parametrize("base", TUNED)
def test_on_a_noiseless_drifting_quadratic_less_lag_wins(base):
    phases = torch.linspace(0, 1, 17, dtype=torch.float64)[:-1]
    turns = torch.arange(STEPS, dtype=torch.float64)[:, None] / PERIOD + phases
    optima = (2 * torch.pi * turns).sin()
    plain, controls = errors(base, optima, torch.zeros_like(optima))
    for name, found in controls.items():
        assert found < 0.9 * plain, name


@pytest.mark.parametrize("base", TUNED)
def test_under_noise_around_a_fixed_optimum_less_lag_loses(base):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(STEPS, 1000, dtype=torch.float64, generator=generator)
    plain, controls = errors(base, torch.zeros_like(noise), noise)
    for name, found in controls.items():
        assert found > 1.02 * plain, name


@pytest.mark.parametrize("base", TUNED)
def test_the_lead_goes_into_the_momentum_alone(base):
    """The momentum follows its formula step by step; the gradients are drawn, not computed."""
    recipe = replace(TUNED[base], law=StudyLaw("lead", queue_length=3))
    model = Point(4)
    optimizer = OPTIMIZERS[base](model.parameters(), 0.0, recipe.beta1)
    law = build_backward(recipe.law, model, optimizer, "", 0)
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    share = 1 - recipe.beta1 if base == "adamw" else 1.0
    momentum, second = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for step, grad in enumerate(grads):
        optimizer.zero_grad()
        law.backward(model.place, (grad * model.place).sum()[None], torch.zeros(1))
        optimizer.step()
        lead = grad - grads[step - 3 : step].mean(dim=0) if step >= 3 else torch.zeros(4)
        momentum = recipe.beta1 * momentum + share * (grad + lead)
        second = 0.999 * second + 0.001 * grad**2
        state = optimizer.state[model.place]
        if base == "sgdm":
            torch.testing.assert_close(state["momentum_buffer"], momentum)
        else:
            torch.testing.assert_close(state["exp_avg"], momentum)
            torch.testing.assert_close(state["exp_avg_sq"], second)
