"""Models for the benchmarks of whole steps, built of plain layers with torch alone."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["GPT", "MLP", "Recurrent", "ResNet18", "ResNet50", "Residual"]


class MLP(nn.Module):
    """A net of four layers 1024 wide, for ten classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [nn.Linear(1024, 1024), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(1024, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for a batch."""
        return self.head(self.features(x))


class Residual(nn.Module):
    """A block of two 3 x 3 convolutions; the first one has the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for a batch."""
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images."""

    def __init__(self) -> None:
        super().__init__()
        blocks, channels = [], 64
        for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [Residual(channels, width, stride), Residual(width, width, 1)]
            channels = width
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(*blocks)
        self.features = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for a batch."""
        return self.head(self.features(self.blocks(self.stem(x))).flatten(1))


class Bottleneck(nn.Module):
    """A block of 1 x 1, 3 x 3 and 1 x 1 convolutions; the 3 x 3 one has the stride."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for a batch."""
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm3(self.conv3(self.relu(self.norm2(self.conv2(out)))))
        return self.relu(out + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 as for ImageNet, 25.6 M parameters; fewer blocks or channels make it small."""

    def __init__(
        self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        layers, channels = [], width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(channels, width << stage, stride))
                channels = 4 * (width << stage)
        self.blocks = nn.Sequential(*layers)
        self.features = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for a batch."""
        return self.head(self.features(self.blocks(self.stem(x))).flatten(1))


class Block(nn.Module):
    """A block of causal attention and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for a batch."""
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        mixed = nn.functional.scaled_dot_product_attention(
            *split.permute(2, 0, 3, 1, 4), is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A GPT whose head is tied to the token table; four layers 256 wide over 128 bytes by default.

    Args:
        vocabulary: number of tokens.
        length: most tokens of a sequence.
        width: of the layers.
        heads: of the attention.
        layers: number of blocks.
    """

    def __init__(
        self, vocabulary: int = 256, length: int = 128, width: int = 256, heads: int = 4,
        layers: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.features = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of tokens ``(B, T)``."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.tokens(tokens) + self.positions(places)
        return self.head(self.features(self.blocks(x)))


class Recurrent(nn.Module):
    """A recurrent net 256 wide that reads 16 steps, for ten classes.

    Args:
        kind: ``nn.GRU`` or ``nn.LSTM``, or one of their cells, which is called step by step.
    """

    def __init__(self, kind: Callable[..., nn.Module], width: int = 256) -> None:
        super().__init__()
        self.features = nn.Linear(32, width)
        cell = kind in (nn.GRUCell, nn.LSTMCell)
        self.reader = kind(width, width) if cell else kind(width, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for a batch."""
        x = self.features(x).relu()
        if not isinstance(self.reader, nn.RNNCellBase):
            return self.head(self.reader(x)[0][:, -1])
        state = None
        for step in x.unbind(1):
            state = self.reader(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)
