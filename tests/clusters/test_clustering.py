# Gradients, layers and labels are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
"""K-means against scikit-learn, against a naive loop, and against its own promises."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans

from gq_triton.engines.eager import lloyd
from gq_triton.grouping import KMeans

quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
seeds = st.integers(0, 2**31 - 1)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blobs(seed, n_samples, n_features, n_clusters, spread=0.3, dtype=torch.float64):
    """Return samples around random centres, and their true labels, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(n_clusters, n_features, generator=generator, dtype=dtype)
    labels = torch.randint(n_clusters, (n_samples,), generator=generator)
    noise = torch.randn(n_samples, n_features, generator=generator, dtype=dtype)
    return centers[labels] + spread * noise, labels


def naive_lloyd(x, centers, max_iter, tol=0.0):
    """Run the oracle, Lloyd's loop with relocation, one sample and one cluster at a time."""
    x, centers = x.double(), centers.double().clone()
    limit = tol * x.var(0, correction=0).mean()
    previous = None
    n_iter = 0
    while n_iter < max_iter:
        n_iter += 1
        squared = (x[:, None] - centers).square().sum(2)
        nearest, labels = squared.min(1)
        owner = labels.clone()
        empty = [k for k in range(len(centers)) if not (labels == k).any()]
        farthest = sorted(range(len(x)), key=lambda b: (-float(nearest[b]), b))
        for k, b in zip(empty, farthest, strict=False):
            if nearest[b] > 1e-15 * x[b].square().sum():
                owner[b] = k
        sizes = torch.bincount(owner, minlength=len(centers))
        new = torch.stack(
            [x[owner == (k if n else sizes.argmax())].mean(0) for k, n in enumerate(sizes)]
        )
        shift = (new - centers).square().sum()
        centers = new
        if (previous is not None and torch.equal(labels, previous)) or shift <= limit:
            break
        previous = labels
    nearest, labels = (x[:, None] - centers).square().sum(2).min(1)
    return labels, centers, nearest.sum(), n_iter


def sklearn_lloyd(x, centers, max_iter, tol=0.0):
    model = SklearnKMeans(
        len(centers), init=centers.numpy(), n_init=1, max_iter=max_iter, tol=tol, algorithm="lloyd"
    )
    with warnings.catch_warnings():  # fewer distinct samples than clusters
        warnings.simplefilter("ignore")
        return model.fit(x.numpy())


def fit(x, centers, max_iter=50, tol=0.0, **options):
    model = KMeans(len(centers), init=centers, max_iter=max_iter, tol=tol, **options)
    return model.fit(x)


def assert_same(model, labels, centers, inertia, scale=1.0, tol=1e-9, names=True):
    """Check for equal labels, centres and inertia; names=False allows another order of clusters."""
    labels, centers = torch.as_tensor(labels).long(), torch.as_tensor(centers)
    ours = model.cluster_centers_
    if names:
        assert torch.equal(model.labels_, labels)
    else:
        together = model.labels_[:, None] == model.labels_
        assert torch.equal(together, labels[:, None] == labels)
        ours, centers = ours[model.labels_], centers[labels]
    torch.testing.assert_close(ours, centers, rtol=tol, atol=tol * scale)
    inertia = torch.as_tensor(inertia, dtype=centers.dtype)
    torch.testing.assert_close(model.inertia_, inertia, rtol=tol, atol=tol * scale**2)


# ---------------------------------------------------------------- the same as scikit-learn


@quick
@given(
    seeds,
    st.integers(1, 8),
    st.integers(8, 120),
    st.integers(1, 12),
    st.integers(1, 30),
    st.sampled_from([0.0, 1e-4, 1e-2]),
)
def test_equals_sklearn(seed, n_clusters, n_samples, n_features, max_iter, tol):
    x, _ = blobs(seed, n_samples, n_features, max(1, n_clusters // 2), spread=0.7)
    start = x[:n_clusters].clone()
    model, other = fit(x, start, max_iter, tol), sklearn_lloyd(x, start, max_iter, tol)
    assert_same(model, other.labels_, other.cluster_centers_, other.inertia_)
    assert int(model.n_iter_) == other.n_iter_


@quick
@given(seeds, st.integers(2, 8), st.integers(1, 7), st.integers(1, 10), st.integers(1, 12))
def test_equals_sklearn_when_clusters_start_empty(seed, n_clusters, n_far, n_features, max_iter):
    x, _ = blobs(seed, 60, n_features, 3)
    start = x[:n_clusters].clone()
    n_far = min(n_far, n_clusters - 1)
    start[:n_far] = 50 + normal(seed + 1, n_far, n_features)  # no sample is nearest to these
    model, other = fit(x, start, max_iter), sklearn_lloyd(x, start, max_iter)
    assert_same(model, other.labels_, other.cluster_centers_, other.inertia_)


@quick
@given(seeds, st.integers(3, 6), st.integers(1, 3), st.integers(1, 8))
def test_equals_sklearn_when_relocation_empties_a_cluster(seed, n_blob, n_features, max_iter):
    # The only sample of cluster 1 is the farthest from its centre, and cluster 2 is empty.
    x = normal(seed, n_blob + 1, n_features) * 0.1
    x[0] += 20
    start = torch.zeros(3, n_features, dtype=x.dtype)
    start[1], start[2] = 30, -500
    model, other = fit(x, start, max_iter), sklearn_lloyd(x, start, max_iter)
    assert_same(model, other.labels_, other.cluster_centers_, other.inertia_)


@quick
@given(
    seeds,
    st.integers(1, 10),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 12),
    st.booleans(),
)
def test_equals_the_naive_loop(seed, n_clusters, n_samples, n_features, max_iter, duplicates):
    x, _ = blobs(seed, n_samples, n_features, 3)
    if duplicates:
        generator = torch.Generator().manual_seed(seed)
        x = x[torch.randint(n_samples, (n_samples,), generator=generator)]
    start = normal(seed + 7, n_clusters, n_features) * 3
    model = fit(x, start, max_iter)
    labels, centers, inertia, n_iter = naive_lloyd(x, start, max_iter)
    assert abs(int(model.n_iter_) - n_iter) <= 1
    # The two samples of a pair are equally far from its centre: rounding says which one moves.
    # Among duplicates such ties may lead to other, equally good, clusters.
    torch.testing.assert_close(model.inertia_, inertia, rtol=1e-9, atol=1e-9)
    if not duplicates:
        assert_same(model, labels, centers, inertia, names=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_are_computed_in_float32(dtype):
    x = blobs(3, 400, 16, 5)[0].to(dtype)
    model = fit(x, x[:5].float())
    assert model.cluster_centers_.dtype == model.inertia_.dtype == torch.float32
    wide = fit(x.double(), x[:5].double())
    assert wide.cluster_centers_.dtype == wide.inertia_.dtype == torch.float64
    assert_same(model, wide.labels_, wide.cluster_centers_.float(), wide.inertia_, tol=2e-6)


def test_digits_as_good_as_sklearn():
    datasets = pytest.importorskip("sklearn.datasets")
    x = torch.from_numpy(datasets.load_digits().data).float()
    ours = [
        float(KMeans(10, max_iter=100, random_state=seed).fit(x).inertia_) for seed in range(10)
    ]
    theirs = [SklearnKMeans(10, n_init=1, random_state=s).fit(x).inertia_ for s in range(10)]
    assert np.mean(ours) < 1.01 * np.mean(theirs)
    assert min(ours) < 1.01 * min(theirs)


# ---------------------------------------------------------------- properties


@quick
@given(seeds, st.integers(1, 8), st.integers(1, 60), st.integers(1, 6))
def test_sizes_labels_and_inertia_agree(seed, n_clusters, n_samples, n_features):
    x = normal(seed, n_samples, n_features, dtype=torch.float32)
    model = KMeans(n_clusters, random_state=seed).fit(x)
    assert model.labels_.shape == (n_samples,)
    assert model.labels_.dtype == model.cluster_sizes_.dtype == model.n_iter_.dtype == torch.int64
    assert model.cluster_centers_.shape == (n_clusters, n_features)
    assert model.inertia_.ndim == model.n_iter_.ndim == 0
    counted = torch.bincount(model.labels_, minlength=n_clusters)
    assert torch.equal(model.cluster_sizes_, counted)
    assert int(model.cluster_sizes_.sum()) == n_samples
    squared = (x.double()[:, None] - model.cluster_centers_.double()).square().sum(2)
    chosen = squared.gather(1, model.labels_[:, None])[:, 0]
    assert (chosen <= squared.amin(1) + 1e-5 * x.double().square().sum(1).max()).all()
    torch.testing.assert_close(model.inertia_.double(), chosen.sum(), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.predict(x), model.labels_)


@quick
@given(seeds, st.integers(1, 8), st.integers(8, 60), st.booleans())
def test_permuted_samples_give_permuted_labels(seed, n_clusters, n_samples, far):
    x, _ = blobs(seed, n_samples, 5, 3)
    start = x[:n_clusters].clone()
    start[0] += 100.0 if far else 0.0  # with relocation, too
    order = torch.randperm(n_samples, generator=torch.Generator().manual_seed(seed))
    model, permuted = fit(x, start), fit(x[order], start)
    assert_same(permuted, model.labels_[order], model.cluster_centers_, model.inertia_)


@quick
@given(seeds, st.floats(-1e4, 1e4), st.integers(-500, 500))
def test_translation_and_scale_change_no_label(seed, offset, exponent):
    x, _ = blobs(seed, 50, 4, 3)
    start = x[:5].clone()
    start[0] += 100.0
    model = fit(x, start)
    moved = fit(x + offset, start + offset)
    centers = model.cluster_centers_ + offset
    assert_same(moved, model.labels_, centers, model.inertia_, scale=1 + abs(offset), tol=1e-8)
    scale = 2.0**exponent
    scaled = fit(x * scale, start * scale)
    assert torch.equal(scaled.labels_, model.labels_)
    assert torch.equal(scaled.cluster_centers_, model.cluster_centers_ * scale)
    assert torch.equal(scaled.inertia_, model.inertia_ * scale**2)
    random = KMeans(5, random_state=seed).fit(x).labels_
    assert torch.equal(KMeans(5, random_state=seed).fit(x * scale).labels_, random)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3e38])
def test_extreme_float32_features_stay_finite(scale):
    x = torch.tensor([[1.0], [0.9], [-1.0], [-0.8]]) * scale
    model = KMeans(2).fit(x)
    assert model.cluster_centers_.isfinite().all()
    labels = model.labels_
    assert labels[0] == labels[1] != labels[2] == labels[3]
    frame = lloyd.Frame(torch.tensor(2.0**-10), torch.zeros(1))
    assert lloyd.assign(x / scale, frame.enter(model.cluster_centers_))[1].isfinite().all()
    model.fit(x / scale * 1e-3)  # from centres that may be far outside
    model.fit(x / scale * 1e-3)
    assert model.cluster_centers_.isfinite().all()
    assert model.labels_[0] == model.labels_[1] != model.labels_[2] == model.labels_[3]


@pytest.mark.slow
@quick
@given(seeds, st.integers(1, 8), st.booleans())
def test_inertia_never_rises(seed, n_clusters, far):
    x, _ = blobs(seed, 80, 3, 4)
    start = normal(seed + 3, n_clusters, 3) + (50.0 if far else 0.0)
    inertia = torch.stack([fit(x, start, n).inertia_ for n in range(1, 12)])
    assert (inertia.diff() <= 1e-12 * inertia[0]).all()


@quick
@given(seeds, st.integers(1, 12), st.integers(1, 5), st.integers(1, 40))
@example(2032, 4, 5, 38)  # two centres equal but for the rounding of a mean
def test_fewer_distinct_samples_than_clusters(seed, n_clusters, n_distinct, n_samples):
    distinct = normal(seed, n_distinct, 7, dtype=torch.float32)
    pick = torch.randint(n_distinct, (n_samples,), generator=torch.Generator().manual_seed(seed))
    n_distinct = len(pick.unique())
    for model in (
        KMeans(n_clusters, random_state=seed),
        KMeans(n_clusters, init=(normal(seed, n_clusters, 7) * 2).tolist(), max_iter=30),
    ):
        for _ in range(2):  # the second from the first's repeated centres
            labels = model(distinct[pick])
            assert model.cluster_centers_.isfinite().all()
            assert int(model.cluster_sizes_.sum()) == n_samples
            for which in pick.unique():
                assert len(labels[pick == which].unique()) == 1
            assert int((model.cluster_sizes_ > 0).sum()) <= min(n_clusters, n_distinct)
            # scikit-learn's criterion may end a fit right after a relocation; seeds are distinct.
            if isinstance(model.init, str):
                assert int((model.cluster_sizes_ > 0).sum()) == min(n_clusters, n_distinct)
                assert n_clusters < n_distinct or float(model.inertia_) <= 1e-9


@pytest.mark.parametrize("n_samples", [1, 2, 7])
def test_equal_samples_are_one_cluster(n_samples):
    x = torch.full((n_samples, 3), 0.1)
    model = KMeans(4).fit(x)
    assert model.labels_.tolist() == [0] * n_samples
    assert model.cluster_sizes_.tolist() == [n_samples, 0, 0, 0]
    torch.testing.assert_close(model.cluster_centers_, x[:1].expand(4, 3))
    assert float(model.inertia_) == 0


def test_ties_take_the_lowest_label_and_the_lowest_index():
    x = torch.tensor([[-1.0], [0.0], [1.0]])
    assert fit(x, torch.tensor([[-1.0], [1.0]]), 1).labels_.tolist()[0::2] == [0, 1]
    assert lloyd.assign(x, torch.tensor([[-1.0], [1.0]]))[0].tolist() == [0, 0, 1]
    assert lloyd.assign(x, torch.tensor([[9.0], [2.0], [2.0]]))[0].tolist() == [1, 1, 1]
    # Both ends are equally far from the one centre that has samples: the lower index moves.
    assert fit(x, torch.tensor([[0.0], [99.0]]), 1).labels_.tolist() == [1, 0, 0]
