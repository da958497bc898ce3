"""The fused steps of `gqsgd_` and `gqadamw_` against the float64 oracle and against torch.optim."""

import itertools
import math

import pytest
import torch
from kernel_cases import DEVICES, INTERPRETED, QUIET, Guarded, assert_stored, oracle_weights

from gq_triton import reference
from gq_triton.kernels import all_finite, gqadamw_, gqsgd_
from gq_triton.kernels.launch import CHUNK, block_size
from gq_triton.law import Law

BLOCK = block_size(torch.float32)
SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1)
SGD = {
    "lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False,
    "maximize": False, "first": False,
}  # fmt: skip
ADAMW = {
    "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "maximize": False,
}  # fmt: skip
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    *QUIET,
]


def split(options):
    """Return the options of a call in two parts: those of the law as a `Law`, and all others."""
    named = {key: value for key, value in options.items() if key in Law._fields}
    others = {key: value for key, value in options.items() if key not in Law._fields}
    return Law(**{"rho": 3.0, **named}), others


def exactly(tensor):
    """Return a float64 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


FLOAT32 = ("float32",) * 4


class Problem:
    """The tensors of one call of either optimizer, and the oracle's results for them."""

    def __init__(self, device, sizes, *, slots=5, count=8, shift=0, seed=0, dtypes=FLOAT32):
        param, grad, queue, state = (getattr(torch, name) for name in dtypes)
        self.guarded = Guarded(device, shift, seed)
        self.params = self.guarded.lists(sizes, dtype=param)
        self.grads = self.guarded.lists(sizes, dtype=grad)
        self.queues = self.guarded.rings(sizes, slots, dtype=queue)
        self.count = count
        self.queued = self.guarded.counters(sizes, count)
        self.first_moments = self.guarded.lists(sizes, dtype=state)
        squares = [x.double().cpu().square() for x in self.guarded.lists(sizes)]
        self.second_moments = [self.guarded.view(square, state) for square in squares]
        self.steps = [torch.tensor(2.0, device=device) for _ in sizes]

    def everything(self):
        """Return all tensors that a step may write."""
        return [
            *self.params, *self.queues, *self.queued, *self.first_moments, *self.second_moments,
            *self.steps,
        ]  # fmt: skip

    def weighted(self, rho, used=None):
        """Return ``w g`` of every tensor in float64 on the CPU."""
        pairs = zip(self.grads, self.queues, strict=True)
        return [oracle_weights(g, q, self.count, rho, used) * g.double().cpu() for g, q in pairs]

    def sgd_(self, finite=None, **options):
        lists = self.params, self.grads, self.queues, self.queued
        law, options = split(options)
        buffers = self.first_moments if (SGD | options)["momentum"] else None
        gqsgd_(*lists, buffers, finite, law, **(SGD | options))

    def adamw_(self, finite=None, **options):
        lists = self.params, self.grads, self.queues, self.queued
        state = self.first_moments, self.second_moments, self.steps
        law, options = split(options)
        gqadamw_(*lists, *state, finite, law, **(ADAMW | options))

    def check_sgd(self, **options):
        """Take a step and compare it with the oracle."""
        used = {**SGD, **options}
        first, rho = used.pop("first"), used.pop("rho", 3.0)
        before = [(exactly(p), exactly(m)) for p, m in self._pairs()]
        weighted = self.weighted(rho)
        raw = [grad.clone() for grad in self.grads]
        self.sgd_(**options)
        for index, (p, m) in enumerate(before):
            g = weighted[index]
            p, m_new = reference.sgd_update(p, g, None if first else m, **used)
            scale = g.abs() + m.abs() + before[index][0].abs()
            assert_stored(self.params[index], p, scale=scale)
            if m_new is not None:
                assert_stored(self.first_moments[index], m_new, scale=scale)
        self.check_queues(raw)

    def check_adamw(self, **options):
        """Take a step and compare it with the oracle."""
        used = {**ADAMW, **options}
        rho = used.pop("rho", 3.0)
        used["betas"] = (used.pop("beta1"), used.pop("beta2"))
        before = [
            (exactly(p), exactly(m), exactly(v))
            for (p, m), v in zip(self._pairs(), self.second_moments, strict=True)
        ]
        weighted = self.weighted(rho)
        raw = [grad.clone() for grad in self.grads]
        self.adamw_(**options)
        for index, (p, m, v) in enumerate(before):
            g = weighted[index]
            p_new, m_new, v_new = reference.adamw_update(p, g, m, v, 3, **used)
            update = (p_new - p).abs()
            assert_stored(self.params[index], p_new, scale=p.abs() + 4 * update)
            assert_stored(self.first_moments[index], m_new, scale=g.abs() + m.abs())
            assert_stored(self.second_moments[index], v_new, scale=g * g + v)
            assert float(self.steps[index]) == 3.0
        self.check_queues(raw)

    def _pairs(self):
        return zip(self.params, self.first_moments, strict=True)

    def check_queues(self, raw):
        """Compare the slot that was written, and everything around the tensors."""
        for queue, grad, count in zip(self.queues, raw, self.queued, strict=True):
            assert int(count) == self.count + 1
            slot = queue[self.count % queue.shape[0]]
            # The interpreter truncates to bfloat16: one ulp.
            rtol = 2**-7 if queue.dtype == torch.bfloat16 and INTERPRETED else 0.0
            torch.testing.assert_close(slot, grad.to(queue.dtype), rtol=rtol, atol=0.0)
        for grad, before in zip(self.grads, raw, strict=True):
            assert torch.equal(grad, before)
        self.guarded.check()


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_all_sizes_in_one_launch(device, name, shift):
    getattr(Problem(device, SIZES, shift=shift), f"check_{name}")()


@pytest.mark.parametrize(
    ("momentum", "nesterov", "dampening", "first"),
    [
        (0.0, False, 0.0, True),
        (0.9, False, 0.0, True),
        (0.9, False, 0.3, False),
        (0.9, True, 0.0, False),
        (0.5, True, 0.0, True),
    ],
)
@pytest.mark.parametrize(("weight_decay", "maximize"), [(0.0, True), (0.1, False), (0.1, True)])
def test_sgd_options(device, momentum, nesterov, dampening, first, weight_decay, maximize):
    Problem(device, (5, BLOCK + 9)).check_sgd(
        momentum=momentum, nesterov=nesterov, dampening=dampening, first=first,
        weight_decay=weight_decay, maximize=maximize,
    )  # fmt: skip


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.4, 0.0)])
@pytest.mark.parametrize(("weight_decay", "maximize"), [(0.0, False), (0.01, True)])
def test_adamw_options(device, betas, weight_decay, maximize):
    Problem(device, (5, BLOCK + 9)).check_adamw(
        beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, maximize=maximize
    )


@pytest.mark.parametrize("slots", [1, 2, 3, 12, 17])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_queue_lengths(device, name, slots):
    problem = Problem(device, (40, 3), slots=slots, count=2 * slots + 1, seed=slots)
    getattr(problem, f"check_{name}")()


MIXED = [
    ("float32", "float32", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "bfloat16", "float32", "float32"),
    ("float16", "float16", "float16", "float32"),
    ("float64", "float64", "float64", "float64"),
    ("float64", "float64", "bfloat16", "float64"),
    ("float32", "float32", "float64", "bfloat16"),
]


@pytest.mark.parametrize("dtypes", MIXED, ids="-".join)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_types_are_independent(device, name, dtypes):
    problem = Problem(device, (6, 130), dtypes=dtypes)
    if INTERPRETED and dtypes[2] == "bfloat16":
        # bfloat16 holds these gradients exactly: the interpreter would truncate, the oracle round.
        for grad in problem.grads:
            grad.copy_(grad.bfloat16())
    getattr(problem, f"check_{name}")()


def run_both(device, ours, theirs, options, *, steps, rho=1.0):
    """Return parameters after ``steps`` of ``ours`` (a Problem method) and of torch.optim."""
    problem = Problem(device, (300, BLOCK + 5), slots=steps, count=0)
    copies = [torch.nn.Parameter(p.clone()) for p in problem.params]
    optimizer = theirs(copies, **options, foreach=False)
    for step in range(steps):
        for ours_grad, copy in zip(problem.grads, copies, strict=True):
            ours_grad.normal_()
            copy.grad = ours_grad.clone()
        ours(problem, step)
        optimizer.step()
    return problem.params, [copy.detach() for copy in copies]


@pytest.mark.parametrize("rho", [1.0, 3.0])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.5, True)])
def test_sgd_without_weights_is_torch_sgd_bit_for_bit(device, rho, momentum, nesterov):
    """Every weight is 1 where rho = 1 and where the queue is never full.

    Factors are powers of two: their products are exact, so that it does not matter who contracts a
    product and a sum into an FMA (torch and the GPU do, the interpreter does not).
    """
    options = {"lr": 0.125, "momentum": momentum, "nesterov": nesterov}

    def ours(problem, step):
        problem.sgd_(**options, rho=rho, first=step == 0)

    ours_params, theirs = run_both(device, ours, torch.optim.SGD, options, steps=4)
    for actual, expected in zip(ours_params, theirs, strict=True):
        assert torch.equal(actual, expected)


def test_sgd_without_weights_is_torch_sgd(device):
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.3}

    def ours(problem, step):
        problem.sgd_(**options, rho=1.0, first=step == 0)

    ours_params, theirs = run_both(device, ours, torch.optim.SGD, options, steps=4)
    for actual, expected in zip(ours_params, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rho", [1.0, 3.0])
def test_adamw_without_weights_is_torch_adamw(device, rho):
    def ours(problem, step):
        if step == 0:
            for tensor in (*problem.first_moments, *problem.second_moments, *problem.steps):
                tensor.zero_()
        problem.adamw_(rho=rho)

    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours_params, theirs = run_both(device, ours, torch.optim.AdamW, options, steps=4)
    for actual, expected in zip(ours_params, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_found_inf_stops_everything(device, name):
    problem = Problem(device, (6, BLOCK + 1))
    problem.grads[0][2] = math.inf
    before = [tensor.clone() for tensor in problem.everything()]
    getattr(problem, f"{name}_")(found_inf=torch.tensor(1.0, device=device))
    assert all(torch.equal(a, b) for a, b in zip(problem.everything(), before, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_clear_found_inf_and_a_scale_change_nothing(device, name):
    plain, scaled = (Problem(device, (6, BLOCK + 1)) for _ in range(2))
    getattr(plain, f"{name}_")()
    for grad in scaled.grads:
        grad.mul_(1024.0)
    getattr(scaled, f"{name}_")(
        found_inf=torch.zeros(1, device=device), grad_scale=torch.tensor(1024.0, device=device)
    )
    pairs = zip(plain.everything(), scaled.everything(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_learning_rate_on_the_device(device, name):
    number, tensor = (Problem(device, (6, BLOCK + 1)) for _ in range(2))
    getattr(number, f"{name}_")(lr=0.125)
    getattr(tensor, f"{name}_")(lr=torch.tensor(0.125, device=device))
    pairs = zip(number.everything(), tensor.everything(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("used", [1, 3])
def test_effective_length(device, used):
    problem = Problem(device, (6, BLOCK + 1))
    weighted = problem.weighted(3.0, used)
    before = [exactly(p) for p in problem.params]
    problem.sgd_(momentum=0.0, length=torch.tensor(used, device=device))
    for index, p in enumerate(before):
        scale = weighted[index].abs() + p.abs()
        assert_stored(problem.params[index], p - 0.1 * weighted[index], scale=scale)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_non_finite_gradient_is_not_queued(device, name):
    bad, good = (Problem(device, (6, BLOCK + 1)) for _ in range(2))
    bad.grads[0][2] = math.nan
    flags = all_finite(bad.grads)
    kept = bad.queues[0].clone()
    getattr(bad, f"{name}_")(finite=flags)
    getattr(good, f"{name}_")(finite=torch.ones_like(flags))
    assert torch.equal(bad.queues[0], kept)
    assert [int(count) for count in bad.queued] == [8, 9]
    # As in torch, the update takes place: only the element that is not finite becomes NaN.
    assert bad.params[0].isnan().tolist() == [False, False, True, False, False, False]
    assert torch.equal(bad.params[1], good.params[1])
    assert torch.equal(bad.queues[1], good.queues[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_repeats_agree_bit_for_bit(device, name):
    results = []
    for _ in range(2):
        problem = Problem(device, (CHUNK + 3, 100, 0))
        for _ in range(2):
            getattr(problem, f"{name}_")()
        results.append(problem.everything())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_both_alignment_classes_in_one_call(device):
    aligned, shifted = Problem(device, (20, 30)), Problem(device, (20, 30), shift=1)
    mixed = Problem(device, (20, 30))
    names = ("params", "grads", "queues", "first_moments", "second_moments")
    for name in names:
        getattr(mixed, name)[1] = getattr(shifted, name)[1]
    aligned.sgd_()
    mixed.sgd_()
    for name in ("params", "queues", "first_moments"):
        pairs = zip(getattr(aligned, name), getattr(mixed, name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert [int(count) for count in mixed.queued] == [9, 9]


def test_no_tensors(device):
    gqsgd_([], [], [], [], None, None, Law(3.0), **SGD)
    gqadamw_([], [], [], [], [], [], [], None, Law(3.0), **ADAMW)


def test_wrong_inputs_are_named(device):
    problem = Problem(device, (4,))
    problem.first_moments[0] = problem.first_moments[0][:3]
    with pytest.raises(ValueError, match=r"momentum_buffers\[0\] must be flat and contiguous"):
        problem.sgd_()
    problem = Problem(device, (4,))
    problem.steps[0] = problem.steps[0].double()
    with pytest.raises(ValueError, match=r"steps\[0\] must be one torch.float32"):
        problem.adamw_()


@pytest.mark.slow
def test_many_tensors_find_their_chunks(device):
    """Sizes of every class lie between others: the search must not take a neighbour's row."""
    sizes = list(itertools.islice(itertools.cycle((0, 1, 17, CHUNK + 1, 2)), 21))
    problem = Problem(device, sizes)
    problem.check_sgd(momentum=0.0)


@pytest.mark.parametrize("sizes", [(0,) * 300, (2,) * 3], ids=["300 empty", "3 small"])
def test_every_launch_counts_once(device, sizes):
    """The program that arrives last counts for all, and leaves the ticket for the next launch."""
    problem = Problem(device, sizes)
    finite = torch.ones(len(sizes), dtype=torch.bool, device=device)
    finite[1] = False
    for _ in range(2):
        problem.adamw_(finite)
    problem.sgd_(momentum=0.0)
    assert [int(count) for count in problem.queued] == [11, 9] + [11] * (len(sizes) - 2)
    assert {float(step) for step in problem.steps} == {4.0}
