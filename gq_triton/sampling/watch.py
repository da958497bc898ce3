"""The hook that sees what the model answers to a batch in training, and the model as it scores."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gq_triton.grouping.features import first_dimensions

__all__ = ["Watch", "device_of", "evaluation_mode", "run_model", "scorer"]


class Watch:
    """A forward hook that passes on the first training answer of as many samples as it waits for.

    A copy or a file of the model holds the hook, but one that waits for nothing.

    Args:
        take: a method that gets the answer, or None for a hook without use.
    """

    def __init__(self, take: Callable[[Any], None] | None = None) -> None:
        self._take = None if take is None else weakref.WeakMethod(take)
        self.samples = 0  # how many samples the answer must have; 0 waits for none

    def __reduce__(self) -> tuple[type["Watch"], tuple[()]]:
        """Return how a copy is made: without the loader."""
        return Watch, ()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Take the output, if it is awaited."""
        if torch.compiler.is_compiling() or not self.samples or not torch.is_grad_enabled():
            return
        take = None if self._take is None else self._take()
        if take is None or self.samples not in first_dimensions(output):
            return
        self.samples = 0
        take(output)


def scorer(model: nn.Module) -> nn.Module:
    """Return the module that scores: DDP's own ``forward`` would send buffers to other ranks."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters or buffers, the CPU if it has none."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run the model as in evaluation; every module's mode comes back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Return what a model answers to inputs: keywords in a dict, arguments in a list or tuple."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
