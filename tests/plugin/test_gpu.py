# Gradients and labels are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
"""The package end to end on one GPU: the same numbers as on the CPU, and no host wait."""

import io
import json
from typing import Any

import pytest
import torch
from gpu_checks import (
    CLUSTERS,
    EXACT,
    F64,
    LABELS,
    LENGTH,
    LR,
    Twins,
    assert_near,
    batch,
    compare_runs,
    fixed,
    gradients,
    in_bfloat16,
    leaves,
    loss_of,
    model,
    moved,
    no_waiting,
    parameters_of,
    trained,
)
from gpu_rank_checks import ONE_RANK, run_one, two_ranks_on_one_device
from optim_cases import VARIANTS, assert_same, snapshot, values
from torch import Tensor
from train_runs import SCRIPT, torchrun

from gq_triton import GradQueue
from gq_triton.testing import assert_ulps, weight_ulps

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
KINDS = ("sgd-nesterov", "sgd-dampening", "adamw", "adamw-all")
PAIR = ("sgd-nesterov", "adamw")
RHO, SLOTS, STEPS = 3.0, 5, 11
# Steps times lr / (1 - momentum) times rho times the largest gradient: no element moves farther.
REACH = STEPS * 1.0 * RHO * 5


def near(dtype: torch.dtype) -> float:
    """Return the tolerance of a parameter: each weight may be off by some ulps of its size."""
    return weight_ulps(RHO, SLOTS) * torch.finfo(dtype).eps * REACH


FALLING = {"loss_window": 2, "min_queue_length": 2}
NARROW = {"queue_dtype": torch.bfloat16}
CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    *((kind, dtype, {}) for kind in KINDS for dtype in (torch.float32, F64)),
    *((kind, torch.float32, options) for kind in PAIR for options in (FALLING, NARROW)),
]


@pytest.mark.parametrize(("kind", "dtype", "options"), CASES)
def test_optimizers_equal_those_of_the_cpu_in_float64(kind, dtype, options):
    twins = Twins(VARIANTS[kind], (dtype, F64), (DEVICE, "cpu"), **options)
    twins.run(range(STEPS))
    twins.compare(near(dtype))
    law_off = Twins(VARIANTS[kind], (dtype, F64), (DEVICE, "cpu"), rho=1.0)
    law_off.run(range(STEPS))
    left, right = twins.params[0][2], law_off.params[0][2]
    assert float((left - right).detach().abs().max()) > 1e-3, "the law changed nothing"


@pytest.mark.parametrize("kind", PAIR)
def test_match_norm_gives_the_numbers_of_the_cpu(kind):
    twins = Twins(VARIANTS[kind], (F64, F64), (DEVICE, "cpu"), match_norm=True)
    twins.run(range(STEPS))
    # The kernel returns the norms in float32: an error of 2**-24 each, half of it in the root.
    twins.compare(torch.finfo(torch.float32).eps * REACH)


@pytest.mark.parametrize(("rho", "steps"), [(1.0, 8), (RHO, SLOTS)])
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_law_and_in_warm_up_they_are_torchs_optimizers(kind, rho, steps):
    twins = Twins(VARIANTS[kind], (torch.float32,) * 2, (DEVICE, DEVICE), rho=rho)
    twins.optimizers[1] = VARIANTS[kind].plain(twins.params[1], foreach=False)
    twins.optimizers[1].record_loss = lambda loss: None
    twins.run(range(steps))
    for actual, expected in zip(*twins.params, strict=True):
        # Decay, momentum, average and update: four roundings per step, of the size of parameter and
        # gradient, which a fused multiply-add may leave out.
        size = 1 + expected.detach().abs()
        assert_ulps(actual, expected, ulps=4 * steps, scale=size)


@pytest.mark.parametrize("options", [FALLING, NARROW])
@pytest.mark.parametrize("kind", PAIR)
def test_a_saved_state_continues_bit_for_bit(kind, options):
    twins = Twins(VARIANTS[kind], (torch.float32,) * 2, (DEVICE, DEVICE), **options)
    both = twins.params, twins.optimizers
    twins.params, twins.optimizers = [both[0][0]], [both[1][0]]
    twins.run(range(7))
    file = io.BytesIO()
    torch.save(twins.optimizers[0].state_dict(), file)
    file.seek(0)
    both[1][1].load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for source, target in zip(*both[0], strict=True):
            target.copy_(source)
    twins.params, twins.optimizers = both
    twins.run(range(7, STEPS))
    assert_same(*(snapshot(optimizer) for optimizer in twins.optimizers))


@pytest.mark.parametrize("devices", [(DEVICE, "cpu"), ("cpu", DEVICE)])
@pytest.mark.parametrize("kind", PAIR)
def test_a_saved_state_goes_on_on_the_other_device(kind, devices):
    twins = Twins(VARIANTS[kind], (torch.float32,) * 2, devices, loss_window=2)
    twins.run(range(7))
    params = [p.detach().to(devices[1], copy=True).requires_grad_() for p in twins.params[0]]
    loaded = VARIANTS[kind].build(params, loss_window=2)
    loaded.load_state_dict(twins.optimizers[0].state_dict())
    twins.params[1], twins.optimizers[1] = params, loaded
    twins.run(range(7, STEPS))
    kept = [value for state in loaded.state.values() for value in state.values()]
    assert {value.device.type for value in kept} == {devices[1]}
    twins.compare(near(torch.float32))


@pytest.mark.parametrize("place", ["cpu", DEVICE])
@pytest.mark.parametrize("kind", PAIR)
def test_a_learning_rate_may_be_a_tensor_on_either_device(kind, place):
    twins = Twins(VARIANTS[kind], (torch.float32,) * 2, (DEVICE, DEVICE), lr=0.125)
    for group in twins.optimizers[1].param_groups:
        group["lr"] = torch.tensor(0.125, device=place)  # torch's own optimizers accept a tensor
    twins.run(range(SLOTS + 2))
    # Step sizes may be rounded to float32. Updates are of the order of lr.
    twins.compare(1e-6)


def test_a_default_device_changes_nothing():
    """Many scripts call `torch.set_default_device` first."""
    inputs = [batch(step, DEVICE) for step in range(LENGTH + 3)]
    runs = []
    for default in ("cpu", DEVICE):
        module = model(DEVICE, tables=False)
        twins = Twins(VARIANTS["adamw"], (torch.float32,) * 2, (DEVICE, DEVICE))
        with torch.device(default):
            queue = GradQueue(module, n_clusters=3, features="features", queue_length=LENGTH)
            optimizer = torch.optim.SGD(module.parameters(), lr=LR)
            queue.attach(optimizer)
            for part in inputs:
                optimizer.zero_grad()
                loss_of(module, part).backward()
                optimizer.step()
            for param in twins.params[0]:
                param.grad = torch.ones_like(param)
            twins.optimizers[0].step()
        runs.append((values(twins.params[0]), parameters_of(module)))
    assert_same(runs[0][0], runs[1][0])
    # The results are not equal bit for bit: convolutions may add in another order on a GPU.
    assert_near(runs[0][1], runs[1][1], EXACT)


@pytest.mark.parametrize("number", [torch.tensor, float])
@pytest.mark.parametrize("kind", PAIR)
def test_an_optimizer_step_waits_for_nothing(kind, number):
    loss = number(1.0) if number is float else torch.tensor(1.0, device=DEVICE)
    nothing, scale = torch.zeros((), device=DEVICE), torch.full((), 4.0, device=DEVICE)
    for match_norm in (False, True):
        options = {"loss_window": 2, "match_norm": match_norm}
        twins = Twins(VARIANTS[kind], (torch.float32,) * 2, (DEVICE, DEVICE), **options)
        twins.run(range(1))
        params, optimizer = twins.params[0], twins.optimizers[0]
        grads = [[torch.rand_like(p) for p in params] for _ in range(SLOTS + 2)]
        with no_waiting():
            for step, given in enumerate(grads):
                for param, grad in zip(params, given, strict=True):
                    param.grad = grad
                if step > SLOTS:  # set as GradScaler sets it
                    optimizer.grad_scale, optimizer.found_inf = scale, nothing
                optimizer.record_loss(loss)
                optimizer.step()
        assert {int(s["queued"]) for s in optimizer.state.values()} == {1 + len(grads)}


def test_the_plug_in_waits_for_nothing():
    for match_norm in (False, True):
        module = model(DEVICE, torch.float32)
        queue = GradQueue(module, loss_window=2, match_norm=match_norm)
        optimizer = torch.optim.AdamW(module.parameters())
        queue.attach(optimizer)
        batches = [batch(step, DEVICE, torch.float32) for step in range(9)]
        for number, part in enumerate(batches):
            with no_waiting() if number else torch.enable_grad():
                optimizer.zero_grad()
                loss = loss_of(module, part)
                queue.record_loss(loss.detach())
                loss.backward()
                optimizer.step()
        assert set(map(int, queue.state_dict()["queued"].values())) == {len(batches)}


def distance(params: list[Tensor], step: int) -> Tensor:
    return torch.stack([(p - step).square().sum() for p in params]).sum()


@pytest.mark.parametrize("kind", PAIR)
def test_a_scaler_changes_no_number_and_an_overflow_changes_nothing(kind):
    runs = []
    for scaled in (True, False):
        params = [moved(leaf, DEVICE, torch.float32) for leaf in leaves(torch.float32)]
        optimizer = VARIANTS[kind].build(params)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=scaled)
        for step in range(SLOTS + 3):
            if step == SLOTS + 1 and scaled:
                before = snapshot(optimizer)
                scaler.scale(distance(params, step)).backward()
                params[2].grad[7] = torch.inf
                scaler.step(optimizer)
                scaler.update()
                assert_same(snapshot(optimizer), before)
                assert scaler.get_scale() == 2.0**9
            optimizer.zero_grad()
            scaler.scale(distance(params, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(snapshot(optimizer))
    # The scale is a power of two, so results are equal bit for bit.
    assert_same(*runs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["one cluster", "layer"])
def test_the_plug_in_with_a_scaler(name, fused):
    runs = []
    for scaled in (True, False):
        module = model(DEVICE, tables=False)
        queue = GradQueue(module, queue_length=LENGTH, **CLUSTERS[name])
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=scaled)
        queue.attach(optimizer, grad_scaler=scaler)
        for step in range(LENGTH + 3):
            if step == LENGTH + 1 and scaled:
                before = queue.digest(), parameters_of(module)
                scaler.scale(loss_of(module, batch(step, DEVICE))).backward()
                module.mix.weight.grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
                assert_same(parameters_of(module), before[1])
                assert queue.digest() == before[0], "a skipped step was queued"
                assert scaler.get_scale() == 2.0**9
            optimizer.zero_grad()
            scaler.scale(loss_of(module, batch(step, DEVICE))).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(parameters_of(module))
    # AdamW's first steps are the sign of the gradient. So a rounding of 1e-15 in a gradient of 1e-8
    # of the largest counts 1e-7. A scale that is not removed makes a difference of a thousand.
    assert_near(runs[0], runs[1], 1e-6)


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_plug_in_gives_the_numbers_of_the_cpu(name):
    compare_runs((trained(DEVICE, CLUSTERS[name]), trained("cpu", CLUSTERS[name])), EXACT)


@pytest.mark.parametrize("change", ["channels_last", "recomputes"])
@pytest.mark.parametrize("name", ["one cluster", "layer"])
def test_memory_formats_and_recomputed_activations(name, change):
    options, changes = CLUSTERS[name], {change: True}
    compare_runs((trained(DEVICE, options, **changes), trained("cpu", options)), EXACT)


def test_a_compiled_model_gives_the_numbers_of_eager():
    options = CLUSTERS["layer"]
    compare_runs((trained(DEVICE, options, compiles=True), trained(DEVICE, options)), EXACT)


def test_labels_may_come_from_the_host():
    """Clusterers of scikit-learn return such labels."""
    runs = [
        trained(DEVICE, CLUSTERS["layer"] | {"clusterer": clusterer})
        for clusterer in (fixed, lambda features: LABELS)
    ]
    compare_runs((runs[0], runs[1]), EXACT)


@pytest.mark.parametrize("inside", [False, True], ids=["", "backward under autocast"])
@pytest.mark.parametrize("features", ["features", "output_gradient"])
def test_autocast_is_near_float32_and_as_near_as_torchs_own(features, inside):
    options = {"n_clusters": 4, "features": features, "clusterer": fixed}
    module, plain = (model(DEVICE, torch.float32) for _ in range(2))
    queue = GradQueue(module, queue_length=LENGTH, rho=1.0, **options)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    queue.attach(optimizer)
    part = batch(0, DEVICE, torch.float32)
    actual, expected = (in_bfloat16(m, part, inside) for m in (module, plain))
    assert all(grad.dtype == torch.float32 for grad in actual.values())
    # About ten products and normalisations are between the loss and the first layer. Each is
    # rounded to bfloat16, 2**-9, in both runs.
    assert_near(actual, expected, 3e-2)
    plain.zero_grad()
    loss_of(plain, part).backward()
    assert_near(actual, gradients(plain), 6e-2)
    optimizer.step()
    queue = GradQueue(plain, queue_length=LENGTH, **options)
    weighted = torch.optim.SGD(plain.parameters(), lr=LR)
    queue.attach(weighted)
    for step in range(LENGTH + 3):
        grads = in_bfloat16(plain, batch(step, DEVICE, torch.float32), inside)
        assert all(bool(grad.isfinite().all()) for grad in grads.values())
        weighted.step()
    assert set(map(int, queue.state_dict()["queued"].values())) == {LENGTH + 3}
    assert queue.metrics()["mean_weight"] != 1


@pytest.mark.parametrize("name", ["one cluster", "k-means", "k-means, output gradient"])
def test_the_same_bits_again(name, monkeypatch):
    """Convolutions and tables add in the order of arrival without deterministic algorithms."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.use_deterministic_algorithms(True)
        runs = [trained(DEVICE, CLUSTERS[name], dtype=torch.float32) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(*runs)


@pytest.mark.parametrize("name", ONE_RANK)
def test_the_hook_and_fsdp2_in_one_rank(ranks, name):
    ranks(1).run(run_one, name, DEVICE)


def test_the_hook_on_two_ranks_that_share_the_device(ranks):
    ranks(2).run(two_ranks_on_one_device, DEVICE)


def test_training_from_the_command_line(tmp_path):
    options = "--epochs", "1", "--batch-size", "512", "--n-clusters", "4", "--loss-window", "2"
    out = tmp_path / "run"
    code, shown = torchrun(1, SCRIPT, "--device", DEVICE, *options, "--out", out)
    assert code == 0, shown
    summary = json.loads((out / "summary.json").read_text())
    assert summary["device"] == DEVICE
    assert (summary["world_size"], summary["steps"], summary["skipped"]) == (1, 3, 0)
    assert len(summary["queue_digest"]) == 1
    assert 0 < summary["test_accuracy"] <= 1
