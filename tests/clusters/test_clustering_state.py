"""K-means: determinism, state, the path of a device, errors."""

import copy
import io
import pickle
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gq_triton.engines.eager import lloyd
from gq_triton.grouping import KMeans, kmeans


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fit(x, centers, max_iter=50, tol=0.0, **options):
    model = KMeans(len(centers), init=centers, max_iter=max_iter, tol=tol, **options)
    return model.fit(x)


# ---------------------------------------------------------------- determinism, state


def attributes(model):
    return [
        model.labels_,
        model.cluster_centers_,
        model.cluster_sizes_,
        model.inertia_,
        model.n_iter_,
    ]


def assert_equal_bits(one, other):
    for a, b in zip(attributes(one), attributes(other), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31 - 1), st.integers(1, 9), st.sampled_from([torch.float32, torch.float64])
)
def test_two_fits_are_bitwise_equal(seed, n_clusters, dtype):
    x = normal(seed, 70, 9, dtype=dtype)
    assert_equal_bits(*[KMeans(n_clusters, random_state=seed).fit(x.clone()) for _ in range(2)])


def test_random_state_matters_and_the_global_generators_do_not():
    x = normal(0, 300, 4)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = KMeans(8, random_state=1, max_iter=1).fit(x)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert_equal_bits(first, KMeans(8, random_state=1, max_iter=1).fit(x))
    other = KMeans(8, random_state=2, max_iter=1).fit(x)
    assert not torch.equal(first.cluster_centers_, other.cluster_centers_)


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_resumed_run_continues_bit_for_bit(warm_start, steps):
    batches = [normal(step, 64, 6, dtype=torch.float32) + step / 9 for step in range(6)]
    options = {"max_iter": 2, "warm_start": warm_start}
    model = KMeans(7, random_state=5, **options)
    for batch in batches[:steps]:
        model.fit(batch)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    resumed = KMeans(7, random_state=99, **options).fit(batches[-1])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert hasattr(resumed, "cluster_centers_") == (steps > 0)
    assert not hasattr(resumed, "labels_")
    copies = [resumed, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for batch in batches[steps:]:
        model.fit(batch)
        for other in copies:
            assert_equal_bits(model, other.fit(batch))


def test_state_is_a_snapshot():
    x = normal(0, 40, 3)
    model = KMeans(3).fit(x)
    state = model.state_dict()
    kept = {key: value.clone() for key, value in state.items()}
    model.fit(x + 1)
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    other = KMeans(3)
    other.load_state_dict(state)
    state["cluster_centers"].zero_()
    assert torch.equal(other.cluster_centers_, kept["cluster_centers"])


def test_warm_start_begins_at_the_last_centers_and_cold_start_at_init():
    x, y = normal(0, 90, 3), normal(1, 90, 3)
    start = x[:4].clone()
    warm = fit(x, start, 3).fit(y)
    first = fit(x, start, 3)
    assert_equal_bits(warm, fit(y, first.cluster_centers_, 3))
    assert_equal_bits(fit(x, start, 3, warm_start=False).fit(y), fit(y, start, 3))
    assert int(KMeans(4, max_iter=50).fit(x).fit(x).n_iter_) == 1
    drawn = KMeans(4, max_iter=1, warm_start=False)
    once = drawn.fit(x).cluster_centers_
    assert not torch.equal(once, drawn.fit(x).cluster_centers_)


# ---------------------------------------------------------------- on the device, without waiting


class NoHostReads(TorchDispatchMode):
    """A mode that fails on operations that make the host wait for a CUDA device."""

    forbidden = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.forbidden), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_device(monkeypatch):
    """Run the code for a CUDA device on the CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(lloyd, "_host_may_read", lambda tensor: False)
        yield


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("n_clusters", [1, 6, 50])
def test_device_path_reads_nothing_and_gives_the_same_bits(
    monkeypatch, far, duplicates, n_clusters
):
    x = normal(4, 48, 5, dtype=torch.float32)
    x = x[torch.arange(48) % 9] if duplicates else x
    start = normal(5, n_clusters, 5) + (30.0 if far else 0.0)
    for options in ({"init": start, "tol": 0.0}, {"init": start, "tol": 0.3}, {}):
        eager, device = (KMeans(n_clusters, max_iter=12, **options) for _ in range(2))
        for batch in (x, x * 1.1):
            eager.fit(batch)
            with as_on_a_device(monkeypatch), NoHostReads():
                device.fit(batch)
                device.predict(batch)
            assert_equal_bits(eager, device)


@pytest.mark.parametrize("first", [True, False])
def test_nan_on_a_device_leaves_the_centers_and_sets_a_flag(monkeypatch, first):
    x = normal(0, 20, 3, dtype=torch.float32)
    model = KMeans(2)
    with as_on_a_device(monkeypatch), NoHostReads():
        if not first:
            model.fit(x)
        before = None if first else model.cluster_centers_.clone()
        model.fit(torch.where(torch.arange(60).view(20, 3) == 22, float("nan"), x))
    assert model.nonfinite_
    assert model.labels_.tolist() == [0] * 20
    assert model.cluster_sizes_.tolist() == [20, 0]
    assert model.cluster_centers_.isfinite().all()
    if before is not None:
        assert torch.equal(model.cluster_centers_, before)
        with as_on_a_device(monkeypatch), NoHostReads():
            model.fit(x)
        assert_equal_bits(model, KMeans(2).fit(x).fit(x))
        assert model.nonfinite_  # until somebody has seen it


def test_centers_stay_in_their_memory():
    """A captured graph replays with addresses. One of inference mode cannot be written later."""
    x = normal(0, 40, 3, dtype=torch.float32)
    model = KMeans(3).fit(x)
    place, before = model.cluster_centers_, model.cluster_centers_.clone()
    model.fit(x * 2)
    assert model.cluster_centers_ is place
    assert not torch.equal(place, before)
    model.fit(x.double())
    assert model.cluster_centers_.dtype == torch.float64
    with torch.inference_mode():
        model = KMeans(3).fit(x)
    assert_equal_bits(model.fit(x), KMeans(3).fit(x).fit(x))


def test_tensors_without_data_pass_through(monkeypatch):
    """No value is read and no tensor is made on another device, as a GPU requires."""
    x = torch.empty(32, 5, device="meta")
    frame = lloyd.Frame(x.new_empty(()), x.mean(0))
    start = x[kmeans._plus_plus(x, 4, torch.Generator())]
    centers, n_iter = lloyd.iterate(x, frame.enter(frame.leave(start)), 2, 1e-4)
    labels, _ = lloyd.assign(x, centers)
    assert {tensor.device.type for tensor in (centers, n_iter, labels)} == {"meta"}
    assert labels.dtype == n_iter.dtype == torch.int64
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # knows no meta
    model = KMeans(4, backend="torch").fit(x).fit(x)
    assert {tensor.device.type for tensor in attributes(model)} == {"meta"}


@pytest.mark.slow
def test_lloyd_compiles_to_one_graph():
    x, start = normal(0, 64, 5, dtype=torch.float32), normal(1, 6, 5, dtype=torch.float32)
    start[0] += 40
    compiled = torch.compile(lloyd.iterate, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(x, start, 4, 1e-4), lloyd.iterate(x, start, 4, 1e-4), strict=True
    ):
        assert torch.equal(got, expected)


def test_features_are_detached_and_autocast_has_no_effect():
    x = normal(0, 64, 8, dtype=torch.float32).requires_grad_()
    plain = KMeans(4).fit(x)
    assert not any(tensor.requires_grad for tensor in attributes(plain))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_bits(plain, KMeans(4).fit(x))
    with torch.inference_mode():
        assert_equal_bits(plain, KMeans(4).fit(x))
    strided = torch.stack([x.detach(), x.detach()], 2)[..., 1]
    assert_equal_bits(plain, KMeans(4).fit(strided))
    before = x.detach().clone()
    assert torch.equal(KMeans(4)(x), plain.labels_)
    assert torch.equal(x, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cuda_waits_for_nothing_and_agrees_with_the_cpu(dtype):
    x = (normal(0, 8, 64).repeat(512, 1) + 0.1 * normal(1, 4096, 64)).to(dtype)
    on_gpu = x.cuda()
    state = torch.cuda.get_rng_state()
    models = [KMeans(8), KMeans(8)]
    try:
        torch.cuda.set_sync_debug_mode("error")
        for model in models:
            model.fit(on_gpu)
            model.fit(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal_bits(*models)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    host = KMeans(8).fit(x).fit(x)
    assert torch.equal(host.labels_, models[0].labels_.cpu())
    torch.testing.assert_close(models[0].cluster_centers_.cpu(), host.cluster_centers_)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_nonfinite_features(bad, dtype):
    x = normal(0, 20, 3).to(dtype)
    model = KMeans(2).fit(x)
    before = attributes(model)
    x[7, 1] = bad
    with pytest.raises(ValueError, match="must be finite"):
        model.fit(x)
    with pytest.raises(ValueError, match="must be finite"):
        model.predict(x)
    assert all(a is b for a, b in zip(before, attributes(model), strict=True))
    lenient = KMeans(2, nonfinite="zero").fit(x)
    x[7, 1] = 0
    assert_equal_bits(lenient, KMeans(2).fit(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_clusters": 0}, ValueError, "n_clusters must be >= 1, got 0"),
        ({"n_clusters": 2.0}, TypeError, "float"),
        ({"max_iter": 0}, ValueError, "max_iter must be >= 1, got 0"),
        ({"tol": -1.0}, ValueError, "tol must be finite and >= 0, got -1.0"),
        ({"tol": float("nan")}, ValueError, "tol must be finite"),
        ({"random_state": None}, TypeError, "NoneType"),
        ({"init": "random"}, ValueError, r"init must be 'k-means\+\+'.*'random'"),
        (
            {"init": torch.zeros(3, 2)},
            ValueError,
            r"init must have shape \(2, features\).*\(3, 2\)",
        ),
        ({"init": [[0.0, 1.0], [float("nan"), 0.0]]}, ValueError, "init must be finite"),
        ({"nonfinite": "skip"}, ValueError, "nonfinite must be 'raise' or 'zero', got 'skip'"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        KMeans(**{"n_clusters": 2, **options})


def test_init_takes_arrays_of_any_kind():
    x = normal(0, 30, 2)
    array = [[0, 1], [1, 0]]
    expected = fit(x, torch.tensor(array, dtype=torch.float64))
    for init in (array, np.array(array), torch.tensor(array), torch.tensor(array).half()):
        assert_equal_bits(fit(x, init), expected)


def test_bad_features_and_state():
    x = normal(0, 30, 2)
    model = KMeans(2)
    with pytest.raises(RuntimeError, match="no centres yet"):
        model.predict(x)
    with pytest.raises(TypeError, match=r"floating point, got torch.int64; call .float\(\)"):
        model.fit(torch.zeros(3, 2, dtype=torch.int64))
    for shape in ((3,), (2, 3, 4), (0, 3), (3, 0)):
        with pytest.raises(ValueError, match="shape"):
            model.fit(torch.zeros(shape))
    model.fit(x)
    for call in (model.fit, model.predict):
        with pytest.raises(ValueError, match=r"3 columns but .* have 2; build a new KMeans"):
            call(normal(0, 30, 3))
    KMeans(2, warm_start=False).fit(x).fit(normal(0, 30, 3))
    state = model.state_dict()
    with pytest.raises(ValueError, match="lacks generator"):
        model.load_state_dict({"cluster_centers": None})
    with pytest.raises(ValueError, match=r"must have shape \(3, any\), got \(2, 2\)"):
        KMeans(3).load_state_dict(state)
