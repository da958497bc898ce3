"""Models as users write them: every gradient is that of one backward pass per cluster."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from zoo import Case
from zoo_oracle import WHOLE, judge

from gq_triton import GradQueue

WIDTH, LENGTH = 6, 5


class Model(nn.Module):
    """The forward pass of a function, which gets the model and its arguments."""

    def __init__(self, within, **members):
        super().__init__()
        self.enter, self.within = nn.Linear(WIDTH, WIDTH), within
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *args, **kwargs):
        return self.within(self, *args, **kwargs)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return 2 * weight

    @staticmethod
    def backward(ctx, *grads):
        return 2 * grads[0]


class Hidden(nn.Linear):
    """A layer whose operations hide its weight, so that it runs again."""

    def forward(self, input):
        return F.linear(input, Doubled.apply(self.weight), self.bias)


class Listed(Model):
    def __init__(self, within):
        super().__init__(within)
        self.weights = nn.ParameterList([torch.randn(WIDTH, WIDTH) for _ in range(2)])
        self.biases = nn.ParameterDict({"a": torch.randn(WIDTH), "b": torch.randn(WIDTH)})


def sequences(size, samples):
    return {"x": torch.randn(samples, LENGTH, WIDTH)}


def pooled(model, x):
    return model.head(model.enter(x).relu().mean(1))


def listed(model, x):
    x = model.enter(x)
    for weight, bias in zip(model.weights, model.biases.values(), strict=True):
        x = (x @ weight + bias).tanh()
    return x


def last_state(model, x):
    return model.head(model.core(model.enter(x))[1][0][-1])


def stacked(model, x):
    state, states = model.enter(x[:, 0]), []
    for step in x.unbind(1):
        state = (model.core(state) + step).tanh()
        states.append(state)
    return model.head(torch.stack(states)).transpose(0, 1)


def scaled_call(model, x):
    given = {name: param * model.scale for name, param in model.core.named_parameters()}
    return model.enter(functional_call(model.core, given, (x,)).tanh())


def two_views(model, x, y):
    views = model.core(torch.cat([model.enter(x), model.enter(y)]))
    return torch.cat(views.chunk(2), dim=1)


def flat_positions(model, x):
    rows = model.core(model.enter(x).flatten(0, 1))
    return rows.unflatten(0, (-1, LENGTH))


def mask_first(model, mask, x):
    return model.head(mask @ model.enter(x))


def one_number(model, x):
    return (model.enter(x).mean((1, 2)) * model.scale.exp().expand(len(x))).unsqueeze(1)


def linear(outputs=WIDTH):
    return nn.Linear(WIDTH, outputs)


def core(kind=nn.Linear):
    return nn.Sequential(kind(WIDTH, WIDTH), nn.ReLU(), kind(WIDTH, WIDTH))


def view_pairs(size, samples):
    return {"x": torch.randn(samples, WIDTH), "y": torch.randn(samples, WIDTH)}


def masked(size, samples):
    return {"mask": torch.rand(LENGTH, LENGTH), **sequences(size, samples)}


# By name: the model, its inputs, the layer of the features, the batch, and whether strict passes.
CASES = {
    "parameters in lists": (lambda: Listed(listed), sequences, "enter", 4),
    "width of the batch, pooled": (lambda: Model(pooled, head=linear(3)), sequences, "enter", 6),
    "width of the batch, made weights": (
        lambda: nn.Sequential(*[nn.utils.parametrizations.orthogonal(linear()) for _ in range(3)]),
        lambda size, samples: {"input": torch.randn(samples, WIDTH)}, "0", 6,
    ),
    "width of the batch, run again": (
        lambda: Model(lambda model, x: model.core(model.enter(x)), core=core(Hidden)),
        sequences, "enter", 6,
    ),
    "last state": (
        lambda: Model(last_state, core=nn.LSTM(WIDTH, WIDTH, batch_first=True), head=linear(3)),
        sequences, "enter", 3,
    ),
    "states stacked by time": (
        lambda: Model(stacked, core=linear(), head=linear(3)), sequences, "enter", 4,
    ),
    "features of two views": (lambda: Model(two_views, core=core()), view_pairs, "core.0", 4),
    "features of positions": (lambda: Model(flat_positions, core=core()), sequences, "core", 4),
    "samples in the second argument": (
        lambda: Model(mask_first, head=linear(3)), masked, "enter", 4,
    ),
    "a number for each sample": (
        lambda: Model(one_number, scale=nn.Parameter(torch.ones(()))), sequences, "enter", 4,
    ),
}  # fmt: skip


def case(build, inputs, features):
    return Case("", "", lambda size: build(), inputs, lambda output: [output], features=features)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_known_by_cluster(name):
    build, inputs, features, samples = CASES[name]
    verdict = judge(case(build, inputs, features), samples, backend="torch", strict=True)
    assert verdict.problems() == []
    assert WHOLE not in verdict.tiers.values()


def test_a_call_with_other_tensors_in_place_of_parameters():
    def build():
        return Model(scaled_call, core=linear(), scale=nn.Parameter(torch.ones(())))

    verdict = judge(case(build, sequences, "enter"), backend="torch")
    assert verdict.problems() == []
    whole = {name for name, tier in verdict.tiers.items() if tier == WHOLE}
    assert whole == {"core.weight", "core.bias", "scale"}


def graphs(size, samples):
    """Return nodes of graphs of unequal size; they happen to be a multiple of the graphs."""
    sizes = torch.tensor([3 + (graph % 2) * 2 for graph in range(samples)])
    graph = torch.arange(samples).repeat_interleave(sizes)
    return {"x": torch.randn(len(graph), WIDTH), "graph": graph, "of": torch.zeros(samples)}


def test_nodes_are_not_taken_for_rows_of_graphs():
    def within(model, x, graph, of):
        sums = of.new_zeros(len(of), WIDTH)
        return model.head(sums.index_add(0, graph, model.enter(x).relu()))

    verdict = judge(case(lambda: Model(within, head=linear()), graphs, "head"), backend="torch")
    assert verdict.problems() == []
    assert verdict.tiers["enter.weight"] == WHOLE


def shuffled(model, x):
    there, back = model.order, model.order.argsort()
    rows = model.enter(x)[there]
    rows = rows.transpose(0, 1) if model.second else rows
    attends = isinstance(model.core, nn.MultiheadAttention)
    out = model.core(*[rows] * (3 if attends else 1))[0]
    return (out.transpose(0, 1) if model.second else out)[back]


def groups_of_all(model, x):
    rows = model.enter(x).transpose(0, 1).flatten(0, 1)[:, None]
    return model.core(rows)[0].unflatten(0, (LENGTH, -1))[:, :, 0].transpose(0, 1)


def packed(model, x):
    lengths = [4, 4, 2, 2]  # time steps and rows are multiples of the samples
    rows = nn.utils.rnn.pack_padded_sequence(model.enter(x)[:, :4], lengths, batch_first=True)
    out = nn.utils.rnn.pad_packed_sequence(model.core(rows)[0], batch_first=True)
    return out[0]


@pytest.mark.parametrize(("within", "core", "second"), [
    (shuffled, lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True), False),
    (shuffled, lambda: nn.GRU(WIDTH, WIDTH), True),
    (shuffled, lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True), False),
    (groups_of_all, lambda: nn.GRU(WIDTH, WIDTH, batch_first=True), False),
    (packed, lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True), False),
])  # fmt: skip
def test_layers_of_torch_are_not_believed_to_see_rows_in_order(within, core, second):
    def build():
        model = Model(within, core=core())
        model.order, model.second = torch.tensor([2, 0, 3, 1]), second
        return model

    verdict = judge(case(build, sequences, "enter"), backend="torch")
    assert verdict.problems() == []
    tiers = {tier for name, tier in verdict.tiers.items() if name.startswith("core.")}
    assert tiers == {WHOLE}


def trained(model, batch, features="head", steps=2):
    queue = GradQueue(model, n_clusters=2, features=features)
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            model(batch).square().mean().backward()
    return queue.report()


def test_a_list_with_a_tensor_for_each_sample():
    """Rows of such a tensor are not samples, even where there are as many."""

    def within(model, samples):
        return model.head(torch.stack([model.enter(x).mean(0) for x in samples]))

    for rows in (4, 8):
        report = trained(Model(within, head=linear()), list(torch.randn(4, rows, WIDTH)))
        assert report["enter.weight"].startswith("whole batch")
    assert report["head.weight"] == "clusters (Linear)"


def test_the_batch_may_be_an_object():
    def within(model, batch):
        sums = torch.zeros(batch.graphs, WIDTH)
        return model.head(sums.index_add(0, batch.nodes["graph"], model.enter(batch.nodes["x"])))

    nodes = graphs(None, 4)
    report = trained(Model(within, head=linear()), SimpleNamespace(nodes=nodes, graphs=4))
    assert report["enter.weight"].startswith("whole batch")

    batch = SimpleNamespace(**sequences(None, 4))
    report = trained(Model(lambda model, batch: model.enter(batch.x)), batch, "enter")
    assert report["enter.weight"] == "clusters (Linear)"
