# Gradients and reports are there after a backward pass, whatever their types say.
# pyright: reportArgumentType=false
"""Rows of samples in other orders, shown by the graph: against K backward passes."""

import pytest
import torch
from cluster_cases import Judge
from torch import nn

from gq_triton.cluster_grad.layers.order import JOINED, SECOND, in_order, other_order

F64 = torch.float64
LABELS = torch.tensor([0, 2, 2, 0, 4, 0, 0, 2, 2])
B, WIDTH = 9, 8


def square(model, batch):
    return (model(batch) - 1).square().flatten(1).mean(dim=1)


def judged(model, batches, strict=True):
    judge = Judge(model.to(F64), LABELS, 5, strict=strict)
    judge.steps(square, batches)
    return judge.queue.report()


class Model(nn.Module):
    """A layer that gives the features, then the function ``within``, then a head."""

    def __init__(self, within, **layers):
        super().__init__()
        self.features, self.within, self.head = nn.Linear(3, WIDTH), within, nn.Linear(WIDTH, 2)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.head(self.within(self, self.features(x)))


def chosen(model, x):
    """Positions turned, chosen and gathered behind the samples."""
    places = torch.arange(x.shape[1]).expand(x.shape[:2])
    x = x + model.table.weight[places]
    last = model.project(x.flip(1))[:, :, torch.tensor([-1, 2])]
    moved = x.gather(2, torch.arange(WIDTH).flip(0).expand_as(x)).index_select(1, places[0])
    return model.norm(moved * last.sum(-1, keepdim=True) + x).roll(1, 1)


def time_major(model, x):
    x = model.norm(model.project(x.transpose(0, 1)).relu())
    rows = model.more(x.flatten(0, 1)).tanh().view_as(x)
    return (x + rows).transpose(0, 1)


def joined(model, x):
    """Two views of the batch as one, as contrastive learning has them."""
    both = torch.cat([x, (2 * x).sin()]).relu()
    both = model.norm(model.project(both).mT.unsqueeze(-1)).squeeze(-1).mT
    both = model.convolution(both.mT).relu().mT
    one, other = both.chunk(2)
    return torch.cat([model.more(one) * other, both[:B], both[B:]], dim=1)


@pytest.mark.parametrize("length", [6, B, 2 * B])
@pytest.mark.parametrize("within", [chosen, time_major, joined])
def test_rows_whose_order_the_graph_shows(within, length):
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, WIDTH) if within is joined else nn.LayerNorm(WIDTH)
    layers = {"project": nn.Linear(WIDTH, WIDTH), "more": nn.Linear(WIDTH, WIDTH), "norm": norm}
    if within is joined:
        layers["convolution"] = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
    if within is chosen:
        layers["table"] = nn.Embedding(2 * B, WIDTH)
        del layers["more"]
    report = judged(Model(within, **layers), [torch.randn(B, length, 3, dtype=F64)] * 4)
    assert all(how.startswith("clusters") for how in report.values())


@pytest.mark.parametrize("length", [6, B])
@pytest.mark.parametrize("first", [True, False])
def test_a_transformer_of_torch_is_time_major_inside(first, length):
    def within(model, x):
        return model.encoder(x.transpose(0, 1)).transpose(0, 1)

    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, norm_first=first), 2, nn.LayerNorm(WIDTH),
        enable_nested_tensor=False,
    )  # fmt: skip
    judged(Model(within, encoder=encoder), [torch.randn(B, length, 3, dtype=F64)] * 4)


class Turned(nn.Module):
    """The model's own input, turned: its memory shows which dimension is which."""

    def __init__(self):
        super().__init__()
        self.enter, self.features = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.features(self.enter(x.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("length", [6, B])
def test_an_input_that_is_turned_before_the_first_layer(length):
    torch.manual_seed(0)
    judged(Turned(), [torch.randn(B, length, 3, dtype=F64)] * 4)


class Tokens(nn.Module):
    """Tokens copied to time-major order, which nothing shows, before a layer that runs again."""

    def __init__(self):
        super().__init__()
        self.enter, self.table = nn.Linear(1, WIDTH), nn.Embedding(11, WIDTH)
        self.features, self.recurrent = nn.Identity(), nn.RNN(WIDTH, WIDTH)

    def forward(self, tokens):
        x = self.features(self.enter(tokens[..., None].to(F64)))
        return x + self.recurrent(self.table(tokens.t().contiguous()))[0].transpose(0, 1)


@pytest.mark.filterwarnings("ignore:weighted without clusters")
def test_a_table_with_as_many_rows_as_samples_is_not_believed_to_have_theirs():
    torch.manual_seed(0)
    model = Tokens().to(F64)
    judge = Judge(model, LABELS, 5)
    batch = torch.randint(0, 11, (B, B))
    for _ in range(2):
        judge.optimizer.zero_grad()
        square(model, batch).mean().backward()
        judge.optimizer.step()
    assert judge.queue.report()["table.weight"].startswith("whole batch")


def test_other_orders_are_not_believed():
    samples, linear = 3, nn.Linear(6, 6)
    x = linear(torch.randn(samples, 4, 6))
    square, known = linear(torch.randn(samples, samples, 6)), set()
    known |= {(x.grad_fn, x.output_nr), (square.grad_fn, square.output_nr)}
    mixing = nn.Conv1d(samples, samples, 1)

    def order(tensor):
        return "in order" if in_order(tensor, samples, known) else (
            other_order(tensor, samples, known))  # fmt: skip

    turned = x.transpose(0, 1)
    for tensor in (turned, turned.relu() * 2, square.transpose(0, 1), turned[:2].flip(0),
                   turned.reshape(2, 2, samples, 6).flatten(0, 1)):  # fmt: skip
        assert order(tensor) == SECOND
    for tensor in (turned.reshape(-1, 6), torch.cat([x, 2 * x]), torch.cat([x, x, x])[samples:],
                   torch.cat([x, x.sin()]).flatten(1)):  # fmt: skip
        assert order(tensor) == JOINED
    for tensor in (torch.cat([x, x]).chunk(2)[1], torch.cat([x, x]).split([samples, samples])[0],
                   torch.cat([x, x])[samples:]):  # fmt: skip
        assert order(tensor.unflatten(0, (samples, 1)).flatten(1, 2)) == "in order"
    mixed = [
        torch.cat([x, x.flip(0)]), torch.cat([x, x.detach()]), torch.cat([x, x])[1:4],
        turned[:, torch.tensor([2, 1, 0])], turned.flip(1), turned.cumsum(1), mixing(turned),
        torch.cat([x, x])[::2], torch.cat([x, x])[[3, 1, 2]], turned.softmax(1),
        square.transpose(0, 1).transpose(1, 2), torch.cat([x, x])[torch.arange(6).flip(0)],
    ]  # fmt: skip
    for number, tensor in enumerate(mixed):
        assert order(tensor) == "", number


def test_the_graph_tells_whether_rows_are_those_of_the_samples():
    samples, linear = 3, nn.Linear(6, 6)
    images = linear(torch.randn(samples, 8, 8, 6))
    windows = images.view(samples, 2, 4, 2, 4, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 6)
    rows = images.reshape(-1, 6)
    # As many positions as samples: only the layer before tells which is which.
    square = linear(torch.randn(samples, samples, 6))
    layer = {(square.grad_fn, 0)}
    assert in_order(square.relu().reshape(-1, 6), samples, layer)
    assert in_order(square.transpose(0, 1).transpose(0, 1), samples, layer)
    assert not in_order(square.transpose(0, 1), samples, layer)
    for ordered in (windows, linear(windows).unbind(1)[0], rows.relu() * 2 + rows,
                    torch.roll(images, 1, 2).reshape(-1, 6)):  # fmt: skip
        assert in_order(ordered, samples, set())
    for mixed in (rows[torch.randperm(len(rows))], images.flatten(1, 2).transpose(0, 1)[:6],
                  torch.randn(192, 192) @ rows, torch.roll(rows, 1, 0), rows.flip(0),
                  images.mean((1, 2)).expand(6, samples, 6), square.transpose(0, 1).reshape(-1, 6),
                  rows.cumsum(0), rows.detach()):  # fmt: skip
        assert not in_order(mixed, samples, set())
