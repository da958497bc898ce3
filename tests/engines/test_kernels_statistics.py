"""The statistics of a ring, and clusters' means weighted by them, against the float64 oracle."""

import math

import pytest
import torch
from kernel_cases import DEVICE, ON_DEVICE, QUIET, Clusters, Guarded, newest_first

from gq_triton import kernels, reference
from gq_triton.engines import compiled, eager
from gq_triton.law import Law

pytestmark = QUIET
ENGINES = [
    pytest.param(eager, "cpu", id="eager"),
    pytest.param(compiled, "cpu", id="compiled"),
    pytest.param(kernels, DEVICE, marks=ON_DEVICE, id=f"kernels-{DEVICE}"),
]
# Deviations, their squares, the sum over L and the root: each rounds once or twice.
ULPS = 8


@pytest.mark.parametrize(("ops", "device"), ENGINES)
class TestStatistics:
    def check(self, ops, guarded, queue, count, *, length=None, dtype=torch.float32, shift=0.0):
        out = guarded.view(torch.zeros(2, queue.shape[1]), dtype)
        queued = torch.tensor(count, device=queue.device)
        used = None if length is None else torch.tensor(length, device=queue.device)
        ops.queue_statistics(queue, queued, out, length=used)
        rows = newest_first(queue, count, length).double().cpu()
        mean, sigma = rows.mean(dim=0), (rows - rows.mean(dim=0)).square().mean(dim=0).sqrt()
        eps = torch.finfo(dtype).eps
        spread = (rows - rows[0]).abs().amax(dim=0)
        center, rate = out.double().cpu()
        slots = math.sqrt(len(rows))
        # One rounding of the mean itself, the others are of deviations.
        bound = eps * (mean.abs() / 2 + ULPS * spread) + torch.finfo(dtype).tiny
        assert bool(((center - mean).abs() <= bound).all())
        assert bool(((rate * sigma - 1).abs() <= ULPS * slots * eps * (1 + spread / sigma)).all())
        guarded.check()

    @pytest.mark.parametrize("slots", [2, 3, 5, 8, 17])
    @pytest.mark.parametrize("n", [1, 511, 513, 1500])
    def test_mean_and_sigma(self, ops, device, slots, n):
        guarded = Guarded(device, seed=slots)
        self.check(ops, guarded, guarded.normal(slots, n), 3 * slots + 1)

    @pytest.mark.parametrize("length", [2, 3, 5])
    @pytest.mark.parametrize("turn", [0, 1, 4])
    def test_effective_length(self, ops, device, length, turn):
        guarded = Guarded(device)
        self.check(ops, guarded, guarded.normal(5, 203), 5 + turn, length=length)

    @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
    def test_types(self, ops, device, stored):
        guarded = Guarded(device)
        self.check(ops, guarded, guarded.normal(5, 203, dtype=stored), 9)

    def test_float64(self, ops, device):
        guarded = Guarded(device)
        queue = guarded.normal(5, 203, dtype=torch.float64)
        self.check(ops, guarded, queue, 9, dtype=torch.float64)

    def test_a_constant_queue_is_its_value(self, ops, device):
        guarded = Guarded(device)
        queue = guarded.view(torch.full((4, 9), 0.1), torch.float32)
        out = guarded.view(torch.zeros(2, 9), torch.float32)
        ops.queue_statistics(queue, torch.tensor(4, device=device), out)
        assert torch.equal(out[0], queue[0])
        assert bool((out[1] == torch.finfo(torch.float32).max).all())

    def test_too_few_gradients_are_nan(self, ops, device):
        guarded = Guarded(device)
        out = guarded.view(torch.zeros(2, 9), torch.float32)
        ops.queue_statistics(guarded.normal(4, 9), torch.tensor(3, device=device), out)
        assert bool(out[1].isnan().all())


@pytest.mark.parametrize(("ops", "device"), ENGINES)
class TestCombine:
    """``combine`` with statistics in place of the ring."""

    def both(self, ops, device, queue, count, sums, *, rho=3.0, scale="paper", **options):
        """Return the results of ``combine`` with the ring and with its statistics."""
        clusters = Clusters(device, [3, 0, 5], centroid_scale=scale)
        vectors, queued = clusters.vectors(), torch.tensor(count, device=device)
        dtype = torch.promote_types(queue.dtype, sums.dtype)
        out = torch.empty(2, queue.shape[1], dtype=dtype, device=device)
        ops.queue_statistics(queue, queued, out)
        law = Law(rho, **options)
        ring = ops.combine(sums, queue, queued, law, **vectors)
        known = ops.combine(sums, out, None, law, queue_dtype=queue.dtype, **vectors)
        return ring, known

    @pytest.mark.parametrize("scale", ["paper", "standard_error"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("n", [1, 301, 5000])
    def test_equals_the_ring(self, ops, device, n, dtype, scale):
        guarded = Guarded(device, seed=n)
        queue, sums = guarded.normal(5, n, dtype=dtype), guarded.normal(3, n, dtype=dtype)
        ring, known = self.both(ops, device, queue, 8, sums, scale=scale)
        # The mean is rounded once more: mu / sigma ulps of z, here below 100.
        tolerance = 100 * torch.finfo(dtype).eps
        for mine, theirs in zip(known, ring, strict=True):
            size = float(theirs.abs().max())
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * size)
        assert torch.equal(known[1], ring[1])

    @pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
    def test_means_are_rounded_to_the_type_of_the_ring(self, ops, device, stored):
        """A mean that rounds to a constant ring of a narrow type has weight 1 / rho."""
        guarded = Guarded(device)
        queue = guarded.view(torch.ones(4, 9), stored)
        clusters = Clusters(device, [4])
        # These means become 1 whether they are rounded or, as by the interpreter, truncated.
        sums = guarded.view(torch.full((1, 9), 1 + 2.0**-12), torch.float32)
        out = torch.empty(2, 9, device=device)
        ops.queue_statistics(queue, torch.tensor(4, device=device), out)
        weighted, raw, _ = ops.combine(
            sums, out, None, Law(3.0), queue_dtype=stored, **clusters.vectors()
        )
        oracle = reference.weighted_gradient(sums[0].cpu(), queue.cpu(), rho=3.0)
        torch.testing.assert_close(weighted.double().cpu(), oracle, rtol=1e-6, atol=0)  # float32
        torch.testing.assert_close(raw, sums[0], rtol=0, atol=0)

    def test_constant_queues(self, ops, device):
        guarded = Guarded(device)
        queue = guarded.view(torch.zeros(4, 6), torch.float32)
        sums = guarded.view(torch.tensor([[0.0, 1e-20, -3.0] * 2] * 3), torch.float32)
        ring, known = self.both(ops, device, queue, 4, sums)
        assert torch.equal(ring[0], known[0])
        assert torch.equal(ring[2], known[2])

    @pytest.mark.parametrize("count", [0, 4])
    def test_weights_are_one_until_the_queue_is_full(self, ops, device, count):
        guarded = Guarded(device)
        queue, sums = guarded.normal(5, 301), guarded.normal(3, 301)
        ring, known = self.both(ops, device, queue, count, sums)
        assert torch.equal(ring[0], known[0])
        assert torch.equal(ring[2], known[2])

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_not_finite_sums_pass(self, ops, device, value):
        guarded = Guarded(device)
        queue, sums = guarded.normal(5, 301), guarded.normal(3, 301)
        sums[2, 77] = value
        ring, known = self.both(ops, device, queue, 9, sums)
        torch.testing.assert_close(known[0], ring[0], rtol=0, atol=0, equal_nan=True)

    def test_rho_one(self, ops, device):
        guarded = Guarded(device)
        queue, sums = guarded.normal(5, 301), guarded.normal(3, 301)
        ring, known = self.both(ops, device, queue, 9, sums, rho=1.0)
        assert torch.equal(ring[0], known[0])

    def test_parts_and_loss_scale(self, ops, device):
        guarded = Guarded(device)
        whole = guarded.normal(5, 400)
        sums = guarded.view(guarded.normal(3, 100) * 1024, torch.float32)
        scale = torch.tensor(1024.0, device=device)
        ring, known = self.both(ops, device, whole[:, 100:200], 9, sums, grad_scale=scale)
        # As above: the mean is rounded once more. Values are around 1024, the loss scale.
        tolerance = 100 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(known[0], ring[0], rtol=tolerance, atol=tolerance * 1024 / 10)
