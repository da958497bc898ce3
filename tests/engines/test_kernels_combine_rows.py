"""The law for clusters on a table's rows: `combine_rows` against plain torch and the oracle."""

import math

import pytest
import torch
from kernel_cases import DEVICES, QUIET, Clusters, Guarded, newest_first

from gq_triton.engines import eager
from gq_triton.kernels import combine_rows
from gq_triton.law import Law

pytestmark = [pytest.mark.parametrize("device", DEVICES), *QUIET]
ROWS = 7


class Lookups:
    """Lookups of a table in clusters of known sizes; a sample looks up three rows.

    Row 4 is looked up by nobody. Lookups of row 7, which the table does not have, do not count.
    """

    def __init__(self, device, sizes, width, *, slots=4, dtype=torch.float32, queue_dtype=None):
        self.guarded, self.clusters = Guarded(device), Clusters(device, sizes)
        samples = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        samples = samples[torch.randperm(len(samples), generator=self.guarded.generator)]
        self.labels = samples.repeat_interleave(3).to(device)
        shape = self.labels.shape
        where = torch.randint(ROWS + 1, shape, generator=self.guarded.generator)
        self.where = where.masked_fill(where == 4, 2).to(device)
        self.grads = self.guarded.normal(len(where) * width, dtype=dtype).view(-1, width)
        self.queue = self.guarded.normal(slots, ROWS * width, dtype=queue_dtype or dtype)

    def run(self, ops=combine_rows, count=9, rho=3.0, **law):
        queued = torch.tensor(count, device=self.grads.device)
        weighted, raw, table, finite = ops(
            self.grads, self.where, self.labels, self.queue, queued, Law(rho, **law),
            **self.clusters.vectors(),
        )  # fmt: skip
        self.guarded.check()
        assert bool(finite) == bool(raw.isfinite().all())
        assert weighted.shape == raw.shape == (ROWS, self.grads.shape[1])
        return weighted.flatten(), raw.flatten(), table.sum(dim=0)

    def sums(self):
        """Return the sums by cluster of the whole table, ``(K, V * d)``."""
        width, clusters = self.grads.shape[1], len(self.clusters.sizes)
        sums = torch.zeros(clusters, ROWS + 1, width, dtype=torch.float64)
        places = self.labels.cpu(), self.where.cpu()
        sums.index_put_(places, self.grads.double().cpu(), accumulate=True)
        dtype = torch.promote_types(self.grads.dtype, torch.float32)
        return sums[:, :ROWS].flatten(1).to(dtype)

    def assert_as_plain_torch(self, **law):
        actual, expected = self.run(**law), self.run(eager.combine_rows, **law)
        for mine, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 5, 64, pytest.param(1030, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", [[4], [2, 0, 3]])
def test_against_the_oracle(device, sizes, width):
    lookups = Lookups(device, sizes, width)
    actual, sums = lookups.run(), lookups.sums()
    # The oracle gets the sums in float64, so each of the n terms of a sum adds a rounding.
    rows = newest_first(lookups.queue, 9).cpu()
    exact = lookups.clusters.gradient(
        sums.double() * lookups.clusters.vectors()["inverse_shares"].cpu()[:, None], rows, 3.0
    )
    torch.testing.assert_close(actual[0].double().cpu(), exact, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(actual[1].cpu(), sums.sum(dim=0), rtol=1e-5, atol=1e-5)
    lookups.assert_as_plain_torch()


@pytest.mark.parametrize("count", [0, 3])
def test_warm_up_weights_nothing(device, count):
    lookups = Lookups(device, [2, 3], 5)
    weighted, raw, statistics = lookups.run(count=count)
    torch.testing.assert_close(weighted, raw, rtol=1e-6, atol=1e-6)
    assert statistics[2:].tolist() == pytest.approx([5.0 * ROWS, 0.0, 0.0], rel=1e-6)
    assert lookups.run(rho=1.0)[2][2:].tolist() == pytest.approx([5.0 * ROWS, 0, 0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_types_are_independent(device, dtype, queue_dtype):
    lookups = Lookups(device, [2, 3], 5, dtype=dtype, queue_dtype=queue_dtype)
    weighted, raw, _ = lookups.run()
    assert weighted.dtype == raw.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(raw.cpu(), lookups.sums().sum(dim=0), rtol=1e-5, atol=1e-5)
    if queue_dtype != torch.bfloat16:  # to which the interpreter truncates
        lookups.assert_as_plain_torch()


def test_loss_scale_and_effective_length(device):
    length, scale = torch.tensor(2, device=device), torch.tensor(1024.0, device=device)
    Lookups(device, [2, 3], 5).assert_as_plain_torch(length=length, grad_scale=scale)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_weighted(device, value):
    lookups = Lookups(device, [2, 3], 5)
    lookups.where[0] = 6
    lookups.grads[0, 2] = value
    weighted, raw, statistics = lookups.run()
    assert raw.isfinite().logical_not().nonzero().tolist() == [[6 * 5 + 2]]
    kept = raw.isfinite()
    torch.testing.assert_close(weighted[kept], raw[kept], rtol=1e-6, atol=1e-6)
    assert statistics[2:].tolist() == pytest.approx([5.0 * ROWS, 0.0, 0.0], rel=1e-6)


def test_no_lookup_counts(device):
    lookups = Lookups(device, [2, 3], 5)
    lookups.where.fill_(ROWS)
    weighted, raw, statistics = lookups.run()
    assert not weighted.any()
    assert not raw.any()
    assert statistics.tolist() == [0.0, 0.0, 5.0 * ROWS, 0.0, 0.0]


def test_repeats_agree_bit_for_bit(device):
    lookups = Lookups(device, [2, 3], 64)
    assert all(map(torch.equal, lookups.run(), lookups.run()))


def test_wrong_inputs_are_named(device):
    lookups = Lookups(device, [2, 3], 5)
    lookups.where = lookups.where.int()
    with pytest.raises(ValueError, match=r"where must be \(15,\) int64 on .*, got \(15,\)"):
        lookups.run()
