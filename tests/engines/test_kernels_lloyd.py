# pyright: basic
"""K-means in kernels against k-means in plain torch, in one program and in parts."""

import sys

import pytest
import torch
from kernel_cases import DEVICE

from gq_triton import kernels
from gq_triton.grouping import KMeans

launcher = sys.modules["gq_triton.kernels.lloyd"]


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chosen(x, seed, count):
    """Return some of the samples, each once if there are as many."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order.repeat(count)[:count]].float()


def case(samples, features, clusters, change=lambda x: x, far=()):
    """Return samples and centres to start from, of which some are far away."""
    x = change(3 * normal(samples, samples, features) + 7)
    start = chosen(x, 1, clusters)
    start[list(far)] = 1e4 * x.float().abs().amax()
    return x, start


def few(x):
    """Return the same samples again and again: five different ones."""
    return x[torch.arange(len(x)) % 5]


def apart(x):
    return x + 50 * (torch.arange(len(x)) % 2)[:, None]


CASES = {
    "random": case(50, 18, 5),
    "duplicates": case(66, 9, 8, few),
    "empty clusters": case(70, 17, 5, far=(0, 3)),
    "two blobs": case(64, 6, 4, apart),
    "a cluster per sample": case(12, 5, 12),
    "more clusters than samples": case(3, 4, 6),
    "more than 16 clusters": case(60, 7, 20),
    "one sample": case(1, 5, 3),
    "one cluster": case(40, 3, 1),
    "bfloat16": case(65, 18, 4, torch.Tensor.bfloat16),
    "float16": case(30, 4, 3, torch.Tensor.half),
    "tiny": case(40, 5, 3, lambda x: x * 1e-30),
    "huge": case(40, 5, 3, lambda x: x * 1e15),
}
PARTS = {
    "random": case(130, 10, 3),
    "duplicates": case(150, 9, 8, few),
    "empty clusters": case(130, 14, 4, far=(0, 3)),
    "bfloat16": case(150, 10, 3, torch.Tensor.bfloat16),
}


@pytest.fixture
def in_parts(monkeypatch):
    """Cut small batches into parts of a few samples."""
    monkeypatch.setattr(launcher, "ONE_PROGRAM", 0)
    monkeypatch.setattr(launcher, "TILE", 1024)


def run(x, start, *, zero=False, max_iter=5, tol=1e-4):
    """Return what the kernels leave: centres, flag, labels, sizes, inertia, iterations."""
    centers, flag = start.clone().to(DEVICE), torch.zeros((), dtype=torch.bool, device=DEVICE)
    found = kernels.lloyd_(x.to(DEVICE), centers, flag, max_iter=max_iter, tol=tol, zero=zero)
    return [tensor.cpu() for tensor in (centers, flag, *found)]


def check(x, start, *, zero=False, max_iter=5, tol=1e-4):
    """Check that the kernels do what plain torch does."""
    nonfinite = "zero" if zero else "raise"
    options = {"init": start, "max_iter": max_iter, "tol": tol, "nonfinite": nonfinite}
    oracle = KMeans(len(start), backend="torch", **options).fit(x)
    centers, flag, labels, sizes, inertia, n_iter = run(
        x, start, zero=zero, max_iter=max_iter, tol=tol
    )
    assert not flag
    assert torch.equal(labels, oracle.labels_)
    assert torch.equal(sizes, oracle.cluster_sizes_)
    assert n_iter == oracle.n_iter_
    # Sums of at most 200 numbers up to the largest feature, in another order.
    size = float(torch.nan_to_num(x.float(), posinf=0, neginf=0).abs().max())
    torch.testing.assert_close(centers, oracle.cluster_centers_, rtol=1e-5, atol=1e-5 * size)
    atol = 1e-9 * size**2 * x.numel()
    torch.testing.assert_close(inertia, oracle.inertia_, rtol=1e-4, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_program_equals_plain_torch(name):
    check(*CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_parts_equal_plain_torch(name, in_parts):
    check(*PARTS[name], max_iter=3)


@pytest.mark.parametrize("parts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_iterations_end(parts, monkeypatch):
    if parts:
        monkeypatch.setattr(launcher, "ONE_PROGRAM", 0)
        monkeypatch.setattr(launcher, "TILE", 256)
    x, start = case(40, 4, 3, apart)
    check(x, start, max_iter=12, tol=0.0)
    check(x, start, max_iter=1)


@pytest.mark.parametrize("parts", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_features_that_are_not_finite(bad, parts, monkeypatch):
    if parts:
        monkeypatch.setattr(launcher, "ONE_PROGRAM", 0)
        monkeypatch.setattr(launcher, "TILE", 256)
    x, start = case(40, 4, 3)
    x[33, 1] = bad
    if bad != bad:
        check(x, start, zero=True, max_iter=2)
    centers, flag, labels, sizes, inertia, _ = run(x, start)
    assert flag
    assert torch.equal(centers, start)
    assert labels.tolist() == [0] * 40
    assert sizes.tolist() == [40, 0, 0]
    assert inertia == 0


@pytest.mark.parametrize("parts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_runs_are_equal_bit_for_bit(parts, monkeypatch):
    if parts:
        monkeypatch.setattr(launcher, "ONE_PROGRAM", 0)
        monkeypatch.setattr(launcher, "TILE", 256)
    for one, other in zip(*[run(*case(40, 5, 4), max_iter=2) for _ in range(2)], strict=True):
        assert torch.equal(one, other)


def test_k_means_takes_the_kernels():
    """A warm start goes on in the same memory; what the kernels do not take runs in plain torch."""
    x = normal(0, 48, 6).to(DEVICE)
    model, plain = KMeans(4, backend="triton"), KMeans(4, backend="torch")
    for batch in (x, 1.1 * x):
        model.fit(batch)
        plain.fit(batch)
        place = model.cluster_centers_
        assert torch.equal(model.labels_, plain.labels_)
        torch.testing.assert_close(model.cluster_centers_, plain.cluster_centers_)
    assert model.fit(x).cluster_centers_ is place
    assert KMeans(2, backend="triton").fit(x.double()).cluster_centers_.dtype == torch.float64
    assert len(KMeans(130, backend="triton", max_iter=1).fit(x).cluster_sizes_) == 130


def test_wrong_arguments_are_refused():
    flag, x, start = torch.zeros((), dtype=torch.bool), torch.zeros(4, 2), torch.zeros(2, 2)
    given = {"max_iter": 1, "tol": 0.0, "zero": False}
    with pytest.raises(ValueError, match=r"features must be float16, .* got torch.float64"):
        kernels.lloyd_(x.double(), start, flag, **given)
    with pytest.raises(ValueError, match=r"centers must be contiguous torch.float32 of shape"):
        kernels.lloyd_(x, start.double(), flag, **given)
    with pytest.raises(ValueError, match=r"the kernel takes 1 to 128 centres, got 130"):
        kernels.lloyd_(x, torch.zeros(130, 2), flag, **given)
