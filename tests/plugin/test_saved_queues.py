"""Altered saved states: the plug-in and the DDP hook refuse those that no run could save."""

import pytest
import torch
from altered import REMOVED, check_door, is_dense
from drawn import fuzz_door
from torch import nn

from gq_triton import GradQueue
from gq_triton.grouping.kmeans import KMeans
from gq_triton.options import LawOptions
from gq_triton.queues import Queues

LENGTH, WINDOW = 2, 2


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh())


def possible_queue(params):
    """Return a function that tells whether a run of the same model could have saved a value.

    The rings have the shape of their parameter and a type that a queue may have. They are finite,
    because a gradient that is not is never queued, and others are clamped to that type.
    The counters are at least 0 and below 2**53, which float64 holds exactly. A loss may be any
    number.
    """

    def possible(path, value):
        match path:
            case ("queue", name) if name in params:
                shape = LENGTH, *params[name].shape
                return is_dense(value, shape) and bool(value.isfinite().all())
            case ("queued", name) if name in params:
                return is_dense(value, (), (torch.int64,)) and 0 <= int(value) < 2**53
            case ("losses",):
                shape = (LENGTH + WINDOW - 1,)
                return value is None or is_dense(value, shape, (torch.float32, torch.float64))
        return False

    return possible


def steps(model, optimizer, queue, count, start=0):
    for step in range(start, start + count):
        inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        queue.record_loss(loss)
        optimizer.step()


def plugin(**options):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    queue = GradQueue(
        model, queue_length=LENGTH, min_queue_length=1, loss_window=WINDOW, backend="torch",
        **options,
    )  # fmt: skip
    queue.attach(optimizer)
    steps(model, optimizer, queue, 4)
    return model, optimizer, queue


def test_every_altered_leaf_of_the_plug_ins_state_is_refused_or_possible():
    model, optimizer, queue = plugin()
    params = dict(model.named_parameters())
    state = queue.state_dict()
    possible = possible_queue(params)

    def go_on():
        steps(model, optimizer, queue, 1)
        for name, ring in queue.state_dict()["queue"].items():
            assert ring.shape == (LENGTH, *params[name].shape)
            assert ring.dtype == params[name].dtype
            assert ring.is_contiguous()

    taken, refused = check_door(state, queue.load_state_dict, possible, queue.digest, go_on)
    assert taken > 40
    assert refused > 200


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"n_clusters": 2, "features": "0"}])
def test_the_plug_ins_state_with_drawn_alterations_is_refused_or_goes_on(options):
    model, optimizer, queue = plugin(**options)

    def go_on():
        centers = queue.state_dict().get("clusters", {}).get("cluster_centers")
        if centers and len(centers[0]) != 2:
            # How many features a sample has is not known before the next forward pass.
            with pytest.raises(ValueError, match="features have 2 columns but the centres"):
                steps(model, optimizer, queue, 1)
        else:
            steps(model, optimizer, queue, 1)

    fuzz_door(
        queue.state_dict(),
        queue.load_state_dict,
        lambda: (queue.digest(), str(queue.state_dict().get("clusters"))),
        go_on,
    )


def possible_clusters(n_clusters, path, value):
    """Return whether a value of the saved clusters is possible.

    Centres are finite, one per cluster, with any one number of features.
    """
    match path:
        case ():
            return value is REMOVED or value == {}
        case ("cluster_centers",):
            return (
                isinstance(value, (list, tuple))
                and len(value) == n_clusters
                and all(isinstance(row, list) and len(row) == 2 for row in value)
            )
        case ("cluster_centers", int()):
            return value == (1, 2)
        case ("cluster_centers", int(), int()):
            real = isinstance(value, (int, float)) and not isinstance(value, bool)
            return real and abs(value) < 1e38
        case ("dtype",):
            return value in ("float32", "float64")
    return False


def test_every_altered_leaf_of_the_saved_clusters_is_refused_or_possible():
    model, optimizer, queue = plugin(n_clusters=2, features="0")

    def possible(path, value):
        return possible_clusters(2, path[1:], value)

    check_door(
        queue.state_dict(),
        queue.load_state_dict,
        possible,
        lambda: (queue.digest(), str(queue.state_dict()["clusters"])),
        lambda: steps(model, optimizer, queue, 1),
        where=lambda path: path[0] == "clusters",
    )


def test_every_altered_leaf_of_a_saved_kmeans_is_refused_or_possible():
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    kmeans = KMeans(2, max_iter=2).fit(features)
    own = kmeans.state_dict()["generator"]

    def possible(path, value):
        match path:
            case ("cluster_centers",):
                types = torch.float32, torch.float64
                right = is_dense(value, (2, 3), types) and bool(value.isfinite().all())
                return value is None or right
            case ("generator",):
                return is_dense(value, own.shape, (torch.uint8,)) and torch.equal(value, own)
        return False

    def fingerprint():
        return str({name: value.tolist() for name, value in kmeans.state_dict().items()})

    load = kmeans.load_state_dict
    check_door(kmeans.state_dict(), load, possible, fingerprint, lambda: kmeans.fit(features))


@pytest.mark.slow
def test_a_saved_kmeans_with_drawn_alterations_is_refused_or_goes_on():
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    kmeans = KMeans(2, max_iter=2).fit(features)

    def fingerprint():
        return str({name: value.tolist() for name, value in kmeans.state_dict().items()})

    # Features of the type and number that the centres now have.
    def go_on():
        like = getattr(kmeans, "cluster_centers_", features)
        kmeans.fit(torch.randn(8, like.shape[1], dtype=like.dtype))

    fuzz_door(kmeans.state_dict(), kmeans.load_state_dict, fingerprint, go_on)


@pytest.mark.parametrize("left", [2, 600, 624])
def test_a_generator_that_would_read_past_its_numbers_is_refused(left):
    """Torch accepts any two counts up to 624: how many numbers are left, and which is next."""
    kmeans = KMeans(2)
    state = kmeans.state_dict()
    state["generator"][8:12] = torch.tensor([left % 256, left // 256, 0, 0], dtype=torch.uint8)
    state["generator"][16:18] = torch.tensor([624 % 256, 624 // 256], dtype=torch.uint8)
    with pytest.raises(ValueError, match="generator must be the state of a random number"):
        kmeans.load_state_dict(state)


def test_every_state_that_a_generator_takes_on_is_accepted():
    kmeans = KMeans(2)
    for _ in range(700):
        torch.rand((), generator=kmeans._generator)
        kmeans.load_state_dict(kmeans.state_dict())


def test_views_of_rings_follow_their_memory():
    """Views are kept from step to step: another ring, and other memory of a ring, have new ones."""
    queues = Queues({"w": nn.Parameter(torch.ones(2, 3))}, LawOptions(queue_length=LENGTH))
    queues.init_state()
    ring = queues.state_dict()["queue"]["w"]

    def shown():
        return queues._flat_rings(["w"])[0][0]

    assert shown() is shown()
    ring.data = torch.ones_like(ring)
    assert torch.equal(shown(), torch.ones(LENGTH, 6))
    saved = queues.state_dict()
    saved["queue"]["w"] = torch.full_like(ring, 2.0)
    queues.load_state_dict(saved)
    assert torch.equal(shown(), torch.full((LENGTH, 6), 2.0))
