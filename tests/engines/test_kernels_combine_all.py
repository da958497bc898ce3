"""The weighted sums of many parameters' cluster means: `combine_all` as `combine`, bit for bit.

`test_kernels_combine.py` compares `combine` with the float64 oracle.
"""

import math
from typing import Any

import pytest
import torch
from kernel_cases import DEVICES, QUIET, Clusters, Guarded, newest_first
from test_kernels_combine import assert_combined, sums_of

from gq_triton.engines import eager
from gq_triton.kernels import combine, combine_all
from gq_triton.kernels.combine import CHUNK
from gq_triton.law import Law

# An empty tensor, one element, lengths of both alignment classes, more than one chunk.
SIZES = [0, 1, 64, 37, CHUNK + 16, 0, CHUNK - 3, 2 * CHUNK]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
pytestmark = [pytest.mark.parametrize("device", DEVICES), *QUIET]


class Batch:
    """Sums, rings and places for the results of parameters of many sizes."""

    def __init__(self, device, clusters, sizes=SIZES, *, slots=4, dtype=torch.float32,
                 queue_dtype=None, out_dtype=None, counts=None, shift=0):  # fmt: skip
        self.guarded, self.clusters, self.device = Guarded(device, shift), clusters, device
        self.sums = [sums_of(self.guarded, clusters, n, dtype) for n in sizes]
        self.queues = self.guarded.rings(sizes, slots, queue_dtype or dtype)
        self.counts = counts or [slots + 2 + index for index in range(len(sizes))]
        self.queued = [torch.tensor(count, device=device) for count in self.counts]
        self.weighted = self.guarded.lists(sizes, out_dtype or dtype)
        self.raw = self.guarded.lists(sizes, dtype)

    def run(self, ops=combine_all, rho=3.0, **law):
        return ops(
            self.sums, self.queues, self.queued, self.weighted, self.raw, Law(rho, **law),
            **self.clusters.vectors(),
        )  # fmt: skip

    def one_by_one(self, rho=3.0, **law):
        """Return what `combine` makes of each parameter."""
        return [
            combine(*each, Law(rho, **law), **self.clusters.vectors())
            for each in zip(self.sums, self.queues, self.queued, strict=True)
        ]

    def assert_same(self, tables, expected):
        for out, mean, table, other in zip(self.weighted, self.raw, tables, expected, strict=True):
            assert torch.equal(out.nan_to_num(7.0), other[0].to(out.dtype).nan_to_num(7.0))
            assert torch.equal(mean.nan_to_num(7.0), other[1].nan_to_num(7.0))
            assert torch.equal(table.nan_to_num(7.0), other[2].nan_to_num(7.0))
        self.guarded.check()


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("sizes", [[5], [2, 0, 6]])
def test_parameters_of_all_sizes(device, sizes, shift):
    batch = Batch(device, Clusters(device, sizes), shift=shift)
    tables, finite = batch.run()
    assert finite.tolist() == [True] * len(SIZES)
    batch.assert_same(tables, batch.one_by_one())


def test_against_the_oracle(device):
    clusters = Clusters(device, [2, 0, 6], 0.5, "standard_error")
    batch = Batch(device, clusters, [64, 37, CHUNK + 16])
    tables, _ = batch.run(rho=2.0)
    for at, count in enumerate(batch.counts):
        actual = batch.weighted[at], batch.raw[at], tables[at].sum(dim=0)
        rows = newest_first(batch.queues[at], count).cpu()
        assert_combined(actual, batch.sums[at], clusters, rows, rho=2.0)


@pytest.mark.parametrize("queue_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_are_independent(device, dtype, queue_dtype):
    batch = Batch(device, Clusters(device, [2, 3, 0]), [48, 37], dtype=dtype,
                  queue_dtype=queue_dtype)  # fmt: skip
    tables, _ = batch.run()
    batch.assert_same(tables, batch.one_by_one())


def test_a_weighted_gradient_in_the_type_of_its_parameter(device):
    batch = Batch(device, Clusters(device, [2, 3]), [48, 37], queue_dtype=torch.bfloat16,
                  out_dtype=torch.bfloat16)  # fmt: skip
    batch.run()
    for out, (weighted, *_) in zip(batch.weighted, batch.one_by_one(), strict=True):
        # The interpreter truncates to bfloat16, where a GPU rounds.
        torch.testing.assert_close(out.float(), weighted, rtol=2**-7, atol=0)


@pytest.mark.parametrize("slots", [1, 5, 17])
def test_a_parameter_in_its_warm_up_beside_others(device, slots):
    counts = [0, slots - 1, slots, 3 * slots + 1]
    batch = Batch(device, Clusters(device, [3, 5]), [48, 48, 48, 37], slots=slots, counts=counts)
    tables, _ = batch.run()
    batch.assert_same(tables, batch.one_by_one())
    whole = batch.sums[0].sum(dim=0)
    torch.testing.assert_close(batch.weighted[0], whole, rtol=1e-6, atol=1e-7)


def test_loss_scale_and_effective_length(device):
    batch = Batch(device, Clusters(device, [3, 5]), [48, 37])
    law: dict[str, Any] = {
        "length": torch.tensor(2, device=device),
        "grad_scale": torch.tensor(1024.0, device=device),
    }
    tables, _ = batch.run(**law)
    batch.assert_same(tables, batch.one_by_one(**law))


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_only_gradients_that_are_not_finite_lose_their_weights(device, value):
    batch = Batch(device, Clusters(device, [2, 6]))
    for at in (2, 6, 7):
        batch.sums[at][1, -1] = value
    tables, finite = batch.run()
    assert finite.logical_not().nonzero().flatten().tolist() == [2, 6, 7]
    batch.assert_same(tables, batch.one_by_one())
    # All of the parameter passes unweighted, the chunks before the bad one too.
    torch.testing.assert_close(
        batch.weighted[7][:CHUNK], batch.sums[7][:, :CHUNK].sum(dim=0), rtol=1e-6, atol=1e-6
    )


@pytest.mark.slow
def test_repeats_agree_bit_for_bit(device):
    batch = Batch(device, Clusters(device, [2, 0, 6]))
    first = [table.clone() for table in batch.run()[0]]
    kept = [out.clone() for out in (*batch.weighted, *batch.raw)]
    second = batch.run()[0]
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, kept, (*batch.weighted, *batch.raw)))


def test_plain_torch_does_the_same(device):
    batch = Batch(device, Clusters(device, [2, 0, 6]), [64, 37])
    batch.sums[1][2, 5] = math.inf
    tables, finite = batch.run()
    expected = *batch.weighted, *batch.raw, *(table.sum(dim=0) for table in tables)
    expected = [part.clone() for part in expected]
    tables, other = batch.run(eager.combine_all)
    actual = *batch.weighted, *batch.raw, *(table.sum(dim=0) for table in tables)
    assert torch.equal(finite, other)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=1e-6)


def test_wrong_inputs_are_named(device):
    clusters = Clusters(device, [1, 1])
    batch = Batch(device, clusters, [48, 37])
    batch.raw[1] = batch.raw[1][:5]
    with pytest.raises(ValueError, match=r"raw\[1\] must be flat and contiguous, of shape \(37,\)"):
        batch.run()
    batch = Batch(device, clusters, [48, 37])
    batch.sums[1] = batch.sums[1][:1]
    with pytest.raises(ValueError, match=r"sums\[1\] must have shape \(2, \*\), or be flat, got"):
        batch.run()
    batch = Batch(device, clusters, [48, 37])
    batch.queued[1] = torch.tensor(3.0, device=device)
    with pytest.raises(ValueError, match=r"queued\[1\] must be one torch.int64"):
        batch.run()
