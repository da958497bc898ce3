"""The paper's lemmas by running GQSGD itself on the lemmas' signal.

The signal of section 3.2 is ``C`` at every N-th step and ``u`` at all others, from t = 1 on. GQSGD
runs on float64 parameters whose gradient is that signal; its momentum buffer is the ``m_t`` of the
lemmas. Every closed form is written here as in the paper, with ``beta_k^N`` read as the sum of
``beta**(j*N)`` over j < k.
"""

import math

import pytest
import torch

from gq_triton import GQSGD

BETA, RHO = 0.9, 3.0


def geometric(beta, count):
    """Return the paper's beta_x: the sum of beta**j over j < count."""
    return sum(beta**j for j in range(count))


def momenta(u, c, *, period, steps, length=3, beta=BETA, rho=RHO, backend="torch"):
    """Return m_1 ... m_steps of GQSGD, (steps, signals); u and c hold one element per signal."""
    param = torch.nn.Parameter(torch.zeros_like(u))
    optimizer = GQSGD([param], lr=0.5, momentum=beta, queue_length=length, rho=rho, backend=backend)
    history = []
    for t in range(1, steps + 1):
        param.grad = (c if t % period == 0 else u).clone()
        optimizer.step()
        history.append(optimizer.state[param]["momentum_buffer"].clone())
    return torch.stack(history)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def lemma_3_1(u, c, k, period, beta=BETA):
    return geometric(beta**period, k) * (u * beta * geometric(beta, period - 1) + c)


def gammas(period, length, beta=BETA, rho=RHO):
    """Return gamma_0 and gamma of Lemma 3.3."""
    phi = max(1 / math.sqrt(length - 1), 1 / rho) if length > 1 else rho
    filled, rest = beta ** (period - 1 - length), geometric(beta, period - 1 - length) / rho
    warm = filled * geometric(beta, length)
    return warm + rest, phi * warm + rest


def lemma_3_3(u, c, k, period, length, beta=BETA, rho=RHO):
    gamma_0, gamma = gammas(period, length, beta, rho)
    first = beta ** (period * (k - 1)) * (u * beta * gamma_0 + rho * c)
    return first + geometric(beta**period, k - 1) * (u * beta * gamma + rho * c)


# Frequent and sparse gradients of every sign and ratio, several of them not exact in binary.
SIGNALS = [
    (1.0, -6.0),
    (0.1, -0.7),
    (-0.3, 5.0),
    (1e-12, -1e-3),
    (3.7e8, 1e2),
    (1.0, 1.1),
    (-2, -9),
]
U = torch.tensor([u for u, _ in SIGNALS], dtype=torch.float64)
C = torch.tensor([c for _, c in SIGNALS], dtype=torch.float64)


def relative_error(measured, expected, rho=RHO):
    """Return the error relative to the size of the terms, which may cancel."""
    size = torch.maximum(expected.abs(), U.abs() + rho * C.abs())
    return ((measured - expected).abs() / size).max().item()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9, 0.99])
def test_tgq02_lemma_3_1_is_the_momentum_of_plain_sgd(beta):
    for period in range(3, 13):
        history = momenta(U, C, period=period, steps=4 * period, beta=beta, rho=1.0)
        for k in range(1, 5):
            expected = lemma_3_1(U, C, k, period, beta)
            assert relative_error(history[k * period - 1], expected) < 1e-13


def test_tgq02_lemma_3_1_goldens():
    history = momenta(scalar(1.0), scalar(-6.0), period=9, steps=27, rho=1.0)
    golden = torch.tensor([-0.8742048900, -1.2128897760, -1.3441032401], dtype=torch.float64)
    torch.testing.assert_close(history[8::9], golden, rtol=0, atol=6e-11)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_tgq04_lemma_3_3_goldens(backend):
    assert gammas(9, 3) == pytest.approx((2.9652612333, 2.4965653329), abs=6e-11)
    history = momenta(scalar(1.0), scalar(-6.0), period=9, steps=27, backend=backend)
    golden = torch.tensor([-15.3312648900, -21.6927373411, -24.1573021089], dtype=torch.float64)
    torch.testing.assert_close(history[8::9], golden, rtol=0, atol=6e-11)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:queue_length=1")  # the lemma holds for it too
@pytest.mark.parametrize("rho", [1.5, 3.0, 7.0])
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
def test_tgq04_lemma_3_3_is_the_momentum_of_gqsgd(beta, rho):
    """The lemma holds on the whole grid of periods N and of queues with L <= N - 1."""
    for period in (3, 4, 5, 6, 9, 12):
        for length in range(1, period):
            options = {"length": length, "beta": beta, "rho": rho}
            history = momenta(U, C, period=period, steps=4 * period, **options)
            for k in range(1, 5):
                expected = lemma_3_3(U, C, k, period, length, beta, rho)
                assert relative_error(history[k * period - 1], expected, rho) < 1e-13


@pytest.mark.parametrize("period", [3, 4, 5, 9])
def test_tgq04_lemma_3_3_does_not_hold_for_a_queue_as_long_as_the_period(period):
    """A queue of N or more holds a C when the next one comes: C is then less unusual."""
    for length in (period, period + 1, period + 3):
        history = momenta(U, C, period=period, steps=4 * period, length=length)
        expected = lemma_3_3(U, C, 4, period, length)
        assert relative_error(history[4 * period - 1], expected) > 0.05


def test_tgq05_weight_sequence():
    param = torch.nn.Parameter(scalar(0.0))
    optimizer = GQSGD([param], lr=1.0, queue_length=3, backend="torch")
    measured = []
    for t in range(1, 28):
        gradient = -6.0 if t % 9 == 0 else 1.0
        before, param.grad = param.item(), scalar(gradient)
        optimizer.step()
        measured.append((before - param.item()) / gradient)
    low, phi = 1 / 3, 1 / math.sqrt(2)
    later = [phi] * 3 + [low] * 5 + [3.0]
    assert measured == pytest.approx([1.0] * 3 + [low] * 5 + [3.0] + 2 * later, rel=1e-12)


@pytest.mark.parametrize(("period", "threshold", "printed"), [(3, 1.7100, 2.44), (9, 5.1258, 5.51)])
def test_tgq06_equation_4_thresholds_are_not_the_printed_ones(period, threshold, printed):
    """SGD's momentum takes the sign of C from |C/u| = beta * beta_{N-1} on; beta_N is printed."""
    assert BETA * geometric(BETA, period - 1) == pytest.approx(threshold, abs=5e-5)
    assert BETA * geometric(BETA, period) == pytest.approx(printed, abs=1e-2)
    exact = BETA * geometric(BETA, period - 1)
    ratios = torch.tensor([0.5, 1 - 1e-9, 1 + 1e-9, 2.0], dtype=torch.float64)
    ones = torch.ones_like(ratios)
    history = momenta(ones, -exact * ratios, period=period, steps=6 * period, rho=1.0)
    for at_c in history[period - 1 :: period]:
        assert (at_c < 0).tolist() == [False, False, True, True], "same threshold for every k"
    between = torch.full((1,), -(threshold + printed) / 2, dtype=torch.float64)
    history = momenta(torch.ones(1).double(), between, period=period, steps=period, rho=1.0)
    assert history[-1].item() < 0, "SGD follows C already below the printed number"


def test_equation_5_bound_is_tight_for_the_first_period_and_falls_later():
    """The exact bound at t = kN is (beta/rho) (a gamma_0 + c gamma) / (a + c)."""
    period, length = 9, 3
    gamma_0, gamma = gammas(period, length)
    bounds = []
    for k in range(1, 5):
        a, c = BETA ** (period * (k - 1)), geometric(BETA**period, k - 1)
        bounds.append(BETA / RHO * (a * gamma_0 + c * gamma) / (a + c))
    assert bounds[:3] == pytest.approx([0.8896, 0.7882, 0.7627], abs=5e-5)
    assert BETA / RHO * gamma == pytest.approx(0.7490, abs=5e-5)
    for k, bound in enumerate(bounds, start=1):
        c = -bound * torch.tensor([1 - 1e-9, 1 + 1e-9], dtype=torch.float64)
        history = momenta(torch.ones(2).double(), c, period=period, steps=k * period, length=length)
        assert (history[-1] < 0).tolist() == [False, True]


def ratio(period, length, gamma):
    return RHO * geometric(BETA, period - 1) / gammas(period, length)[gamma]


def test_tgq07_gq_lowers_the_threshold_by_a_factor_from_rho_to_below_rho_squared():
    for period in range(3, 80):
        for length in range(1, period):
            gain = ratio(period, length, 0)
            assert RHO * (1 - 1e-12) <= gain < RHO**2
            assert (gain < RHO * (1 + 1e-12)) == (length == period - 1)


@pytest.mark.parametrize(
    ("period", "gamma", "table"),
    [
        (9, 0, (5.76, 5.02, 4.39)),
        (15, 0, (7.37, 6.87, 6.38)),
        (30, 0, (8.68, 8.56, 8.42)),
        (60, 0, (8.99, 8.98, 8.98)),
        (9, 1, (6.84, 6.98, 7.13)),
    ],
)
def test_tgq07_table(period, gamma, table):
    measured = [ratio(period, length, gamma) for length in (3, 4, 5)]
    assert measured == pytest.approx(table, abs=6e-3)


def test_tgq07_the_factor_is_rho_squared_once_the_queue_has_rho_squared_plus_1_entries():
    assert ratio(30, 10, 1) == pytest.approx(9.0, rel=1e-12)
    assert ratio(30, 9, 1) < 9.0 - 1e-3


# Other readings of the law, and the relative error each puts into Lemma 3.3 (docs/method.md).
DEVIATIONS = {
    "queue includes the current gradient": 11.98,
    "queue of zeros used before it is full": 10.20,
    "partly filled queue used": 15.01,
    "weighted gradients queued": 8.66,
    "sample standard deviation": 0.143,
    "constant queue: always 1/rho": 31.9,
    "constant queue: always 1": 40.2,
}


def deviating_momentum(reading, u, c, period, length, steps):
    """Return m_steps of heavy-ball SGD under another reading of the law, in plain Python."""
    queue = [0.0] * length if reading == "queue of zeros used before it is full" else []
    needed = 1 if reading == "partly filled queue used" else length
    momentum = 0.0
    for t in range(1, steps + 1):
        g = c if t % period == 0 else u
        members = queue[-length:]
        if reading == "queue includes the current gradient":
            members = [*queue[1 - length :], g] if length > 1 else [g]
        w = 1.0
        if len(queue) >= needed:
            mu = sum(members) / len(members)
            ddof = 1 if reading == "sample standard deviation" and len(members) > 1 else 0
            square = sum((q - mu) ** 2 for q in members) / (len(members) - ddof)
            z = abs(g - mu) / math.sqrt(square) if square else math.inf * (g != mu or math.nan)
            if max(members) == min(members):
                z = 0.0 if g == members[0] else math.inf
                z = {"constant queue: always 1/rho": 0.0, "constant queue: always 1": 1.0}.get(
                    reading, z
                )
            w = min(max(z, 1 / RHO), RHO)
        queue.append(w * g if reading == "weighted gradients queued" else g)
        momentum = BETA * momentum + w * g
    return momentum


def deviation_error(reading):
    """Return the closed form's largest relative error over periods, lengths, signals and k."""
    worst = 0.0
    for period, length in ((5, 3), (5, 4), (9, 3), (9, 4), (9, 5), (12, 3), (12, 5)):
        for u, c in ((1.0, -6.0), (1.0, -2.0), (-0.5, 0.6), (1.0, 4.0)):
            for k in (1, 2, 3):
                closed = lemma_3_3(u, c, k, period, length)
                other = deviating_momentum(reading, u, c, period, length, k * period)
                worst = max(worst, abs(other - closed) / abs(closed))
    return worst


def test_the_reading_of_this_package_makes_lemma_3_3_exact():
    assert deviation_error("the one of this package") < 1e-13


@pytest.mark.parametrize("reading", DEVIATIONS)
def test_every_other_reading_breaks_lemma_3_3(reading):
    assert deviation_error(reading) == pytest.approx(DEVIATIONS[reading], rel=5e-3)
