# pyright: basic
"""Products of gradients with centres in a kernel, against products in float64 and plain torch."""

import pytest
import torch
from kernel_cases import DEVICE, MARGIN, QUIET

from gq_triton import kernels
from gq_triton.engines import eager
from gq_triton.sampling import GradientClustering, centres
from gq_triton.sampling.centres import cheapest

F64 = torch.float64
pytestmark = QUIET
BY_POSITION, WHOLE = (False, False), (True, True)
HALF, BF16 = torch.float16, torch.bfloat16


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(samples, groups, positions, inputs, outputs, clusters, terms, dtypes=(torch.float32,) * 2):
    """Return the factors of gradients, and of centres."""
    return (
        drawn(samples, groups, positions, inputs, seed=1, dtype=dtypes[0]),
        drawn(samples, groups, positions, outputs, seed=2, dtype=dtypes[1]),
        drawn(clusters, groups, terms, inputs, seed=3),
        drawn(clusters, groups, terms, outputs, seed=4),
    )


def innermost(a, d, c, e):
    """Return factors whose positions are innermost in memory, as those of a convolution."""
    return a.mT.contiguous().mT, d.mT.contiguous().mT, c, e


CASES = {
    "one position": case(18, 1, 1, 19, 33, 10, 1),
    "one sample, one cluster": case(1, 1, 3, 20, 5, 1, 1),
    "more than 16 clusters": case(18, 1, 1, 17, 16, 35, 1),
    "one input": case(6, 1, 2, 1, 1, 3, 2),
    "few positions": case(7, 1, 5, 18, 9, 6, 1),
    "many positions, innermost": innermost(*case(3, 1, 37, 5, 18, 3, 1)),
    "three terms": case(4, 1, 6, 10, 34, 13, 3),
    "seventeen terms": case(2, 1, 1, 5, 6, 3, 17),
    "groups, innermost": innermost(*case(5, 3, 9, 6, 4, 4, 2)),
    "float16": case(6, 1, 4, 8, 8, 3, 1, (HALF, HALF)),
    "bfloat16 and float32": case(18, 1, 1, 20, 8, 3, 2, (BF16, torch.float32)),
}


def written(engine, one, ways):
    """Return what an engine writes into a larger buffer of NaN, which it must leave alone."""
    samples, clusters = len(one[0]), len(one[2])
    dots = torch.full((samples + 2, clusters + MARGIN), torch.nan, dtype=F64, device=DEVICE)
    norms = torch.full((samples + 2,), torch.nan, dtype=F64, device=DEVICE)
    inside = dots[1:-1, :clusters], norms[1:-1]
    whole_dots, whole_norms = ways
    one = [tensor.to(DEVICE) for tensor in one]
    engine.gradient_products(*one, *inside, whole_dots=whole_dots, whole_norms=whole_norms)
    found = [tensor.clone().cpu() for tensor in inside]
    for tensor in inside:
        tensor.fill_(torch.nan)
    assert dots.isnan().all()
    assert norms.isnan().all()
    return found


def check(one, ways, engine=kernels):
    """Check an engine to the oracle in float64, with an error of sums in another order."""
    a, d, c, e = (tensor.to(F64) for tensor in one)
    dots, norms = written(engine, one, ways)
    for sign in (lambda x: x, torch.abs):
        # The second time round: the sums of the terms' sizes.
        gradients = torch.einsum("bgto,bgti->bgoi", sign(d), sign(a))
        centre = torch.einsum("kgro,kgri->kgoi", sign(e), sign(c))
        exact = torch.einsum("bgoi,kgoi->bk", gradients, centre), gradients.square().sum((1, 2, 3))
        if sign is not torch.abs:
            expected = exact
    terms = a[0].numel() * d.shape[3] * c.shape[2]
    for found, right, size in zip((dots, norms), expected, exact, strict=True):
        bound = (8 + terms**0.5) * torch.finfo(torch.float32).eps * size
        assert ((found - right).abs() <= bound).all()


@pytest.mark.slow
@pytest.mark.parametrize("ways", [BY_POSITION, WHOLE], ids=["position", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_oracle(name, ways):
    check(CASES[name], ways)


@pytest.mark.parametrize("ways", [(True, False), (False, True)])
def test_each_way_for_either(ways):
    check(case(5, 2, 7, 20, 18, 9, 2), ways)


def test_plain_torch_is_the_oracle_too():
    for ways in (BY_POSITION, WHOLE):
        check(CASES["bfloat16 and float32"], ways, eager)


@pytest.mark.parametrize("ways", [BY_POSITION, WHOLE], ids=["position", "whole"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("positions", [1, 3])
def test_a_sample_that_is_not_finite_leaves_the_others_alone(positions, bad, ways):
    a, d, c, e = case(5, 1, positions, 7, 4, 3, 2)
    a[3, 0, -1, 2] = bad
    dots, norms = written(kernels, (a, d, c, e), ways)
    rest = torch.arange(5) != 3
    right_dots, right_norms = written(kernels, (a[rest], d[rest], c, e), ways)
    assert not norms[3].isfinite()
    assert not dots[3].isfinite().any()
    torch.testing.assert_close(dots[rest], right_dots)
    torch.testing.assert_close(norms[rest], right_norms)


@pytest.mark.slow
def test_a_clustering_takes_the_kernel(monkeypatch):
    """An empty cluster's centre is 0, so that its distance is the gradient's square."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(27, 2)
    model = torch.nn.Sequential(*layers).to(DEVICE)
    data = torch.utils.data.TensorDataset(drawn(12, 1, 5, 5), torch.arange(12) % 2)
    loader = torch.utils.data.DataLoader(data, batch_size=12)
    found = []
    for engine in (kernels, eager):
        monkeypatch.setattr(centres, "engine", lambda *_, engine=engine: engine)
        one = GradientClustering(model, n_clusters=4, max_iter=1, rank=2).fit(loader)
        one._passes.centres = {
            name: centres.Centre(c.inputs * mask, c.outputs * mask)
            for name, c in one._passes.centres.items()
            for mask in [torch.tensor([1.0, 0.0, 1.0, 1.0], device=DEVICE).view(-1, 1, 1, 1)]
        }
        batch = next(iter(loader))
        distances, squares = one._passes.distances(one._passes.factors(batch))
        torch.testing.assert_close(distances[:, 1], squares)
        found.append((one.labels_, distances.cpu()))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
    assert cheapest(9, 9, 3, 8)[1]  # so both ways ran


def test_wrong_arguments_are_refused():
    one = case(4, 1, 2, 3, 5, 2, 1)
    dots, norms = torch.empty(4, 2), torch.empty(4)
    given = {"whole_dots": False, "whole_norms": False}
    with pytest.raises(ValueError, match=r"inputs must be float16, .* got torch.float64"):
        kernels.gradient_products(one[0].double(), *one[1:], dots, norms, **given)
    with pytest.raises(ValueError, match=r"centre_outputs must be torch.float32 of shape"):
        kernels.gradient_products(*one[:3], one[3][:1], dots, norms, **given)
    with pytest.raises(ValueError, match=r"norms must be torch.float32 of shape \(4,\)"):
        kernels.gradient_products(*one, dots, norms[:3], **given)
    with pytest.raises(ValueError, match=r"dots and norms must have contiguous rows"):
        kernels.gradient_products(*one, torch.empty(2, 4).T, norms, **given)
