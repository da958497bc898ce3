"""The score of a sample and tau, against autograd and the identities of the papers."""

import functools
import itertools
import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gq_triton.sampling import (
    gradient_norms,
    gradients,
    importance_score,
    total_variation,
    variance_reduction,
)
from gq_triton.sampling.scores import sample_losses


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autograd_score(logits, losses_of):
    """Return the norm of every sample's own gradient at the logits, one sample after the other."""
    found = []
    for i in range(len(logits)):
        leaf = logits.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(losses_of(leaf)[i], leaf)
        found.append(grad.norm())
    return torch.stack(found)


# --- T-IS7: the closed forms are what autograd finds

CLASSES = torch.tensor([0, 3, 1, 3, 2, 0])
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.3),
        nn.CrossEntropyLoss(weight=WEIGHT),
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1, ignore_index=3),
        nn.CrossEntropyLoss(ignore_index=0, reduction="sum"),
    ],
    ids=["plain", "smoothed", "weighted", "all", "ignored"],
)
@pytest.mark.parametrize("positions", [(), (5,)], ids=["flat", "sequence"])
def test_tis07_cross_entropy_is_the_gradient_of_autograd(loss, positions):
    logits = drawn(6, 4, *positions)
    targets = CLASSES.view(-1, *[1] * len(positions)).expand(6, *positions).roll(1, -1)
    reduction = "sum" if loss.reduction == "sum" else "mean"

    def losses_of(x):
        each = F.cross_entropy(
            x, targets, weight=loss.weight, label_smoothing=loss.label_smoothing,
            ignore_index=loss.ignore_index, reduction="none",
        )  # fmt: skip
        each = each.view(6, -1)
        return each.sum(1) if reduction == "sum" else each.mean(1)

    expected = autograd_score(logits, losses_of)
    torch.testing.assert_close(
        importance_score(logits, targets, loss), expected, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(sample_losses(logits, targets, loss), losses_of(logits))


def test_tis07_probabilities_as_targets():
    logits, targets = drawn(6, 4), drawn(6, 4, seed=1).softmax(1)
    loss = nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2)

    def losses_of(x):
        return F.cross_entropy(x, targets, weight=WEIGHT, label_smoothing=0.2, reduction="none")

    expected = autograd_score(logits, losses_of)
    torch.testing.assert_close(importance_score(logits, targets, loss), expected)


def test_tis07_softmax_score_is_p_minus_y():
    logits = drawn(6, 4)
    p = logits.softmax(1)
    expected = (p - F.one_hot(CLASSES, 4)).norm(dim=1)
    for loss in (F.cross_entropy, "cross_entropy", nn.CrossEntropyLoss(reduction="none")):
        torch.testing.assert_close(importance_score(logits, CLASSES, loss), expected)


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 2)], ids=str)
def test_tis08_squared_error(shape):
    outputs, targets = drawn(*shape), drawn(*shape, seed=1)
    gaps = (outputs - targets).view(6, -1)
    whole = importance_score(outputs, targets, nn.MSELoss(reduction="sum"))
    torch.testing.assert_close(whole, 2 * gaps.norm(dim=1))
    # ||gradient|| = 2 sqrt(loss), for the loss ||y - psi||^2
    losses = sample_losses(outputs, targets, nn.MSELoss(reduction="sum"))
    torch.testing.assert_close(whole, 2 * losses.sqrt())
    # Keras' form: the mean over d numbers
    mean = importance_score(outputs, targets, "mse")
    torch.testing.assert_close(mean, whole / gaps.shape[1])


def test_tis08_logistic_loss():
    outputs, signs = drawn(50) * 3, torch.where(drawn(50, seed=1) > 0, 1.0, -1.0)

    def logistic(psi, y):
        return F.softplus(-y * psi)

    score = importance_score(outputs, signs, logistic)
    torch.testing.assert_close(score, 1 - torch.exp(-logistic(outputs, signs)))


@pytest.mark.parametrize("classes", [2, 5, 100])
def test_tis08_softmax_lies_between_two_functions_of_the_loss(classes):
    logits = drawn(500, classes) * 4
    targets = torch.randint(classes, (500,), generator=torch.Generator().manual_seed(1))
    score = importance_score(logits, targets, "cross_entropy")
    wrong = 1 - torch.exp(-F.cross_entropy(logits, targets, reduction="none"))
    assert bool((score >= wrong * math.sqrt(classes / (classes - 1)) - 1e-12).all())
    assert bool((score <= wrong * math.sqrt(2) + 1e-12).all())


# --- any loss


@pytest.mark.parametrize(
    "loss",
    [
        nn.SmoothL1Loss(),
        nn.HuberLoss(reduction="none"),
        functools.partial(F.smooth_l1_loss, reduction="none"),
        lambda x, y: F.smooth_l1_loss(x, y, reduction="none").mean(1),
    ],
    ids=["module", "huber", "partial", "per sample"],
)
def test_any_loss_by_autograd(loss):
    outputs, targets = drawn(6, 3), drawn(6, 3, seed=1)

    def losses_of(x):
        return F.smooth_l1_loss(x, targets, reduction="none").mean(1)

    score = importance_score(outputs, targets, loss)
    torch.testing.assert_close(score, autograd_score(outputs, losses_of))
    assert not score.requires_grad


def test_several_outputs_count_together():
    outputs = {"a": drawn(4, 3), "b": (drawn(4, seed=1), drawn(4, 2, seed=2))}

    def loss(out, y):
        return out["a"].square().sum(1) + 3 * out["b"][0]

    expected = (4 * outputs["a"].square().sum(1) + 9).sqrt()
    torch.testing.assert_close(importance_score(outputs, None, loss), expected)
    assert not outputs["a"].requires_grad


def test_the_loss_keeps_its_reduction_and_half_types_are_widened():
    loss = nn.SmoothL1Loss()
    out = torch.randn(4, 3, dtype=torch.bfloat16)
    assert (
        importance_score(out, torch.zeros(4, 3, dtype=torch.bfloat16), loss).dtype == torch.float32
    )
    assert importance_score(out, torch.tensor([0, 1, 2, 0]), "cross_entropy").dtype == torch.float32
    assert loss.reduction == "mean"


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: importance_score(drawn(4, 3), CLASSES[:4], cast(Any, 7)), TypeError, "loss must"),
        (lambda: importance_score(drawn(4, 3), CLASSES[:4], "mae"), TypeError, "'mae'"),
        (lambda: importance_score(drawn(4, 3), CLASSES[:4], F.cross_entropy), ValueError, "0 to 2"),
        (lambda: importance_score(drawn(4, 3), CLASSES, "cross_entropy"), ValueError, r"\(4,\) or"),
        (lambda: importance_score(drawn(4), CLASSES[:4], "cross_entropy"), ValueError, "logits"),
        (lambda: importance_score(drawn(4, 1), drawn(4), "mse"), ValueError, "same shape"),
        (
            lambda: importance_score(drawn(4, 1), drawn(4, 1), F.l1_loss),
            ValueError,
            'reduction="none"',
        ),
        (
            lambda: importance_score(drawn(4, 1), drawn(4), lambda x, y: y),
            ValueError,
            "must depend on the model's outputs",
        ),
        (
            lambda: importance_score(drawn(5, 4), None, lambda x, y: x.sum(0)),
            ValueError,
            "begin with the 4 samples",
        ),
    ],
)  # fmt: skip
def test_a_bad_loss_is_refused_in_a_sentence(call, error, says):
    with pytest.raises(error, match=says):
        call()


# --- tau


class Keywords(nn.Module):
    """A model with a recurrent layer, whose inputs are keywords."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x, scale):
        return self.head(self.rnn(x)[0][:, -1]) * scale[:, None]


def test_true_norms_are_autograd_s(monkeypatch):
    """Also where few samples are taken at a time, and where vmap does not follow the model."""
    torch.manual_seed(0)
    model = Keywords().double()
    model.head.bias.requires_grad_(False)
    inputs = {"x": drawn(5, 4, 3), "scale": drawn(5, seed=1)}
    targets = torch.tensor([0, 1, 2, 0, 1])
    params = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for i in range(5):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        grads = torch.autograd.grad(F.cross_entropy(model(**one), targets[i : i + 1]), params)
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
    given = model, "cross_entropy", inputs, targets
    torch.testing.assert_close(gradient_norms(*given), torch.stack(norms))
    monkeypatch.setattr(gradients, "NUMBERS", 2 * sum(p.numel() for p in params))
    torch.testing.assert_close(gradient_norms(*given), torch.stack(norms))
    monkeypatch.setattr(gradients, "together", lambda *_: None)
    torch.testing.assert_close(gradient_norms(*given), torch.stack(norms))
    assert model.training
    assert all(p.grad is None for p in params)
    with pytest.raises(ValueError, match="must have tensors of at least one sample, got none"):
        gradient_norms(model, "cross_entropy", drawn(0, 3), targets[:0])
    with pytest.raises(ValueError, match="must begin with as many samples, got 4 and 5"):
        gradient_norms(model, "cross_entropy", inputs, targets[:4])
    with pytest.raises(ValueError, match="targets must be classes from 0 to 2: Target 3 is out of"):
        gradient_norms(model, "cross_entropy", inputs, targets + 1)
    with pytest.raises(ValueError, match="must have a trained parameter"):
        gradient_norms(nn.ReLU(), "cross_entropy", drawn(2, 3), targets[:2])


def test_total_variation():
    assert total_variation(torch.ones(7)) == pytest.approx(0, abs=1e-15)
    assert total_variation(torch.tensor([0.0, 0.0, 1e-40, 0.0])) == 0.75
    assert total_variation(torch.zeros(3)) == 0
    with pytest.raises(ValueError, match="scores must be finite and >= 0"):
        total_variation(torch.tensor([1.0, torch.nan]))


def test_tis02_golden():
    norms = torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64)
    g = norms / norms.sum()
    assert g.tolist() == [0.125, 0.125, 0.125, 0.625]
    assert variance_reduction(norms) == pytest.approx(math.sqrt(1.75), abs=1e-12)
    # the difference of the variances of one draw, T-IS1
    assert norms.square().mean() - norms.mean() ** 2 == 3


def test_tis03_range_and_extremes():
    for n in (1, 2, 7, 1000):
        assert variance_reduction(torch.full((n,), 0.3)) == 1
        assert variance_reduction(torch.zeros(n)) == 1
        assert variance_reduction(F.one_hot(torch.tensor(0), n).double()) == math.sqrt(n)
    scores = drawn(100).exp()
    g, u = scores / scores.sum(), torch.full((100,), 0.01, dtype=torch.float64)
    tau = variance_reduction(scores)
    assert tau == pytest.approx(math.sqrt(100 * float(g @ g)), rel=1e-12)
    paper = (1 - (g - u).square().sum() / g.square().sum()) ** -0.5
    assert tau == pytest.approx(float(paper), rel=1e-12)
    for scale in (1e-200, 1e-300, 1e200):
        assert variance_reduction(scores * scale) == pytest.approx(tau, rel=1e-12)


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (torch.tensor([1.0, math.nan]), "got nan"),
        (torch.tensor([1.0, -2.0]), r"got -2\.0"),
        (torch.tensor([math.inf]), "got inf"),
        (torch.zeros(0), "at least one"),
        (torch.zeros(2, 2), r"\(2, 2\)"),
        ([1.0], "must be a tensor"),
    ],
)
def test_scores_that_cannot_be_drawn_by_are_refused(scores, says):
    with pytest.raises(ValueError, match=says):
        variance_reduction(scores)


def per_sample_gradients(model, x, y):
    grads = []
    for xi, yi in zip(x, y, strict=True):
        loss = F.mse_loss(model(xi[None]), yi[None], reduction="sum")
        found = torch.autograd.grad(loss, list(model.parameters()))
        grads.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(grads)


def test_tis01_variance_of_drawing_by_norm():
    """Identities 1 to 9 of the supplement, for one drawn index."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    grads = per_sample_gradients(model, drawn(16, 4), drawn(16, 2, seed=1))
    norms, mean, count = grads.norm(dim=1), grads.mean(0), 16
    g, u = norms / norms.sum(), torch.full((16,), 1 / 16, dtype=torch.float64)

    def trace_variance(p):
        estimates = grads / (count * p)[:, None]
        torch.testing.assert_close((p[:, None] * estimates).sum(0), mean)  # unbiased
        return float(p @ estimates.square().sum(1) - mean.square().sum())

    gain = trace_variance(u) - trace_variance(g)
    total = float(norms.sum())
    assert gain == pytest.approx(float(norms.square().mean() - norms.mean() ** 2), rel=1e-10)
    assert gain == pytest.approx(total**2 / count * float(g @ g - 1 / count), rel=1e-10)
    assert gain == pytest.approx(total**2 / count * float((g - u).square().sum()), rel=1e-10)
    # tau^2, not tau, is the ratio of the second moments, and the variances' ratio is above it
    tau = variance_reduction(norms)
    moments = float(norms.square().mean()) / float(norms.mean() ** 2)
    assert tau**2 == pytest.approx(moments, rel=1e-12)
    assert trace_variance(u) / trace_variance(g) >= tau**2


@pytest.mark.parametrize("act", [nn.Tanh(), nn.ReLU()], ids=["tanh", "relu"])
def test_tis06_the_bound_holds(act):
    """Equation 24, ``L rho score``, and the tighter ``sqrt(L) rho score``, for bias-free nets."""
    ratios = []
    for seed in range(10):
        torch.manual_seed(seed)
        sizes = [5, 7, 6, 3]
        weights = [
            (torch.randn(o, i, dtype=torch.float64) / i**0.5).requires_grad_()
            for i, o in itertools.pairwise(sizes)
        ]
        x, y = drawn(1, 5, seed=seed), drawn(1, 3, seed=seed + 100)
        inputs, pre = [x], []
        for i, weight in enumerate(weights):
            pre.append(inputs[-1] @ weight.T)
            inputs.append(act(pre[-1]) if i < 2 else pre[-1])
        loss = F.mse_loss(inputs[-1], y, reduction="sum")
        norm = torch.stack(
            [g.norm() for g in torch.autograd.grad(loss, weights, retain_graph=True)]
        )
        score = importance_score(inputs[-1].detach(), y, nn.MSELoss(reduction="sum")).item()
        # Delta^(l) maps the gradient at the last pre-activation to that at pre-activation l.
        rho = 0.0
        for layer in range(3):
            rows = [torch.autograd.grad(pre[-1][0, k], pre[layer], retain_graph=True)[0][0]
                    for k in range(3)]  # fmt: skip
            spectral = torch.linalg.matrix_norm(torch.stack(rows), 2)
            rho = max(rho, float(inputs[layer].detach().norm() * spectral))
        ratios.append(float(norm.norm()) / (rho * score))
    assert max(ratios) <= math.sqrt(3) + 1e-12  # and hence <= L = 3
    assert max(ratios) > 0.5  # the test would see a bound that is half as large
