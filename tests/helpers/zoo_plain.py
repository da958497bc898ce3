"""Cases of the zoo that need torch alone: its layers, and models as people write them."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from zoo import Case, Inputs, Size, first_output, numbers, pictures


def words(size: Size, batch: int) -> Inputs:
    return {"x": torch.randint(size.vocabulary, (batch, size.length))}


class Attended(nn.Module):
    """``nn.MultiheadAttention`` between two linear layers."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.enter = nn.Linear(size.width, size.width)
        self.attention = nn.MultiheadAttention(size.width, size.heads, batch_first=True)
        self.head = nn.Linear(size.width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class Encoded(nn.Module):
    """``nn.TransformerEncoder``; time-major inside unless ``batch_first``."""

    def __init__(self, size: Size, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.enter = nn.Linear(size.width, size.width)
        layer = nn.TransformerEncoderLayer(
            size.width, size.heads, 2 * size.width, dropout=0.0, batch_first=batch_first
        )
        self.encoder = nn.TransformerEncoder(layer, size.depth, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.batch_first:
            return self.head(self.encoder(x))
        return self.head(self.encoder(x.transpose(0, 1)).transpose(0, 1))


class Translated(nn.Module):
    """``nn.Transformer``: an encoder and a decoder of one sequence."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.table = nn.Embedding(size.vocabulary, size.width)
        self.transformer = nn.Transformer(
            size.width, size.heads, 1, 1, 2 * size.width, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(size.width, size.vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        entered = self.table(x)
        return self.head(self.transformer(entered, entered.flip(1)))


class Recurrent(nn.Module):
    """``nn.LSTM`` or ``nn.GRU`` over tokens; time-major inside unless ``batch_first``."""

    def __init__(self, size: Size, kind: Callable[..., nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.table = nn.Embedding(size.vocabulary, size.width)
        self.rnn = kind(size.width, size.width, size.depth, batch_first=batch_first)
        self.head = nn.Linear(size.width, size.vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        if self.batch_first:
            return self.head(self.rnn(x)[0])
        return self.head(self.rnn(x.transpose(0, 1))[0].transpose(0, 1))


class Cells(nn.Module):
    """An ``nn.LSTMCell`` that is called once for each position."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(size.width, size.width), nn.Linear(size.width, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), x.shape[2]), x.new_zeros(len(x), x.shape[2])
        for position in x.unbind(1):
            state = self.cell(position, state)
        return self.head(state[0])


def autoencoder(size: Size) -> nn.Module:
    """Return convolutions with a stride, then transposed ones."""
    half = size.width // 2
    return Named(
        nn.Conv2d(3, half, 3, 2, 1), nn.ReLU(), nn.Conv2d(half, size.width, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(size.width, half, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(half, 3, 4, 2, 1),
    )  # fmt: skip


class Named(nn.Module):
    """``nn.Sequential`` whose input is called ``x``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class UNet(nn.Module):
    """Two scales with a skip connection; group norms, a transposed convolution."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.down = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.GroupNorm(2, width), nn.SiLU())
        self.middle = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.GroupNorm(2, 2 * width), nn.SiLU()
        )
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.out = nn.Conv2d(2 * width, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        return self.out(torch.cat([fine, self.up(self.middle(fine))], 1))


def convolved(size: Size, norm: Callable[[int], nn.Module]) -> nn.Module:
    """Return two convolutions with a norm or an activation that has parameters."""
    return Named(
        nn.Conv2d(3, size.width, 3, 2, 1), norm(size.width), nn.ReLU(),
        nn.Conv2d(size.width, size.width, 3, 2, 1), norm(size.width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(size.width, 5),
    )  # fmt: skip


def normed(size: Size, norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return linear layers whose weights are computed from other parameters."""
    return Named(
        nn.Linear(size.width, size.width), nn.Tanh(), norm(nn.Linear(size.width, size.width)),
        nn.Tanh(), nn.Linear(size.width, 5),
    )  # fmt: skip


class PlainLayerNorm(nn.Module):
    """A layer norm without ``nn.LayerNorm``, whose shift is optional, as in nanoGPT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class PlainRMSNorm(nn.Module):
    """A norm by the root mean square, as in Llama: computed in float32 or wider, then scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * (wide * scale).to(x.dtype)


class Block(nn.Module):
    """Attention and a net of two layers, each added to what came in, scaled if ``scaled``."""

    def __init__(
        self, size: Size, norm: Callable[[int], nn.Module], causal: bool, scaled: bool = False
    ) -> None:
        super().__init__()
        width = size.width
        self.heads, self.causal = size.heads, causal
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        if scaled:
            self.gamma1 = nn.Parameter(torch.ones(width))
            self.gamma2 = nn.Parameter(torch.ones(width))
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        mixed = F.scaled_dot_product_attention(*split.permute(2, 0, 3, 1, 4), is_causal=self.causal)
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + (self.gamma1 * mixed if self.scaled else mixed)
        grown = self.down(F.gelu(self.up(self.norm2(x))))
        return x + (self.gamma2 * grown if self.scaled else grown)


class NanoGPT(nn.Module):
    """A GPT as in nanoGPT: positions looked up once for all samples, a tied head."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.wte = nn.Embedding(size.vocabulary, size.width)
        self.wpe = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(Block(size, PlainLayerNorm, True) for _ in range(size.depth))
        self.norm = PlainLayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.wte.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        hidden = self.wte(x) + self.wpe(places)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class OwnLlama(nn.Module):
    """A decoder with its own RMS norm and the positions of "Attention Is All You Need"."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.table = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList(Block(size, PlainRMSNorm, True) for _ in range(size.depth))
        self.norm = PlainRMSNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        angles = torch.arange(size.length)[:, None] / 50 ** torch.linspace(0, 1, size.width // 2)
        self.register_buffer("waves", torch.cat([angles.sin(), angles.cos()], 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = math.sqrt(self.table.embedding_dim) * self.table(x) + self.waves
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class BareViT(nn.Module):
    """A vision transformer whose class token, positions and layer scales are bare parameters."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        patch = size.image // 4
        self.patches = nn.Conv2d(3, size.width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.positions = nn.Parameter(torch.zeros(1, 17, size.width))
        self.blocks = nn.ModuleList(
            Block(size, nn.LayerNorm, False, scaled=True) for _ in range(size.depth)
        )
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Experts(nn.Module):
    """Each position goes through one of three nets; the rows of an expert are of any samples."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.enter, self.router = nn.Linear(size.width, size.width), nn.Linear(size.width, 3)
        self.experts = nn.ModuleList(nn.Linear(size.width, size.width) for _ in range(3))
        self.head = nn.Linear(size.width, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.enter(x).flatten(0, 1)
        gate = self.router(rows).softmax(-1)
        best = gate.argmax(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            chosen = (best == number).nonzero()[:, 0]
            out = out.index_add(0, chosen, gate[chosen, number, None] * expert(rows[chosen]))
        return self.head(out.view_as(x))


class Turned(nn.Module):
    """A net that is time-major from its first layer on: the batch is the second dimension."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.enter, self.middle = nn.Linear(size.width, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.middle(self.enter(x.transpose(0, 1)).relu())).mean(0)
        return self.head(x)


class Ranked(nn.Module):
    """Positions in order of a score that is learned, and the table of tokens used past itself."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(size.length, size.width), nn.LayerNorm(size.width)
        self.enter, self.head = nn.Linear(size.width, size.width), nn.Linear(size.width, 5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        table = self.norm(self.table.weight)
        x = self.relu(self.enter(x)) @ table.T
        order = x.sum(-1).argsort(dim=1)
        x = x.gather(1, order[:, :, None].expand_as(x)) @ table
        return self.head(x)


class Twins(nn.Module):
    """Two views of each sample go through one encoder as a batch of twice the samples."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.enter = nn.Linear(size.width, size.width)
        self.encoder = nn.Sequential(
            nn.Linear(size.width, size.width), nn.LayerNorm(size.width), nn.ReLU()
        )
        self.head = nn.Linear(size.width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        views = torch.cat([x, x.flip(1)])
        first, second = self.head(self.encoder(views)).chunk(2)
        return first * second


class Past(nn.Module):
    """Weights that are used past their layers, and a bare scale of the output."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.table = nn.Embedding(size.vocabulary, size.width)
        self.middle = nn.Linear(size.width, size.width)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(self.table(x)).relu()
        hidden = F.linear(hidden, self.middle.weight.t())
        return self.scale * F.linear(hidden, self.table.weight)


class Paired(nn.Module):
    """``nn.Bilinear`` of an embedding bag and a linear layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(size.vocabulary, size.width)
        self.enter = nn.Linear(size.width, size.width)
        self.pair, self.head = nn.Bilinear(size.width, size.width, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        bag = self.bag(x)
        return self.head(self.pair(bag, self.enter(bag).tanh()))


def _case(name: str, build: Callable[[Size], nn.Module], inputs: Callable = numbers) -> Case:
    return Case(name, "torch.nn", build, inputs, first_output)


PLAIN = [
    _case("MultiheadAttention", Attended),
    _case("TransformerEncoder", partial(Encoded, batch_first=True)),
    _case("TransformerEncoder, time-major", partial(Encoded, batch_first=False)),
    _case("Transformer", Translated, words),
    _case("LSTM", partial(Recurrent, kind=nn.LSTM, batch_first=True), words),
    _case("GRU", partial(Recurrent, kind=nn.GRU, batch_first=True), words),
    _case("LSTM, time-major", partial(Recurrent, kind=nn.LSTM, batch_first=False), words),
    _case("LSTMCell", Cells),
    _case("autoencoder (ConvTranspose2d)", autoencoder, pictures),
    _case("U-Net", UNet, pictures),
    _case("PReLU", partial(convolved, norm=nn.PReLU), pictures),
    _case("BatchNorm2d", partial(convolved, norm=nn.BatchNorm2d), pictures),
    _case("SyncBatchNorm", partial(convolved, norm=nn.SyncBatchNorm), pictures),
    _case("InstanceNorm2d", partial(convolved, norm=partial(nn.InstanceNorm2d, affine=True)),
          pictures),
    _case("weight_norm", partial(normed, norm=parametrizations.weight_norm)),
    _case("spectral_norm", partial(normed, norm=parametrizations.spectral_norm)),
    _case("nanoGPT", NanoGPT, words),
    _case("Llama with its own RMSNorm", OwnLlama, words),
    _case("ViT with bare parameters", BareViT, pictures),
    _case("mixture of experts", Experts),
    _case("two views as one batch", Twins),
    Case("time-major inside", "torch.nn", Turned, numbers, first_output, features="head"),
    _case("a norm of a table", Ranked),
    _case("weights used past their layers", Past, words),
    _case("Bilinear, EmbeddingBag", Paired, words),
]  # fmt: skip
