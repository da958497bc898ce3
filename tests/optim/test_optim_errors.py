"""Errors of the optimizers and of the law say what must hold and what came; nothing is changed."""

import math
import re
from typing import Any

import pytest
import torch
from optim_cases import (
    assert_same,
    both_optimizers,
    set_gradients,
    small_parameters,
    snapshot,
    train,
    values,
)

from gq_triton import GQSGD, GQAdamW, engines, scarcity_weight
from gq_triton.engines import compiled, eager
from gq_triton.extras import how_to_install

COMMON = [
    ({"rho": 0.5}, "rho must be a finite number >= 1 (1 switches the law off), got 0.5"),
    ({"rho": math.nan}, "rho must be a finite number >= 1 (1 switches the law off), got nan"),
    ({"rho": math.inf}, "rho must be a finite number >= 1 (1 switches the law off), got inf"),
    ({"queue_length": 0}, "queue_length must be an integer >= 1, got 0"),
    ({"queue_length": 2.5}, "queue_length must be an integer >= 1, got 2.5"),
    ({"min_queue_length": 0}, "min_queue_length must be an integer >= 1, got 0"),
    ({"min_queue_length": 6}, "min_queue_length must be at most queue_length, got 6 > 5"),
    (
        {"queue_length": 2, "loss_window": 3},
        "min_queue_length must be at most queue_length, got 3 > 2",
    ),
    ({"loss_window": 0}, "loss_window must be an integer >= 1, got 0"),
    (
        {"queue_dtype": torch.int8},
        'queue_dtype must be None, a floating type of 16 bits or more, or "float8", got torch.int8',
    ),
    (
        {"queue_dtype": torch.float8_e4m3fn},
        'queue_dtype must be None, a floating type of 16 bits or more, or "float8", got '
        "torch.float8_e4m3fn",
    ),
    ({"backend": "cuda"}, "backend must be one of auto, triton, numba, torch, got 'cuda'"),
    ({"lr": -0.1}, "lr must be >= 0, got -0.1"),
    ({"lr": math.nan}, "lr must be >= 0, got nan"),
    ({"lr": torch.tensor([0.1, 0.2])}, "lr must hold one element, got a tensor of shape (2,)"),
    ({"lr": 10**25}, "lr must be at most 1e+20, got 10000000000000000000000000"),
    (
        {"lr": torch.tensor(1j)},
        "lr must be a number, got a tensor of shape () and type torch.compl",
    ),
    ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
    ({"weight_decay": -1.0}, "weight_decay must be >= 0, got -1.0"),
    ({"queue_length": 1 << 20_000}, "queue_length must be at most 4096, got a number of too many"),
    # All problems at once, those of the law first.
    (
        {"rho": 0, "lr": -1, "weight_decay": math.nan},
        "rho must be a finite number >= 1 (1 switches the law off), got 0; lr must be >= 0, got "
        "-1; weight_decay must be >= 0, got nan",
    ),
]
SGD_ONLY = [
    ({"momentum": -0.1}, "momentum must be >= 0, got -0.1"),
    (
        {"momentum": "0.9", "dampening": None, "nesterov": 0.1},
        "momentum must be a number, got '0.9'; dampening must be a number, got None; nesterov must "
        "be True or False, got 0.1: the order of arguments is lr, momentum, weight_decay, nesterov",
    ),
    (
        {"nesterov": True},
        "nesterov needs momentum > 0 and dampening 0, got momentum 0.0 and dampening 0.0",
    ),
    (
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        "nesterov needs momentum > 0 and dampening 0, got momentum 0.9 and dampening 0.1",
    ),
]
ADAMW_ONLY = [
    ({"eps": -1e-8}, "eps must be >= 0, got -1e-08"),
    ({"betas": (1.0, 0.999)}, "betas[0] must be in [0, 1), got 1.0"),
    ({"betas": (0.9, -0.1)}, "betas[1] must be in [0, 1), got -0.1"),
    ({"betas": 0.9}, "betas must be two numbers, got 0.9"),
    (
        {"eps": None, "betas": (1, "x")},
        "eps must be a number, got None; betas[0] must be in [0, 1), got 1; betas[1] must be in "
        "[0, 1), got 'x'",
    ),
]
OPTIONS = [
    *((kind, *case) for kind in (GQSGD, GQAdamW) for case in COMMON),
    *((GQSGD, *case) for case in SGD_ONLY),
    *((GQAdamW, *case) for case in ADAMW_ONLY),
]


@pytest.mark.parametrize(("kind", "options", "message"), OPTIONS)
def test_an_option_that_cannot_hold_is_refused(kind, options, message):
    """The constructor refuses it, for all groups or for one, and add_param_group refuses it."""
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(small_parameters(), **{"lr": 0.1, **options})
    with pytest.raises(ValueError, match=re.escape(message)):
        kind([{"params": small_parameters(), **options}], lr=0.1)
    optimizer = kind(small_parameters(), lr=0.1)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.add_param_group({"params": small_parameters(), **options})
    assert len(optimizer.param_groups) == 1


def test_options_that_look_odd_but_hold():
    odd: list[dict[str, Any]] = [{"rho": 1}, {"rho": 1, "queue_length": 1}, {"queue_length": 2}]
    for options in odd:
        GQSGD(small_parameters(), lr=0, **options)
    with pytest.warns(UserWarning, match="queue_length=1: one gradient has no deviation"):
        GQSGD(small_parameters(), lr=0, queue_length=1)


@both_optimizers
def test_a_complex_parameter_is_refused(variant):
    params = [torch.ones(3, requires_grad=True), torch.ones(2, dtype=torch.cfloat)]
    message = r"parameter 1 of group 0, of shape \(2,\), must have a real floating type, got "
    with pytest.raises(ValueError, match=message + r"torch.complex64: .* torch.view_as_real"):
        variant.build(params)
    with pytest.raises(ValueError, match=r"^spectrum must have a real floating type"):
        variant.build([("spectrum", params[1])])


@both_optimizers
@pytest.mark.parametrize("named", [True, False])
def test_a_sparse_gradient_is_refused_before_anything_moves(variant, named):
    """A sparse gradient in the last group is refused before any group has taken its step."""
    dense, embedding = torch.nn.Linear(4, 2), torch.nn.Embedding(10, 4, sparse=True)
    groups = [
        {"params": dict(m.named_parameters(prefix=p)).items() if named else m.parameters()}
        for p, m in (("head", dense), ("table", embedding))
    ]
    optimizer = variant.build(groups, loss_window=2)

    def closure():
        optimizer.zero_grad()
        loss = dense(embedding(torch.tensor([1, 3]))).sum()
        loss.backward()
        return loss

    params = [*dense.parameters(), *embedding.parameters()]
    before = values(params)
    name = "table.weight" if named else r"parameter 0 of group 1, of shape \(10, 4\),"
    message = name + r" has a gradient of layout torch.sparse_coo.*sparse=False.*SparseAdam"
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure)
    assert_same(values(params), before)
    assert not optimizer.state
    assert "losses" not in optimizer.param_groups[0]


@both_optimizers
def test_triton_on_the_cpu_needs_the_interpreter(variant, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    first, second = small_parameters(), small_parameters()
    groups = [{"params": first, "backend": "torch"}, {"params": second, "backend": "triton"}]
    optimizer = variant.build(groups)
    before = values([*first, *second])
    set_gradients(first, 0)
    set_gradients(second, 0)
    message = 'backend="triton" needs a GPU, got tensors on cpu: use backend="auto", or set TRITON'
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same(values([*first, *second]), before)
    assert not optimizer.state
    optimizer.param_groups[1]["backend"] = "auto"
    train(optimizer, [*first, *second], 1)


@pytest.mark.parametrize(
    ("name", "package", "cure"),
    [
        ("triton", "triton", 'install it, or use backend="auto"'),
        ("numba", "numba", f'{how_to_install("cpu")}, or use backend="auto"'),
    ],
)
def test_a_backend_whose_package_is_missing_says_so(name, package, cure, monkeypatch):
    monkeypatch.setattr(engines, "_installed", lambda package: False)
    message = f'backend="{name}" needs the package {package}: {cure}'
    with pytest.raises(RuntimeError, match=re.escape(message)):
        engines.engine(torch.device("cpu"), name)
    assert engines.engine(torch.device("cpu")) is eager


def test_numba_is_for_the_cpu():
    with pytest.raises(RuntimeError, match="runs on the CPU, got tensors on cuda"):
        engines.engine(torch.device("cuda"), "numba")


def test_numba_is_what_the_cpu_gets():
    assert engines.engine(torch.device("cpu")) is compiled


@pytest.mark.parametrize(
    ("grad", "queue", "rho", "message"),
    [
        (torch.ones(3), torch.ones(2, 4), 3.0, "got queue (2, 4) for grad (3,)"),
        (torch.ones(3), torch.ones(0, 3), 3.0, "L >= 1, got queue (0, 3)"),
        (torch.ones(()), torch.ones(()), 3.0, "got queue () for grad ()"),
        (torch.ones(3), torch.ones(2, 3), 0.9, "rho must be a finite number >= 1"),
        (torch.ones(3), torch.ones(2, 3), math.nan, "rho must be a finite number >= 1"),
        (torch.ones(3).long(), torch.ones(2, 3), 3.0, "grad must have a real floating type"),
        (
            torch.ones(3),
            torch.ones(2, 3, dtype=torch.cfloat),
            3.0,
            "queue must have a real floating type",
        ),
        (torch.ones(3), torch.ones(2, 3, device="meta"), 3.0, "grad is on cpu, queue on meta"),
    ],
)
def test_the_law_refuses_what_does_not_fit(grad, queue, rho, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        scarcity_weight(grad, queue, rho=rho)


@both_optimizers
def test_a_loss_must_be_one_number(variant):
    params = small_parameters()
    optimizer = variant.build(params, loss_window=2)
    optimizer.record_loss(1)
    optimizer.record_loss(torch.tensor([2.0], requires_grad=True))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"loss must be one number, got a tensor of shape \(3,\)"):
        optimizer.record_loss(torch.ones(3))
    assert_same(snapshot(optimizer), before)
    without = variant.build(params)
    without.record_loss(1.0)
    assert "losses" not in without.param_groups[0]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("step", torch.Tensor.double, "type torch.float64, not torch.float32"),
        ("queued", torch.Tensor.int, "type torch.int32, not torch.int64"),
        ("queue", lambda entry: entry.to("meta"), "device meta, not cpu"),
    ],
)
def test_an_altered_entry_of_a_state_is_refused(name, change, message):
    """Compiled steps take its address only, and would read or write foreign memory."""
    params = small_parameters()
    optimizer = GQAdamW(params, queue_length=2, min_queue_length=1, backend="torch")
    train(optimizer, params, 3, mixed=False)
    optimizer.state[params[0]][name] = change(optimizer.state[params[0]][name])
    before = values(params)
    with pytest.raises(ValueError, match=f"the state '{name}' .* has {re.escape(message)}: it was"):
        train(optimizer, params, 1, start=3, mixed=False)
    assert_same(values(params), before)


def test_a_gradient_of_another_shape_than_its_parameter_is_refused():
    """A compiled step would write behind the end of the parameter."""
    param = torch.nn.Parameter(torch.randn(5))
    optimizer = GQSGD([param], lr=0.1, queue_length=2, min_queue_length=1, backend="torch")
    param.grad = torch.randn(5)
    param.data = torch.randn(3)
    with pytest.raises(ValueError, match=r"shape of its parameter, got \(5,\) and \(3,\): call"):
        optimizer.step()
