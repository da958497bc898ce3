"""Parameter shapes of real models, for benchmarks that need no model and no model's package."""

import os

import torch

__all__ = ["MODELS", "gpt", "memory", "reduced", "resnet50", "tiny"]

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """Return the 161 shapes of ResNet-50 for 1000 classes, 25 557 032 parameters."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            for shape in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt(d: int, layers: int, length: int) -> Shapes:
    """Return the shapes of a GPT with a tied head and the vocabulary of GPT-2.

    GPT-2 small is ``gpt(768, 12, 1024)``, 148 shapes and 124 439 808 parameters; that of 1.3 B
    parameters is ``gpt(2048, 24, 2048)``.
    """
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,)]
    block += [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (length, d), *(block * layers), (d,), (d,)]


def tiny(count: int = 10_000) -> Shapes:
    """Return shapes of 64 elements."""
    return [(64,)] * count


def reduced(device: torch.device) -> tuple[int, str]:
    """Return how many of the 24 layers of the 1.3 B model are measured, and words that say so.

    Parameters, gradients, the states of two AdamW and a queue are 11 float32 numbers per element;
    they get half of the memory. A CPU takes minutes for all layers: it gets one.
    """
    layer, rest = (sum(_size(s) for s in gpt(2048, n, 2048)) for n in (1, 0))
    layer -= rest
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory()
    layers = max(0, min(24, int((room / 2 / 44 - rest) / layer)))
    if device.type == "cpu":
        layers = min(layers, 1)
    return layers, "" if layers == 24 else f", {layers} of its 24 layers"


def memory() -> int:
    """Return the bytes of this machine's memory; 16 GiB where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return 16 * 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


MODELS = {"resnet50": resnet50, "gpt2": lambda: gpt(768, 12, 1024)}
