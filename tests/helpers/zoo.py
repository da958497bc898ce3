"""The zoo: architectures of many kinds, small and random, with a batch and a loss for each.

The cases are in ``zoo_plain`` (torch alone), ``zoo_text`` and ``zoo_media`` (Transformers, PEFT)
and ``zoo_timm``; ``zoo_oracle`` compares their clustered gradients with plain backward passes.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """How large a model is built.

    Attributes:
        width: numbers per position.
        heads: heads of attention.
        depth: layers.
        length: positions of a sequence.
        vocabulary: rows of the token table.
        image: height and width of an image.
    """

    width: int = 16
    heads: int = 2
    depth: int = 2
    length: int = 8
    vocabulary: int = 31
    image: int = 32


TINY = Size()
# For times: the arithmetic of a step takes longer than the Python between its operations.
SMALL = Size(width=128, heads=4, length=64, vocabulary=1000, image=64)

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: the name in tables.
        group: the heading in tables.
        build: returns the model of a size, with its random initial weights.
        inputs: returns the keywords of the model's forward pass for a batch of a size.
        outputs: returns the tensors ``(B, ...)`` of the model's output that the loss is made of.
        needs: the package that builds it, besides torch.
        features: the layer of the features; None takes the first that gives rows by sample.
    """

    name: str
    group: str
    build: Callable[[Size], nn.Module]
    inputs: Callable[[Size, int], Inputs]
    outputs: Callable[[Any], list[Tensor]]
    needs: str = "torch"
    features: str | None = None


def first_output(output: Any) -> list[Tensor]:
    """Return the tensor that a model's output is about."""
    if isinstance(output, Tensor):
        return [output]
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return [getattr(output, name)]
    return [output[0]]


def tokens(size: Size, batch: int) -> Inputs:
    return {"input_ids": torch.randint(3, size.vocabulary, (batch, size.length))}


def numbers(size: Size, batch: int) -> Inputs:
    """Return vectors ``(B, T, width)``."""
    return {"x": torch.randn(batch, size.length, size.width)}


def pictures(size: Size, batch: int) -> Inputs:
    return {"x": torch.randn(batch, 3, size.image, size.image)}


def prepared(case: Case, size: Size, dtype: torch.dtype, moved: bool = True) -> nn.Module:
    """Return the model of a case, ready to be compared.

    Dropout is off, and batch norms use their running statistics: only then has each sample a
    gradient that does not depend on the others.

    Args:
        case: the architecture.
        size: how large the model is.
        dtype: the type of its parameters.
        moved: whether its weights are moved away from zeros and ones, so that no gradient is zero
            by initialisation.
    """
    torch.manual_seed(0)
    model = case.build(size).to(dtype)
    if moved:
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.1 * torch.randn_like(param))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def batch_of(case: Case, size: Size, samples: int, dtype: torch.dtype, seed: int) -> Inputs:
    """Return the keywords of a forward pass; floating ones in ``dtype``."""
    torch.manual_seed(seed)
    given = case.inputs(size, samples)
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}


def losses_of(case: Case, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return a loss for each sample ``(B,)``: the squared distance from fixed random numbers.

    The numbers are the same for all samples.
    """
    total: Tensor | None = None
    for output in case.outputs(model(**batch)):
        noise = torch.Generator().manual_seed(7)
        target = torch.randn(output.shape[1:], generator=noise, dtype=torch.float64).to(output)
        losses = (output - target).square().flatten(1).mean(1)
        total = losses if total is None else total + losses
    assert total is not None
    return total


def cases(installed_only: bool = True) -> dict[str, Case]:
    """Return all cases by name."""
    from zoo_media import MEDIA
    from zoo_plain import PLAIN
    from zoo_text import TEXT
    from zoo_timm import TIMM

    found = [*PLAIN, *TEXT, *MEDIA, *TIMM]
    if installed_only:
        found = [case for case in found if importlib.util.find_spec(case.needs) is not None]
    return {case.name: case for case in found}
