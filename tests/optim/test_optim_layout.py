"""The record of how tensors lie in memory tells apart all that a plan depends on."""

import gc
from weakref import ref

import pytest
import torch

from gq_triton import GQSGD
from gq_triton.optim import layout
from gq_triton.optim.layout import Layout


@pytest.fixture(params=["compared by torch", "asked one by one"])
def _way(request, monkeypatch):
    if request.param == "asked one by one":
        monkeypatch.setattr(layout, "_guards", lambda: None)
    elif layout._guards() is None:
        pytest.skip("this torch has no class that compares tensors")


def tensors():
    whole = torch.zeros(6, 4)
    return [whole, torch.nn.Parameter(whole.T), whole[:2], torch.zeros((), dtype=torch.int64)]


CHANGES = {
    "type": lambda t: t.double(),
    "class": torch.nn.Parameter,
    "shorter": lambda t: t[:5],
    "narrower": lambda t: t[:, :3],
    "as long, of another shape": lambda t: t.as_strided((4, 6), (6, 1)),
    "as long, with equal strides": lambda t: t.as_strided((8, 3), (4, 1)),
    "other strides": lambda t: t.as_strided((6, 4), (1, 6)),
    "negated": lambda t: torch._neg_view(t[:, :4]),  # pyright: ignore[reportPrivateImportUsage]
    "device": lambda t: t.to("meta"),
    "layout": lambda t: t.to_sparse(),
}


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_change_of_one_tensor_is_seen(change):
    known = Layout(tensors())
    now = tensors()
    assert known.fits(now)
    now[0] = change(torch.zeros(8, 4)[:6])
    try:
        assert not known.fits(now)
    except RuntimeError:  # a sparse tensor has no strides
        assert now[0].layout != torch.strided


@pytest.mark.usefixtures("_way")
@torch.no_grad()
def test_another_number_of_tensors_does_not_fit():
    known = Layout(tensors())
    assert not known.fits(tensors()[:3])
    assert not known.fits([*tensors(), torch.zeros(1)])
    assert not Layout([]).fits(tensors())
    assert Layout([]).fits([])


@pytest.mark.usefixtures("_way")
def test_a_record_refers_to_no_tensor():
    recorded = tensors()
    watched = [ref(tensor) for tensor in recorded]
    watched += [ref(tensor.untyped_storage()) for tensor in recorded]
    known = Layout(recorded)
    del recorded
    gc.collect()
    assert [reference() for reference in watched] == [None] * len(watched)
    assert known.fits(tensors())


@pytest.mark.usefixtures("_way")
def test_one_tensor_in_two_places_fits():
    """Two parameters may have one gradient."""
    one = torch.zeros(3)
    assert Layout([one, one]).fits([one, one])
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = GQSGD(params, 0.5)
    for param in params:
        param.grad = torch.ones_like(params[0]) if param is params[0] else params[0].grad
    optimizer.step()
    assert all(param.tolist() == [-0.5] * 3 for param in params)
