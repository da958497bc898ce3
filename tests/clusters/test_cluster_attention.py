# Gradients and sites are there after a backward pass, whatever their types say.
# pyright: reportArgumentType=false
"""``nn.MultiheadAttention`` with clusters: torch's numbers, and the oracle's gradients."""

import copy

import pytest
import torch
from cluster_cases import Judge
from torch import nn

from gq_triton import GradQueue
from gq_triton.cluster_grad.install import COMPILES_STAND_INS

F64 = torch.float64
LABELS = torch.tensor([0, 2, 2, 0, 4, 0])
B, WIDTH, HEADS = 6, 8, 2


class Attended(nn.Module):
    """Attention between two linear layers, to the same sequence or to one of ``source`` numbers.

    Args:
        source: the width of the keys; 0 attends to the queries.
        values: whether keys and values are different tensors.
        asked: further arguments of the forward pass.
        options: further arguments of ``nn.MultiheadAttention``.
    """

    def __init__(self, source=0, values=False, asked=None, **options):
        super().__init__()
        self.features = nn.Linear(3, WIDTH)
        self.sides = nn.Linear(3, 2 * source) if source else None
        self.values = values
        sizes = {"kdim": source, "vdim": source} if source not in (0, WIDTH) else {}
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **sizes, **options)
        self.asked, self.head = asked or {}, nn.Linear(WIDTH, 2)

    def forward(self, x):
        x = self.features(x)
        key = value = x
        if self.sides is not None:
            key, value = self.sides(self.given[:, :4]).chunk(2, dim=-1)
            value = value if self.values else key
        time_major = not self.attention.batch_first
        if time_major:
            same = key is value, key is x
            x = x.transpose(0, 1)
            key = x if same[1] else key.transpose(0, 1)
            value = key if same[0] else value.transpose(0, 1)
        out, weights = self.attention(x, key, value, **self.asked)
        out = out.transpose(0, 1) if time_major else out
        out = self.head(out)
        return out if weights is None else out + weights.flatten(1).mean(1)[:, None, None]

    def see(self, x):
        self.given = x
        return self(x)


def padded(length):
    """Return a mask of the keys ``(B, length)`` that leaves each sample some."""
    return torch.arange(length).expand(B, length) >= torch.tensor([5, 2, 3, 5, 4, 3])[:, None]


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PENALTY = -1.0 * padded(5).to(F64)
BIASED = torch.randn(5, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
BY_SAMPLE = torch.randn(B * HEADS, 5, 4, dtype=F64, generator=torch.Generator().manual_seed(2))
CASES = {
    "self": dict(batch_first=True, dropout=0.3),
    "time-major": dict(dropout=0.3, asked=dict(need_weights=False)),
    "causal": dict(batch_first=True, dropout=0.3, bias=False,
                   asked=dict(need_weights=False, attn_mask=CAUSAL, is_causal=True)),
    "a causal hint and padding": dict(asked=dict(need_weights=False, attn_mask=CAUSAL,
                                                 is_causal=True, key_padding_mask=padded(5))),
    "one more key and value": dict(batch_first=True, add_bias_kv=True, add_zero_attn=True,
                                   asked=dict(key_padding_mask=PENALTY, attn_mask=BIASED,
                                              average_attn_weights=False)),
    "another sequence": dict(source=WIDTH, batch_first=True, dropout=0.3,
                             asked=dict(key_padding_mask=padded(4), need_weights=False)),
    "keys and values": dict(source=WIDTH, values=True, asked=dict(attn_mask=BY_SAMPLE)),
    "another width": dict(source=6, values=True, batch_first=True),
}  # fmt: skip


def losses(model, x):
    torch.manual_seed(5)  # random numbers of dropout
    return (model.see(x) - 1).square().flatten(1).mean(dim=1)


@pytest.mark.parametrize("case", CASES)
def test_attention_gives_torchs_numbers_and_one_gradient_per_cluster(case):
    torch.manual_seed(0)
    model = Attended(**CASES[case]).to(F64)
    plain = copy.deepcopy(model)
    judge = Judge(model, LABELS, 5, strict=True)
    batches = [torch.randn(B, 5, 3, dtype=F64) for _ in range(4)]
    torch.testing.assert_close(losses(model, batches[0]), losses(plain, batches[0]))
    judge.steps(losses, batches)
    assert "clusters (expanded in MultiheadAttention)" in judge.queue.report().values()
    assert not any("again" in how for how in judge.queue.report().values())


def test_as_many_positions_as_samples_and_a_frozen_part():
    torch.manual_seed(0)
    model = Attended(dropout=0.3).to(F64)
    model.attention.in_proj_weight.requires_grad_(False)
    Judge(model, LABELS, 5, strict=True).steps(losses, [torch.randn(B, B, 3, dtype=F64)] * 4)
    model = Attended(batch_first=True).to(F64)
    model.attention.in_proj_weight.requires_grad_(False)
    model.attention.in_proj_bias.requires_grad_(False)
    Judge(model, LABELS, 5, strict=True).steps(losses, [torch.randn(B, B, 3, dtype=F64)] * 4)


def test_random_numbers_of_the_layers_behind():
    """A dropout draws in the order of the memory that attention leaves."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Linear(3, WIDTH)
            self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.3, batch_first=True)

        def see(self, x):
            return self(x)

        def forward(self, x):
            return self.layer(self.features(x))

    torch.manual_seed(0)
    judge = Judge(Around().to(F64), LABELS, 5, strict=True)
    judge.steps(losses, [torch.randn(B, 5, 3, dtype=F64) for _ in range(4)])


class Biased(nn.Module):
    """Attention whose mask is a table of relative positions, which all samples share."""

    def __init__(self):
        super().__init__()
        self.features, self.table = nn.Linear(3, WIDTH), nn.Parameter(torch.randn(5, 5))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def see(self, x):
        return self(x)

    def forward(self, x):
        x = self.features(x)
        return self.attention(x, x, x, attn_mask=self.table, need_weights=False)[0]


def test_a_mask_of_parameters():
    torch.manual_seed(0)
    judge = Judge(Biased().to(F64), LABELS, 5, strict=True)
    judge.steps(losses, [torch.randn(B, 5, 3, dtype=F64) for _ in range(4)])


def test_arguments_that_torch_refuses_are_refused_in_its_words():
    model = Attended(asked={"attn_mask": torch.ones(3, 3)})
    GradQueue(model, n_clusters=2, features="features").attach(torch.optim.SGD(model.parameters()))
    with pytest.raises(RuntimeError, match="attn_mask"):
        model(torch.randn(B, 5, 3))


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES_STAND_INS, reason="this compiler fails at stand-ins")
@pytest.mark.parametrize("case", ["self", "keys and values"])
def test_compiled_attention(case):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Attended(**(CASES[case] | {"dropout": 0.0})).to(F64)
    judge = Judge(model, LABELS, 5, strict=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def run(one, x):
        one.given = x
        out = compiled(x) if one is model else one(x)
        return (out - 1).square().flatten(1).mean(dim=1)

    judge.steps(run, [torch.randn(B, 5, 3, dtype=F64) for _ in range(4)])
