"""Next-byte prediction on the source of Python's standard library: real text on every machine.

The source is that of the running interpreter, so only runs of one Python version can be compared.
"""

import sysconfig
from collections import OrderedDict
from functools import cache
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from gq_triton.tasks.scored import ScoredTask

__all__ = ["CausalTransformer", "load_python_lm", "load_python_lm_deep"]

CONTEXT = 32
_BYTES = 2_000_000  # of text to learn from
_HELD_OUT = 512  # windows for validation, and as many to test
_ASIDE = {"test", "tests", "site-packages", "idle_test", "__pycache__", "lib2to3"}


def load_python_lm(seed: int, data: Path | None = None) -> ScoredTask:
    """Return windows of 32 bytes and the next byte at each position, split by file."""
    return _task(_windows(_BYTES), layers=2)


def load_python_lm_deep(seed: int, data: Path | None = None) -> ScoredTask:
    """Return the task of ``load_python_lm`` with all of the library's text and 6 layers."""
    return _task(_windows(None), layers=6)


def _task(windows: tuple[Tensor, Tensor, Tensor], layers: int) -> ScoredTask:
    train, validation, test = windows
    return ScoredTask(
        train=_pair(train),
        validation=_pair(validation),
        test=_pair(test),
        model=lambda: CausalTransformer(256, CONTEXT, width=64, heads=2, layers=layers),
        features="norm",
        classes=None,
    )


def _pair(windows: Tensor) -> tuple[Tensor, Tensor]:
    return windows[:, :-1], windows[:, 1:]


@cache
def _windows(train_bytes: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return training, validation and test windows ``(N, CONTEXT + 1)`` int64.

    Args:
        train_bytes: how much text is for training; None: all there is.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in library.rglob("*.py")
        if not _ASIDE.intersection(path.relative_to(library).parts)
    )
    # Of every ten files the first is for validation and the second for the test.
    parts = [bytearray(), bytearray(), bytearray()]
    for number, path in enumerate(files):
        parts[{0: 1, 1: 2}.get(number % 10, 0)] += path.read_bytes()
    held_out = _HELD_OUT * (CONTEXT + 1)
    limits = train_bytes or len(parts[0]), held_out, held_out
    train, validation, test = (_cut(part, limit) for part, limit in zip(parts, limits, strict=True))
    return train, validation, test


def _cut(text: bytearray, limit: int) -> Tensor:
    """Return windows that are spread evenly over a text and hold at most ``limit`` bytes."""
    size = CONTEXT + 1
    windows = torch.frombuffer(text, dtype=torch.uint8)[: len(text) // size * size].view(-1, size)
    chosen = torch.linspace(0, len(windows) - 1, min(limit // size, len(windows))).long()
    return windows[chosen].long()


class CausalTransformer(nn.Module):
    """A small decoder, built of layers whose gradients can be clustered in one backward pass.

    Args:
        vocabulary: number of symbols.
        context: length of the longest sequence, T.
        width: width of the residual stream, D.
        heads: number of attention heads.
        layers: number of blocks.
    """

    def __init__(self, vocabulary: int, context: int, *, width: int, heads: int, layers: int):
        super().__init__()
        self.symbols = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(
            OrderedDict((f"block{n}", _Block(width, heads)) for n in range(layers))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for table in (self.symbols, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, symbols: Tensor) -> Tensor:
        """Return the logits ``(B, T, vocabulary)`` of the symbols after ``symbols`` ``(B, T)``."""
        places = torch.arange(symbols.shape[1], device=symbols.device).expand(symbols.shape)
        x = self.symbols(symbols) + self.positions(places)
        return self.head(self.norm(self.blocks(x)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(self.norm1(x)), "b t (three h d) -> three b h t d", three=3, h=self.heads
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(rearrange(mixed, "b h t d -> b t (h d)"))
        return x + self.down(F.gelu(self.up(self.norm2(x))))
