# Gradients are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
"""Modules whose shapes or in-place operations mislead: a gradient is never by cluster and wrong."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from cluster_cases import cluster_means
from torch import nn
from torch.utils.checkpoint import checkpoint

from gq_triton import GradQueue, reference

F64 = torch.float64
SAMPLES, WIDTH, STEPS = 6, 8, 4
LABELS = torch.arange(SAMPLES) % 3


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=F64))


class Model(nn.Module):
    """Features, ``within`` on the parameters that ``shapes`` names, and a head."""

    def __init__(self, within, shapes, **modules):
        super().__init__()
        self.features, self.head = nn.Linear(3, WIDTH, dtype=F64), nn.Linear(WIDTH, 2, dtype=F64)
        self.within = within
        for name, shape in shapes.items():
            setattr(self, name, parameter(*shape))
        for name, module in modules.items():
            self.add_module(name, module.to(F64))

    def forward(self, x):
        return self.head(self.within(self, self.features(x)))


def check(model, length=5, of_twin=lambda twin: None):
    """Compare every gradient with what ``report()`` says of it; return the report."""
    twin = copy.deepcopy(model)
    of_twin(twin)
    queue = GradQueue(model, n_clusters=3, features="features", clusterer=lambda _: LABELS,
                      queue_length=3)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = queue.attach(optimizer)
    rings = {name: reference.Ring(3) for name, _ in model.named_parameters()}
    report = {}
    for _ in range(STEPS):
        x = torch.randn(SAMPLES, length, 3, dtype=F64)

        def losses(model, x=x):
            torch.manual_seed(7)
            return (model(x) - 1).square().flatten(1).mean(1)

        means, sizes = cluster_means(twin, losses(twin), LABELS, 3)
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses(model).mean().backward()
        optimizer.step()
        report = queue.report()
        for name, param in model.named_parameters():
            values, counts = means[name], sizes
            raw = values.mean(0)  # clusters of one size
            if report[name].startswith("whole"):
                values, counts = raw[None], [SAMPLES]
            expected = reference.cluster_gradient(values, counts, rings[name].newest())
            rings[name].push(raw)
            error = (param.grad - expected).norm() / expected.norm().clamp_min(1e-12)
            assert error < 1e-9, f"{name}, {report[name]}: {float(error):.1e}"
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, twin.get_buffer(name))
    handle.remove()
    return report


def scaled_in_place(model, x):
    weight = model.a.clone()
    weight.mul_(2)
    rows = model.b.clone()
    rows[1:].mul_(3)
    return x * weight + x * rows


def samples_written_into(model, x):
    joined = model.token.expand(len(x), -1, -1).clone()
    joined[:, :, :4] = x[:, :1, :4]
    more = model.token.expand(len(x), 5, -1).clone()
    more.add_(x)
    more += x
    return x + joined + more


def looked_up_and_changed(model, x):
    rows = model.table(torch.arange(5))
    rows *= 2
    return x + rows


@pytest.mark.slow
@pytest.mark.parametrize("model", [
    lambda: Model(scaled_in_place, {"a": (WIDTH,), "b": (5, WIDTH)}),
    lambda: Model(samples_written_into, {"token": (1, 1, WIDTH)}),
    lambda: Model(looked_up_and_changed, {}, table=nn.Embedding(7, WIDTH)),
])  # fmt: skip
def test_a_parameter_changed_in_place_is_not_followed(model):
    torch.manual_seed(0)
    report = check(model())
    assert report["features.weight"].startswith("clusters")


def test_a_number_taken_from_a_parameter_without_gradient_is_a_constant():
    def within(model, x):
        with torch.no_grad():
            size = model.scale.abs().mean(0, keepdim=True)
            model.scale.clamp_(-1, 1)
        return x / size * model.scale

    torch.manual_seed(0)
    assert check(Model(within, {"scale": (WIDTH,)}))["scale"].startswith("clusters")


def test_tensors_made_of_parameters_are_not_samples_whatever_their_rows():
    def within(model, x):
        some = dict(model.named_parameters())["some.0"]  # which no stand-in stands for
        weight = model.scale * some.tanh() * 2  # (B, WIDTH), from no sample
        keys = model.norm(model.project(some))
        return x @ (weight.mT @ weight) + keys.tanh().sum(0)

    torch.manual_seed(0)
    some = nn.ParameterList([parameter(SAMPLES, WIDTH)])
    layers = {"project": nn.Linear(WIDTH, WIDTH), "norm": nn.LayerNorm(WIDTH)}
    report = check(Model(within, {"scale": (WIDTH,)}, some=some, **layers))
    for name in ("scale", "project.weight", "norm.weight"):
        assert report[name].startswith("whole batch")


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("length", [SAMPLES, 2 * SAMPLES])
def test_as_many_positions_as_samples_do_not_hide_time_major_rows(length, heads):
    def within(model, x):
        x = x + model.first(x * model.scale)  # in the order of the samples
        rows = x.transpose(0, 1).reshape(len(x[0]), len(x) * heads, -1)
        rows = model.norm(rows * model.inner)
        state = model.recurrent(rows)[0]
        x = model.out(rows + state).view(len(x[0]), len(x), -1).transpose(0, 1)
        return model.last(x)

    torch.manual_seed(0)
    width = WIDTH // heads
    layers = {"norm": nn.LayerNorm(width), "recurrent": nn.RNN(width, width),
              "out": nn.Linear(width, width), "first": nn.Linear(WIDTH, WIDTH),
              "last": nn.LayerNorm(WIDTH)}  # fmt: skip
    shapes = {"inner": (width,), "scale": (WIDTH,)}
    model = Model(within, shapes, **layers)
    if heads == 2:  # a recurrent layer sees samples times heads
        del model.recurrent
        model.recurrent = lambda rows: (rows.tanh(),)
    report = check(model, length)
    for name in ("first.weight", "scale", "last.weight", "features.weight", "head.weight"):
        assert report[name].startswith("clusters"), name
    assert report["inner"].startswith("whole batch")
    for name in ("norm.weight", "out.weight"):  # the graph shows which dimension has the samples
        assert report[name].startswith("clusters" if heads == 1 else "whole batch"), name


def test_running_statistics_are_written_to_once():
    def within(model, x):
        y = F.batch_norm(x.mT, model.mean, model.var, model.scale, model.shift, True)
        return x + y.mT

    torch.manual_seed(0)
    model = Model(within, {"scale": (WIDTH,), "shift": (WIDTH,)})
    model.register_buffer("mean", torch.zeros(WIDTH, dtype=F64))
    model.register_buffer("var", torch.ones(WIDTH, dtype=F64))
    twin, x = copy.deepcopy(model), torch.randn(SAMPLES, 5, 3, dtype=F64)
    queue = GradQueue(model, n_clusters=3, features="features")
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for one in (model, twin):
        one(x).square().mean().backward()
    assert torch.equal(model.mean, twin.mean)
    assert torch.equal(model.var, twin.var)
    assert queue.report()["scale"].startswith("clusters")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_module_may_checkpoint_a_part_of_its_own_forward(reentrant):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.reentrant = parameter(WIDTH), reentrant
            self.inner = nn.Linear(WIDTH, WIDTH, dtype=F64)

        def part(self, x):
            return self.inner(self.inner(x)) * self.scale.exp()

        def forward(self, x):
            if self.reentrant is None:
                return x + self.part(x)
            return x + checkpoint(self.part, x, use_reentrant=self.reentrant)

    def plain(model):
        model.block.reentrant = None  # torch.autograd.grad refuses a reentrant checkpoint

    torch.manual_seed(0)
    report = check(Model(lambda model, x: model.block(x), {}, block=Block()), of_twin=plain)
    how = "whole batch" if reentrant else "clusters (Block run again)"
    assert report["block.scale"].startswith(how)


class Listed(nn.Module):
    """A module without stand-ins, which runs again from the second step on."""

    def __init__(self, how):
        super().__init__()
        self.some = nn.ParameterList([parameter(WIDTH), parameter(WIDTH, WIDTH)])
        self.how = how

    @property
    def plain(self):
        """The parameters themselves, not what stands for them."""
        return list(self.some.parameters())

    def forward(self, x):
        return self.how(self, x)


@pytest.mark.parametrize(("how", "after"), [
    (lambda block, x: (F.relu_(x) * block.plain[0]) @ block.plain[1], lambda x: x),
    (lambda block, x: F.dropout((x.transpose(0, 1) * block.plain[0]) @ block.plain[1], 0.2),
     lambda x: x.transpose(0, 1)),
])  # fmt: skip
def test_a_module_that_cannot_run_again_is_taken_as_one_cluster(how, after):
    torch.manual_seed(0)
    model = Model(lambda model, x: after(model.block(x * 1)), {}, block=Listed(how))
    report = check(model, length=2 * SAMPLES)
    assert report["block.some.0"].startswith("whole batch")


def test_every_batch_shows_whether_a_module_may_run_in_parts():
    """An expert of limited capacity drops samples only where too many are sent to it."""

    def how(block, x):
        y = (x * block.plain[0]) @ block.plain[1]
        return y - y.mean(0) if block.mixes else y

    torch.manual_seed(0)
    block = Listed(how)
    block.mixes = False
    # The layers before the block see samples that depend on each other, so they do not train.
    model = Model(lambda model, x: model.block(x.detach()), {}, block=block)
    x = torch.randn(SAMPLES, 5, 3, dtype=F64)
    queue = GradQueue(model, n_clusters=3, features="features", clusterer=lambda _: LABELS)
    sums = {}
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    sink = queue._clusters.accumulator._sink
    take = sink.take

    def taken(name, groups, blocks, dtype):
        blocks = list(blocks)
        sums[name] = torch.cat([block[2].clone() for block in blocks], 1)
        return take(name, groups, iter(blocks), dtype)

    sink.take = taken
    for mixes in (False, False, True):
        block.mixes = mixes
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = (model(x) - 1).square().flatten(1).mean(1)
            losses.mean().backward()
    assert queue.report()["block.some.1"] == "clusters (Listed run again)"
    queue._clusters.uninstall()
    losses = (model(x) - 1).square().flatten(1).mean(1) / SAMPLES
    for k in range(3):
        (expected,) = torch.autograd.grad(losses[k == LABELS].sum(), [block.some[1]],
                                          retain_graph=True)  # fmt: skip
        torch.testing.assert_close(sums["block.some.1"][k].view_as(expected), expected)


def test_a_weight_that_a_hook_computes_does_not_stop_the_training():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH, dtype=F64))
    model = Model(lambda model, x: x, {})
    model.block = nn.Sequential(layer, nn.ReLU())
    model.within = lambda model, x: model.block(x)
    x = torch.randn(SAMPLES, 5, 3, dtype=F64)
    queue = GradQueue(model, n_clusters=3, features="features", clusterer=lambda _: LABELS)
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(x).square().mean().backward()
    assert queue.report()["block.0.weight_g"] == "clusters (Sequential run again)"


@pytest.mark.filterwarnings("ignore:weighted without clusters")
def test_parts_of_parameters_that_met_other_rows_than_the_samples():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.features = nn.Linear(3, WIDTH), nn.Identity()
            self.matrix, self.shift = parameter(2 * WIDTH, WIDTH), parameter(1, 9, WIDTH)
            self.kernel = parameter(9, WIDTH, 3)

        def forward(self, x):
            x = self.enter(x)
            self.features(x[:4])  # four samples are clustered
            x = F.linear(x, self.matrix[:WIDTH]) + self.shift[:, : x.shape[1]]
            x = torch.einsum("bte,ef->btf", x, self.matrix[WIDTH:])
            return F.conv1d(x.mT, self.kernel[:WIDTH])

    torch.manual_seed(0)
    model, x = Parts().to(F64), torch.randn(SAMPLES, 5, 3, dtype=F64)
    plain = torch.autograd.grad(model(x).square().mean(), [*model.parameters()])
    queue = GradQueue(model, n_clusters=2, features="features")
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    model(x).square().mean().backward()
    for param, grad in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(param.grad, grad)
    assert all(how.startswith("whole batch") for how in queue.report().values())
    assert f"4 rows, and the model was given {SAMPLES} rows" in queue.report()["matrix"]
