"""A site, whose parameters' gradients are summed by cluster, and the families that sum them."""

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.forming import Sums
from gq_triton.cluster_grad.step import Step
from gq_triton.ring import rows

if TYPE_CHECKING:
    from gq_triton.cluster_grad.lookout import Lookout

__all__ = [
    "SITE",
    "Block",
    "Call",
    "Collector",
    "Family",
    "Site",
    "UnknownRows",
    "collector_of",
    "new_number",
    "number_of",
    "numbered",
    "parameters_of",
    "site_of",
    "whole_block",
]

# The attribute of a module that holds what its clustered forward needs, while that is installed.
SITE = "_gq_triton_site"
# The token of the forward pass and the key of the layer's site.
Call = tuple[Tensor, Tensor]
# Part of a parameter, in its memory order: first element, end, sums by cluster (K, end - first).
Block = tuple[int, int, Tensor]

_numbers = itertools.count(1)
_collectors: "weakref.WeakValueDictionary[int, Collector]" = weakref.WeakValueDictionary()
_sites: "weakref.WeakValueDictionary[int, Site]" = weakref.WeakValueDictionary()


class UnknownRows(Exception):
    """It is not known to which samples the rows of a tensor belong."""


class Collector(Protocol):
    """A receiver of layers' sums, which also follows the model's forward and backward passes.

    Attributes:
        backend: the engine that forms the layers' sums.
        batch: the number of samples of the current forward pass, as the model's inputs show it.
        batch_dim: the dimension of the samples in the model's inputs.
        inputs: by the address of an input of the model, the distance from sample to sample.
        trusted: nodes and outputs of the forward pass's graph that are known to have the samples'
            rows along their first dimension.
        lookout: what the first forward pass shows of the order of the samples.
        paused: whether modules run unchanged, as parts of a module that runs as a whole.
        asleep: whether forward passes that begin now run unchanged.
        clock: the tensor to which operations without a result write in a compiled graph.
        token: the token of the current forward pass, or None.
    """

    backend: str
    batch: int
    batch_dim: int
    inputs: Mapping[int, int]
    trusted: set[tuple[Any, int]]
    lookout: "Lookout"
    paused: bool
    asleep: bool
    step: Step | None
    clock: Tensor
    token: Tensor | None

    def new_step(self) -> Step:
        """Return the step of a forward pass that begins."""
        ...

    def enter_pass(self, step: Step) -> None:
        """Note that the running backward pass computes a step's gradients."""
        ...

    def trainable(self, params: Iterable[Tensor]) -> list[str]:
        """Return the names, in the model, of those parameters that need a gradient."""
        ...

    def take_unknown(self, param: Tensor, reason: str) -> None:
        """Note why a parameter's gradient is not known by cluster in this backward pass."""
        ...

    def uses(self, step: Step, param: Tensor) -> int:
        """Return how often a parameter was used in a forward pass."""
        ...

    def scratch(self, clusters: int, elements: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory for a parameter's sums ``(K, elements)``, valid until the next call."""
        ...

    def give(
        self, step: Step, param: Tensor, blocks: Iterator[Block], dtype: torch.dtype
    ) -> Tensor | None:
        """Take the sums of one use of a parameter; return what the layer returns as gradient.

        The collector may keep a block, and add to it, except where ``scratch`` reuses its memory.
        """
        ...

    def give_whole(self, step: Step, param: Tensor, sums: Tensor) -> Tensor | None:
        """Take the sums of one use of a whole parameter; return what ``give`` returns.

        The collector may keep them, and add to them.

        Args:
            step: the forward pass that the sums belong to.
            param: the parameter.
            sums: ``(K, *param.shape)``, each cluster's in the memory order of the parameter.
        """
        ...

    def give_sums(self, step: Step, param: Tensor, sums: Sums, scale: bool) -> Tensor | None:
        """Take the sums of one use of a shift or scale; return what ``give`` returns."""
        ...

    def give_rows(self, step: Step, param: Tensor, rows: Tensor, sums: Tensor) -> Tensor | None:
        """Take the sums of some rows of a table that is used once; return what ``give`` returns."""
        ...

    def give_lookups(
        self, step: Step, param: Tensor, where: Tensor, grads: Tensor
    ) -> Tensor | None:
        """Take the lookups of a table that is used once; return what ``give`` returns."""
        ...


class Family(NamedTuple):
    """The functions that run the layers of one kind and sum their gradients by cluster.

    Attributes:
        forward: called with ``(module, call, input)``; runs the layer's forward pass.
        gradients: called with ``(site, step, tensors, wanted)``; gives the sums of the wanted ones
            among ``(weight, bias)`` to the site's collector and returns what the collector returns.
            ``tensors`` are those that the layer's backward pass gave to ``param_grads``.
        accepts: called with a layer; returns whether its options allow sums by cluster.
        runs_whole: whether the module runs as one, with all its submodules.
    """

    forward: Callable[..., Tensor]
    gradients: Callable[["Site", Step, list[Tensor], list[int]], list[Tensor | None]]
    accepts: Callable[[nn.Module], bool] = lambda module: True
    runs_whole: bool = False


class Site:
    """Parameters of one module whose gradients are summed by cluster.

    Args:
        collector: the receiver of the sums.
        name: the module's name in the model.
        module: the module.
        family: the family that forms the sums.
        attributes: by position, the names of the parameters in the module; a dot leads to a
            submodule.
    """

    def __init__(
        self,
        collector: Collector,
        name: str,
        module: nn.Module,
        family: Family,
        attributes: Sequence[str] = ("weight", "bias"),
    ) -> None:
        self.collector, self.name, self.module, self.family = collector, name, module, family
        self.attributes = tuple(name for name in attributes if _holds(module, name))
        self._places = [name.rpartition(".")[::2] for name in self.attributes]
        # By position, the parameter that was there last, and its name in the model.
        self._names: list[tuple[Tensor, str] | None] = [None for _ in self.attributes]
        # What the family knows of the module or of a call besides its tensors.
        self.options: Any = None
        # The name of the input in the module's own forward().
        self.input_name = [*inspect.signature(type(module).forward).parameters, "", ""][1]
        # A tensor is an input of a compiled graph, so layers of one kind share their graph.
        self.key = numbered(next(_numbers))
        _sites[number_of(self.key)] = self

    @property
    def runs_whole(self) -> bool:
        """Whether the module runs as one, with all its submodules."""
        return self.family.runs_whole

    def __deepcopy__(self, memo: dict[int, Any]) -> "Site":
        """Return the site itself: a copy of the model has no clusters."""
        return self

    def param(self, position: int) -> Tensor:
        """Return the parameter at a position."""
        path, attribute = self._places[position]
        owner = self.module.get_submodule(path) if path else self.module
        param = owner._parameters[attribute]
        assert param is not None
        return param

    def trainable(self) -> list[str]:
        """Return the names, in the model, of the site's parameters that need a gradient."""
        names = []
        for position, known in enumerate(self._names):
            param = self.param(position)
            if not param.requires_grad:
                continue
            if known is None or known[0] is not param:
                (name,) = self.collector.trainable([param])
                known = self._names[position] = param, name
            names.append(known[1])
        return names

    def take_unknown(self, position: int, reason: str) -> None:
        """Note why a parameter's gradient is not known by cluster in this backward pass."""
        self.collector.take_unknown(self.param(position), reason)

    def scratch(self, clusters: int, elements: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory for sums ``(K, elements)``, valid until the next call."""
        return self.collector.scratch(clusters, elements, like, dtype)

    def used_once(self, step: Step, position: int) -> bool:
        """Return whether the forward pass used a parameter only once."""
        return self.collector.uses(step, self.param(position)) == 1

    def give(
        self, step: Step, position: int, blocks: Iterator[Block], dtype: torch.dtype
    ) -> Tensor | None:
        """Give the sums of one use of a parameter; return what is returned as its gradient."""
        return self.collector.give(step, self.param(position), blocks, dtype)

    def give_whole(self, step: Step, position: int, sums: Tensor) -> Tensor | None:
        """Give the sums ``(K, *shape)`` of a whole parameter; return what ``give`` returns."""
        return self.collector.give_whole(step, self.param(position), sums)

    def give_sums(self, step: Step, position: int, sums: Sums, scale: bool) -> Tensor | None:
        """Give the sums of one use of a shift or scale; return what ``give`` returns."""
        return self.collector.give_sums(step, self.param(position), sums, scale)

    def give_rows(self, step: Step, position: int, rows: Tensor, sums: Tensor) -> Tensor | None:
        """Give the sums of some rows of a table that is used once; return what ``give`` returns."""
        return self.collector.give_rows(step, self.param(position), rows, sums)

    def give_lookups(
        self, step: Step, position: int, where: Tensor, grads: Tensor
    ) -> Tensor | None:
        """Give the lookups of a table that is used once; return what ``give`` returns."""
        return self.collector.give_lookups(step, self.param(position), where, grads)


def whole_block(sums: Tensor) -> Iterator[Block]:
    """Return the sums ``(K, *shape)`` of a whole parameter as ``give`` takes them."""
    flat = rows(sums)
    return iter([(0, flat.shape[1], flat)])


def _holds(module: nn.Module, attribute: str) -> bool:
    path, _, name = attribute.rpartition(".")
    return module.get_submodule(path)._parameters.get(name) is not None


def parameters_of(module: nn.Module, whole: bool) -> Iterable[Tensor]:
    """Return ``module.parameters(recurse=whole)``, which takes long to find a module's own."""
    if whole or torch.compiler.is_compiling():
        return module.parameters(recurse=whole)
    return [param for param in module._parameters.values() if param is not None]


def numbered(number: int) -> Tensor:
    """Return a number as a tensor on the CPU, whatever the default device is.

    The tensor remembers the number as an attribute: the host reads it many times in every layer.
    """
    key: Any = torch.tensor(number, device="cpu")
    key._gq_number = number
    return key


def number_of(key: Tensor) -> int:
    """Return the number that a tensor holds; a compiled graph has tensors that remember none."""
    number = getattr(key, "_gq_number", None)
    return int(key) if number is None else number


def new_number(collector: Collector | None = None) -> int:
    """Return a new number; ``collector_of`` finds the collector by it."""
    number = next(_numbers)
    if collector is not None:
        _collectors[number] = collector
    return number


def collector_of(number: int) -> Collector:
    """Return the collector that has a number."""
    return _collectors[number]


def site_of(key: Tensor) -> Site | None:
    """Return the site that has a key; None if its plug-in was removed."""
    return _sites.get(number_of(key))
