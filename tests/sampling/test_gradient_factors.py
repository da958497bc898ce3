"""The factors of samples' gradients, centres and distances, against autograd's own gradients."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gq_triton.sampling import centres
from gq_triton.sampling.centres import Centre, Sums, cheapest, of_samples, products, truncated
from gq_triton.sampling.factors import Factors, factors, layers_of
from gq_triton.sampling.watch import run_model

plain = sys.modules["gq_triton.engines.eager.gradient_products"]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Twice(nn.Module):
    """A layer that is used twice, on several positions."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))).mean(1))


def conv(kind, *args, flat, **options):
    layers = kind(*args, **options), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(flat, 3)
    return nn.Sequential(*layers)


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
        (6, 4),
    ),
    "sequence": (Twice, (6, 7, 4)),
    "conv": (lambda: conv(nn.Conv2d, 2, 4, 3, flat=4 * 9), (6, 2, 5, 5)),
    "strided": (
        lambda: conv(nn.Conv2d, 2, 4, (3, 2), stride=(2, 1), padding=(1, 2), flat=4 * 3 * 8),
        (6, 2, 5, 5),
    ),
    "dilated": (lambda: conv(nn.Conv2d, 2, 4, 2, dilation=2, flat=4 * 9), (6, 2, 5, 5)),
    "grouped": (lambda: conv(nn.Conv2d, 4, 6, 3, groups=2, flat=6 * 9), (6, 4, 5, 5)),
    "depthwise": (lambda: conv(nn.Conv2d, 4, 4, 3, groups=4, flat=4 * 9), (6, 4, 5, 5)),
    "same": (lambda: conv(nn.Conv2d, 2, 4, 3, padding="same", flat=4 * 25), (6, 2, 5, 5)),
    "circular": (
        lambda: conv(nn.Conv1d, 2, 4, 3, padding=2, padding_mode="circular", flat=4 * 7),
        (6, 2, 5),
    ),
    "volume": (lambda: conv(nn.Conv3d, 1, 2, 2, flat=2 * 8), (6, 1, 3, 3, 3)),
}  # fmt: skip
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


def written(one, centre):
    """Return the products with the centres and the squared norms."""
    room: Any = {"dtype": torch.float64}
    dots = torch.empty(len(one.inputs), len(centre.inputs), **room)
    norms = torch.empty(len(one.inputs), **room)
    products(one, centre, dots, norms)
    return dots, norms


def model_and_factors(name):
    build, shape = CASES[name]
    torch.manual_seed(0)
    model, x = build().double(), drawn(*shape)
    layers = layers_of(model, None)
    return model, x, layers, factors(model, layers, run_model, x, TARGETS, "cross_entropy")


def autograd_gradients(model, x, weight):
    """Return the gradient of every sample's own loss, ``(B, O, I)``."""
    found = []
    for xi, yi in zip(x, TARGETS, strict=True):
        loss = F.cross_entropy(model(xi[None]), yi[None])
        found.append(torch.autograd.grad(loss, weight)[0].flatten(1))
    return torch.stack(found)


@pytest.mark.parametrize("name", CASES)
def test_tgc07_products_and_squares_are_autograd_s(name):
    """Equation 5, and equations 8 and 9, for centres of two terms."""
    model, x, layers, found = model_and_factors(name)
    assert set(found) == set(layers)
    for layer, one in found.items():
        weight: Any = layers[layer].weight
        gradients = autograd_gradients(model, x, weight)  # (B, O, I of a group)
        groups = one.inputs.shape[1]
        gradients = gradients.unflatten(1, (groups, -1))
        torch.testing.assert_close(plain.whole(*one), gradients, rtol=1e-12, atol=1e-14)
        centre = Centre(
            drawn(3, groups, 2, gradients.shape[3]), drawn(3, groups, 2, gradients.shape[2], seed=1)
        )
        full = torch.einsum("kgro,kgri->kgoi", centre.outputs, centre.inputs)
        dots = torch.einsum("bgoi,kgoi->bk", gradients, full)
        squares = gradients.flatten(1).square().sum(1)
        for way in (
            plain.by_gradient(plain.whole(*one), *centre),
            plain.by_position(*one, *centre),
        ):
            torch.testing.assert_close(way, dots, rtol=1e-12, atol=1e-13)
        for way in (plain.squares(plain.whole(*one)), plain.squares_by_position(*one)):
            torch.testing.assert_close(way, squares, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(centre.squares, full.flatten(1).square().sum(1))
        found_dots, found_squares = written(one, centre)
        torch.testing.assert_close(found_dots, dots, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found_squares, squares, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", [(1, 100, 50, 10), (64, 9, 8, 4), (4, 200, 100, 40)])
def test_tgc07_the_cheaper_way_gives_the_same(sizes, monkeypatch):
    positions, inputs, outputs, clusters = sizes
    one = Factors(drawn(5, 1, positions, inputs), drawn(5, 1, positions, outputs, seed=1))
    centre = Centre(drawn(clusters, 1, 1, inputs), drawn(clusters, 1, 1, outputs, seed=2))
    taken = cheapest(positions, inputs, outputs, clusters)
    expected = {1: (False, False), 64: (True, True), 4: (False, False)}[positions]
    assert taken == expected
    results = []
    for room in (1, 1 << 24):
        for way in ((False, False), (False, True), (True, False), (True, True)):
            monkeypatch.setattr(centres, "cheapest", lambda *_, way=way: way)
            monkeypatch.setattr(plain, "ROOM", room)
            results.append(written(one, centre))
    for dots, squares in results[1:]:
        torch.testing.assert_close(dots, results[0][0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(squares, results[0][1], rtol=1e-11, atol=1e-11)


def test_tgc06_the_residual_of_rank_1_is_the_cross_covariance():
    one = Factors(drawn(40, 1, 1, 6), drawn(40, 1, 1, 4, seed=1))
    labels = torch.arange(40) % 3
    sums = Sums(1, 3)
    sums.add(Factors(*(f[:25] for f in one)), labels[:25])
    sums.add(Factors(*(f[25:] for f in one)), labels[25:])
    centre = sums.centre()
    for k in range(3):
        a, d = (f[labels == k][:, 0, 0] for f in one)
        mean = torch.einsum("bo,bi->oi", d, a) / len(a)
        covariance = torch.einsum("bo,bi->oi", d - d.mean(0), a - a.mean(0)) / len(a)
        rank_1 = torch.outer(centre.outputs[k, 0, 0], centre.inputs[k, 0, 0])
        torch.testing.assert_close(mean - rank_1, covariance, rtol=1e-12, atol=1e-14)
        best = truncated(mean[None, None], 1)
        svd = torch.outer(best.outputs[0, 0, 0], best.inputs[0, 0, 0])
        assert (mean - svd).norm() < (mean - rank_1).norm()
        # uncorrelated factors: rank 1 is exact
    a, d = drawn(3, 6), drawn(2, 4, seed=1)
    one = Factors(a.repeat_interleave(2, 0)[:, None, None], d.repeat(3, 1)[:, None, None])
    sums = Sums(1, 1)
    sums.add(one, torch.zeros(6, dtype=torch.long))
    exact = plain.whole(*one).mean(0)[0]
    found = torch.outer(sums.centre().outputs[0, 0, 0], sums.centre().inputs[0, 0, 0])
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("rank", [2, 3, 9])
def test_centres_of_more_terms_are_truncated_means(rank):
    one = Factors(drawn(10, 2, 5, 6), drawn(10, 2, 5, 4, seed=1))
    labels = torch.tensor([0, 2] * 5)
    sums = Sums(rank, 3, mean=True)
    sums.add(one, labels)
    centre = sums.centre()
    full = torch.einsum("kgro,kgri->kgoi", centre.outputs, centre.inputs)
    gradients = plain.whole(*one)
    for k in (0, 2):
        u, s, v = torch.linalg.svd(gradients[labels == k].mean(0), full_matrices=False)
        best = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
        torch.testing.assert_close(full[k], best)
    assert not full[1].any()
    torch.testing.assert_close(sums.total, gradients.sum(0))


def test_positions_divide_one_factor_only():
    """Samples of one gradient with several positions: the centre is near it, not T times as far."""
    a, d = drawn(1, 1, 1, 6).expand(8, 1, 5, 6), drawn(1, 1, 1, 4, seed=1).expand(8, 1, 5, 4)
    sums = Sums(1, 1)
    sums.add(Factors(a, d), torch.zeros(8, dtype=torch.long))
    full = torch.einsum("kgro,kgri->kgoi", sums.centre().outputs, sums.centre().inputs)
    torch.testing.assert_close(full[0], plain.whole(a, d)[0])
    first = of_samples(Factors(a[:2], d[:2]), 3)
    assert first.inputs.shape == (2, 1, 3, 6)
    full = torch.einsum("kgro,kgri->kgoi", first.outputs, first.inputs)
    torch.testing.assert_close(full, plain.whole(a[:2], d[:2]))


@pytest.mark.parametrize("rank", [1, 2])
def test_half_precision_is_kept_and_added_up_in_float32(rank):
    model = nn.Linear(4, 3).bfloat16()
    x = drawn(6, 4).bfloat16()
    one = factors(model, {"": model}, run_model, x, TARGETS, "cross_entropy")[""]
    assert one.inputs.dtype == one.outputs.dtype == torch.bfloat16
    found, expected = (Sums(rank, 2, mean=True) for _ in range(2))
    found.add(one, TARGETS % 2)
    expected.add(Factors(one.inputs.float(), one.outputs.float()), TARGETS % 2)
    assert all(map(torch.equal, found.centre(), expected.centre()))
    assert found.total is not None
    assert expected.total is not None
    assert torch.equal(found.total, expected.total)
    for left, right in zip(of_samples(one, rank), one, strict=True):
        assert torch.equal(left[:, 0, 0], right[:, 0, 0].float())


def test_modes_come_back_and_dropout_is_off():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.9), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[2].eval()
    layers = layers_of(model, None)
    x = torch.randn(6, 4)
    one, other = (factors(model, layers, run_model, x, TARGETS, "cross_entropy") for _ in range(2))
    for name in layers:
        assert all(map(torch.equal, one[name], other[name]))
    assert [m.training for m in model] == [True, True, False, True]
    assert not any(m._forward_hooks for m in model)
    assert all(p.grad is None for p in model.parameters())


def test_layers_are_chosen_by_parts_of_names():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    assert [*layers_of(model, None)] == ["0", "2"]
    assert [*layers_of(model, ["2"])] == ["2"]
    next(iter(model[0].parameters())).requires_grad_(False)
    assert [*layers_of(model, None)] == ["2"]
    with pytest.raises(ValueError, match="'head' in its name; it has '2'"):
        layers_of(model, ["head"])
    with pytest.raises(ValueError, match="it has none"):
        layers_of(nn.LayerNorm(3), None)


def test_rows_of_unknown_samples_are_refused():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x):
            return self.layer(x.view(-1, 2)).view(len(x), 2, 3).mean(1)

    model = Folded()
    with pytest.raises(ValueError, match="the layer 'layer' saw 12 rows for 6 samples"):
        factors(
            model, layers_of(model, None), run_model, torch.randn(6, 4), TARGETS, "cross_entropy"
        )
    with pytest.raises(ValueError, match="depend on one of the chosen layers"):
        factors(model, {}, run_model, torch.randn(6, 4), TARGETS, "cross_entropy")
