# Gradients, sites and reports are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
"""Modules without a family: their parameters are followed, or the module runs again."""

import pytest
import torch
import torch.nn.functional as F
from cluster_cases import Judge
from torch import nn

import gq_triton
from gq_triton import GradQueue
from gq_triton.cluster_grad.layers.again import Backward

F64 = torch.float64
LABELS = torch.tensor([0, 2, 2, 0, 4, 0, 0, 2, 2])
WIDTH = 8


class OwnRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return (1 + self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class OwnLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Mixed(nn.Module):
    """Positions, relative positions, a class token, bare matrices and scales, own norms."""

    def __init__(self):
        super().__init__()
        self.features, self.places = nn.Embedding(11, WIDTH), nn.Embedding(12, WIDTH)
        self.learned, self.norm_of_learned = (
            nn.Parameter(torch.randn(1, 12, WIDTH)),
            nn.LayerNorm(8),
        )
        self.norm, self.last = OwnRMSNorm(), OwnLayerNorm()
        self.hidden, self.gamma = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.relative, self.token = nn.Embedding(7, 2), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.matrix, self.slope = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.PReLU(WIDTH)
        self.heads = nn.Parameter(torch.randn(WIDTH, 2, 3))

    def forward(self, tokens):
        samples, length = tokens.shape
        x = self.features(tokens) + self.places(torch.arange(length))
        x = x + self.norm_of_learned(self.learned[:, :length])
        x = self.hidden(self.norm(x)) * self.gamma
        heads = x.view(samples, length, 2, -1).transpose(1, 2)
        distance = (torch.arange(length)[:, None] - torch.arange(length)).clamp(-3, 3) + 3
        weights = heads @ heads.mT + self.relative(distance).permute(2, 0, 1)[None]
        x = (weights.softmax(-1) @ heads).transpose(1, 2).reshape(samples, length, -1)
        x = torch.cat([self.token.expand(samples, -1, -1), x], dim=1)
        x = self.last(x) @ self.matrix
        x = self.slope(x.mT).mT
        return torch.einsum("btd,dhe->bthe", x, self.heads)


class Windows(nn.Module):
    """Attention in windows, whose rows lie together per sample, as in Swin."""

    def __init__(self):
        super().__init__()
        self.features, self.qkv = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.bias, self.out = nn.Parameter(torch.randn(4, 4, 2)), nn.Linear(WIDTH, 2)

    def forward(self, x):
        x = torch.roll(self.features(x), (1, 1), (1, 2))
        samples = len(x)
        x = x.view(samples, 2, 2, 2, 2, WIDTH).transpose(2, 3).reshape(-1, 4, WIDTH)
        parts = self.qkv(x).reshape(len(x), 4, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4).unbind(0)
        weights = parts[0] @ parts[1].mT + self.bias.permute(2, 0, 1)
        x = (weights.softmax(-1) @ parts[2]).transpose(1, 2).reshape(len(x), 4, WIDTH)
        return self.out(x).view(samples, -1)


class Opaque(nn.Module):
    """A recurrent layer, which runs again, attention, and a weight made of others."""

    def __init__(self, recurrent, drop=0.0, batch_first=True):
        super().__init__()
        self.features, self.batch_first = nn.Linear(3, WIDTH), batch_first
        self.recurrent = recurrent(
            WIDTH, WIDTH, num_layers=2, batch_first=batch_first, dropout=drop
        )
        self.attention = nn.MultiheadAttention(WIDTH, 2, drop, batch_first=batch_first)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 2))

    def forward(self, x):
        x = self.features(x)
        x = x if self.batch_first else x.transpose(0, 1)
        x, state = self.recurrent(x)
        state = state[0] if isinstance(state, tuple) else state
        mask = torch.full((len(x[0]), len(x[0])), -torch.inf, dtype=F64).triu(1)
        x = self.attention(x, x, x, attn_mask=mask if self.batch_first else None)[0]
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(x.mean(dim=1) + state[-1])


class Experts(nn.Module):
    """A mixture of experts: each layer sees rows of some samples, in no order."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows).softmax(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            (chosen,) = torch.where(scores.argmax(-1) == number)
            out = out.index_add(0, chosen, expert(rows[chosen]) * scores[chosen, number, None])
        return out.view_as(x)


def square(model, batch):
    torch.manual_seed(5)  # random numbers of dropout
    return (model(batch) - 1).square().flatten(1).mean(dim=1)


def judged(model, batches, run=square, **options):
    judge = Judge(model.to(F64), LABELS, 5, strict=True, **options)
    judge.steps(run, batches)
    return judge.queue


@pytest.mark.slow
@pytest.mark.parametrize("length", [5, 9])  # 9: as many positions as samples
def test_parameters_are_followed_to_where_they_meet_the_samples(length):
    torch.manual_seed(0)
    queue = judged(Mixed(), [torch.randint(0, 11, (9, length)) for _ in range(4)])
    assert all(how.startswith("clusters") for how in queue.report().values())


@pytest.mark.slow
def test_rows_of_windows_lie_together_per_sample():
    torch.manual_seed(0)
    judged(Windows(), [torch.randn(9, 4, 4, 3, dtype=F64) for _ in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [
    lambda: Opaque(nn.LSTM), lambda: Opaque(nn.GRU, batch_first=False), lambda: Opaque(nn.RNN, 0.3),
])  # fmt: skip
def test_modules_that_show_no_operations_run_again(kind):
    torch.manual_seed(0)
    model = kind()
    queue = judged(model, [torch.randn(9, 9, 3, dtype=F64) for _ in range(4)])
    assert queue.report()["recurrent.weight_ih_l0"].startswith("clusters")
    attention = queue.report()["attention.in_proj_weight"]
    assert attention == "clusters (expanded in MultiheadAttention)"


class Noisy(nn.Module):
    """Random numbers of many kinds: by sample, by row, shared by all samples."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x):
        hidden = F.dropout(self.up(x.flatten(0, 1)).relu(), 0.3).view(*x.shape[:2], -1)
        hidden = hidden * torch.rand(len(x), 1, 1, dtype=F64) + torch.randn(16, dtype=F64)
        hidden = F.dropout1d(hidden.transpose(0, 1), 0.3).transpose(0, 1)
        hidden = F.gumbel_softmax(hidden) + 0.1 * torch.empty_like(hidden).normal_()
        return self.down(F.alpha_dropout(hidden, 0.2, self.training))


@pytest.mark.parametrize("labels", [LABELS, torch.zeros(9, dtype=torch.int64)])
@pytest.mark.parametrize("kind", [Noisy, lambda: nn.LSTM(WIDTH, WIDTH, 2, True, True, 0.3)])
def test_a_module_that_runs_again_gets_its_random_numbers_again(kind, labels, monkeypatch):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.noisy, self.head = nn.Linear(3, WIDTH), kind(), nn.Linear(WIDTH, 2)

        def forward(self, x):
            x = self.noisy(self.features(x))
            return self.head(x[0] if isinstance(x, tuple) else x)

    gq_triton.register_layer(Noisy)
    torch.manual_seed(0)
    judge = Judge(Around().to(F64), labels, 5, strict=True)
    judge.steps(square, [torch.randn(9, 5, 3, dtype=F64)])
    # The first step shows that there are any.
    monkeypatch.setattr(Backward, "_masked", None)
    judge.steps(square, [torch.randn(9, 5, 3, dtype=F64) for _ in range(3)])
    square(judge.model, torch.randn(9, 5, 3, dtype=F64)).mean().backward()
    after = torch.get_rng_state()
    square(judge.twin, torch.randn(9, 5, 3, dtype=F64))
    assert torch.equal(after, torch.get_rng_state())  # the second run has taken none


class Twice(nn.Module):
    """Two outputs, which the model changes in place."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        x = x @ self.weight
        return x, (2 * x).sin()


@pytest.mark.parametrize("kind", [Twice, lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True)])
def test_what_a_module_that_runs_again_returns_may_be_changed_in_place(kind):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.twice, self.head = nn.Linear(3, WIDTH), kind(), nn.Linear(WIDTH, 2)

        def forward(self, x):
            return self.head(self.twice(self.features(x))[0].mul_(2).relu_())

    gq_triton.register_layer(Twice)
    torch.manual_seed(0)
    queue = judged(Around(), [torch.randn(9, 5, 3, dtype=F64) for _ in range(4)])
    assert any("run again" in how for how in queue.report().values())


class Shuffled(nn.Module):
    """Noise in another order of rows than the samples, and noise that is not given again."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        rows = F.dropout(x.transpose(0, 1).flatten(0, 1), 0.3)
        x = rows.view(x.shape[1], x.shape[0], -1).transpose(0, 1) @ self.weight
        return F.rrelu(x, training=True)


def test_random_numbers_in_no_known_order_take_a_product_for_each_cluster():
    gq_triton.register_layer(Shuffled)
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("features", nn.Linear(3, WIDTH))
    model.add_module("shuffled", Shuffled())
    judged(model, [torch.randn(9, 5, 3, dtype=F64) for _ in range(4)])


def test_samples_that_a_layer_sees_in_no_order_are_taken_from_the_module_around_it():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("features", nn.Linear(3, WIDTH))
    model.add_module("block", Experts())
    model.add_module("head", nn.Linear(WIDTH, 2))
    model.to(F64)
    queue = GradQueue(model, n_clusters=5, features="features", strict=True)
    shown = queue.check(torch.randn(9, 4, 3, dtype=F64))
    assert shown.share == 1.0
    assert "clusters (Experts run again)" in str(shown)
    # The first backward pass shows it. Until then the queue is empty, and weights are 1.
    queue = judged(model, [torch.randn(9, 4, 3, dtype=F64) for _ in range(4)])
    assert queue.report()["block.experts.0.weight"] == "clusters (Experts run again)"


class TimeMajor(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.features = nn.Embedding(11, WIDTH), nn.LayerNorm(WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, tokens):
        return self.head(self.layer(self.features(self.table(tokens))))


@pytest.mark.parametrize("length", [5, 9])
def test_a_time_major_model_is_declared(length):
    torch.manual_seed(0)

    def run(model, tokens):
        return (model(tokens) - 1).square().mean(dim=(0, 2))

    tokens = [torch.randint(0, 11, (length, 9)) for _ in range(4)]
    judged(TimeMajor(), tokens, run, batch_dim=1)


class Tables(nn.Module):
    """Indices that all samples share, in tables with as many rows as there are samples."""

    def __init__(self):
        super().__init__()
        self.features, self.table = nn.Embedding(11, WIDTH), nn.Embedding(63, WIDTH)
        self.bare, self.derived = nn.Parameter(torch.randn(63, WIDTH)), nn.Embedding(12, WIDTH)

    def forward(self, tokens):
        places = torch.arange(63).view(9, 7)
        x = self.features(tokens[:, :1]) + self.derived(tokens + 1).mean(1, keepdim=True)
        return x[:, None] + self.table(places) * F.embedding(places, self.bare)


def test_tables_with_as_many_rows_as_samples_are_shared_by_all():
    torch.manual_seed(0)
    judged(Tables(), [torch.randint(0, 11, (9, 4)) for _ in range(4)])


class TimeMajorInside(nn.Module):
    """A model that works on ``(T, B, ...)`` inside, with a bare scale and a layer there."""

    def __init__(self):
        super().__init__()
        self.features, self.scale = nn.Linear(3, WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x):
        x = self.features(x).transpose(0, 1)
        x = self.inner(x * self.scale).tanh()
        return self.head(x.transpose(0, 1))


@pytest.mark.parametrize("length", [5, 9])  # 9: as many time steps as samples
def test_time_steps_are_not_taken_for_samples(length):
    torch.manual_seed(0)
    model = TimeMajorInside().to(F64)
    queue = GradQueue(model, n_clusters=5, features="features", clusterer=lambda f: LABELS)
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="without clusters"):
        square(model, torch.randn(9, length, 3, dtype=F64)).mean().backward()
    assert [how.partition(" ")[0] for how in queue.report().values()] == [
        "whole", "clusters", "clusters", "clusters", "clusters", "clusters", "clusters"
    ]  # fmt: skip


def test_a_registered_class_runs_again_or_is_like_a_layer():
    class Scaled(nn.Linear):
        def forward(self, input):
            return F.linear(input, self.weight, self.bias)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x):
            return x @ self.weight

    gq_triton.register_layer(Scaled, like=nn.Linear)
    gq_triton.register_layer(Own)
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("features", Scaled(3, WIDTH))
    model.add_module("own", Own())
    queue = judged(model, [torch.randn(9, 4, 3, dtype=F64) for _ in range(4)])
    assert list(queue.report().values()) == [
        "clusters (Scaled)", "clusters (Scaled)", "clusters (Own run again)"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="like must be one of Linear"):
        gq_triton.register_layer(Own, like=nn.Dropout)
    with pytest.raises(TypeError, match=r"a subclass of torch\.nn\.Module"):
        gq_triton.register_layer(model)


def test_a_forward_pass_may_call_the_model():
    """A training step of Lightning is the forward pass of its model, and calls the model."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, x, whole=True):
            return self.head(self(x, False)) if whole else self.features(x)

    torch.manual_seed(0)
    judged(Module(), [torch.randn(9, 3, dtype=F64) for _ in range(4)])
