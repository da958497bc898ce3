"""One forward pass of a module that runs as a whole, and where its samples are."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gq_triton.cluster_grad.layers.noise import Noise, random_state, set_random_state
from gq_triton.cluster_grad.layers.order import SECOND, in_order, other_order
from gq_triton.cluster_grad.site import Collector, Site

__all__ = ["OPAQUE", "Known", "Run", "alike", "dim_of", "known_of", "leads", "out_dim"]

# Modules of torch that use their submodules' weights, or functions that show nothing of theirs.
OPAQUE = nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase


@dataclass(eq=False)
class Known:
    """What runs of a module have shown; the ``options`` of its site.

    Attributes:
        repeats: whether runs for the samples of one cluster give what the run of the whole batch
            gave; None before the first backward pass.
        draws: whether it draws random numbers, which are recorded from then on.
        in_parts: whether it holds a reentrant checkpoint, so that only its parts can run.
        out_dims: by output and its number of dimensions, the dimension of the samples that a run of
            one sample has shown, or None.
    """

    repeats: bool | None = None
    draws: bool = False
    in_parts: bool = False
    out_dims: dict[tuple[int, int], int | None] = field(default_factory=dict)


def known_of(site: Site) -> Known:
    """Return what runs of a site's module have shown."""
    if site.options is None:
        site.options = Known()
    return site.options


def _kept_as_is() -> Any:
    """Keep saved tensors from the hooks of a checkpointed segment around the module.

    The segment runs again in the backward pass, and must then save what it saved before. The module
    may run in another way by then.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


@dataclass(eq=False)
class Run:
    """One forward pass of a module.

    Attributes:
        site: the module's site.
        batch: B.
        forward: the module's own forward.
        values: the arguments, with None in place of tensors that need a gradient.
        spec: the structure of the arguments.
        dims: by argument, the dimension of the samples, or None.
        places: the arguments that need a gradient.
        wanted: the positions of the parameters that need a gradient.
        autocast: enters the autocast of the forward pass.
        ordered: whether the rows that a layer of torch works on are those of samples, in order.
        out_places: the outputs with a gradient.
        out_dims: by such output, the dimension of the samples.
        graph: inputs and outputs of the run with their graph, where it is kept.
        expected: the outputs' values, where runs for some samples must be seen to give the same.
        repeats: whether another run gives the same.
        noise: the random numbers that it drew, or None.
    """

    site: Site
    batch: int
    forward: Callable[..., Any]
    values: list[Any]
    spec: TreeSpec
    dims: list[int | None]
    places: list[int]
    wanted: list[int]
    autocast: Callable[[], Any]
    ordered: bool = True
    out_places: list[int] = field(default_factory=list)
    out_dims: list[int] = field(default_factory=list)
    graph: tuple[list[Tensor], list[Tensor]] | None = None
    expected: list[Tensor] | None = None
    repeats: bool = True
    noise: Noise | None = None

    def call(
        self, inputs: list[Tensor], values: list[Any], within: Any = None
    ) -> tuple[list[Any], TreeSpec]:
        """Run the module; return its outputs and their structure.

        Args:
            inputs: the arguments that need a gradient.
            values: all arguments; those places are overwritten.
            within: what sees the module's operations, or None.
        """
        collector = self.site.collector
        values = list(values)
        for place, tensor in zip(self.places, inputs, strict=True):
            values[place] = tensor
        args, kwargs = tree_unflatten(values, self.spec)
        kept, collector.paused = collector.paused, True
        try:
            seen = contextlib.nullcontext() if within is None else within
            with torch.enable_grad(), self.autocast(), _kept_as_is(), seen:
                return tree_flatten(self.forward(*args, **kwargs))
        finally:
            collector.paused = kept

    def dim_shown(self, place: int, value: Tensor, inputs: list[Tensor]) -> int | None:
        """Return the dimension of the samples of an output that several may be; None if unknown.

        A run of the first sample alone shows it, once: there that dimension alone is shorter.

        Args:
            place: the output.
            value: its value for all samples.
            inputs: the arguments that need a gradient.
        """
        shown, key = known_of(self.site).out_dims, (place, value.dim())
        if key not in shown:
            one = self._first_sample(inputs)
            found = None if one is None else one[place]
            if isinstance(found, Tensor) and found.dim() == value.dim():
                pairs = enumerate(zip(value.shape, found.shape, strict=True))
                changed = [dim for dim, (all_, first) in pairs if all_ != first]
                whole = len(changed) == 1 and value.shape[changed[0]] == (
                    self.batch * found.shape[changed[0]]
                )
                shown[key] = changed[0] if whole else None
            else:
                shown[key] = None
        return shown[key]

    def _first_sample(self, inputs: list[Tensor]) -> list[Any] | None:
        """Return the outputs of a run of the first sample; None if it cannot be run alone."""

        def first(value: Any, dim: int | None) -> Any:
            return value if dim is None else value.narrow(dim, 0, value.shape[dim] // self.batch)

        values = [first(value, dim) for value, dim in zip(self.values, self.dims, strict=True)]
        alone = [
            first(tensor.detach(), self.dims[place]).requires_grad_()
            for place, tensor in zip(self.places, inputs, strict=True)
        ]
        device = self.site.param(0).device
        state = random_state(device)
        buffers = [(buffer, buffer.clone()) for buffer in self.site.module.buffers()]
        try:
            return self.call(alone, values)[0]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return None
        finally:
            set_random_state(device, state)
            for buffer, kept in buffers:
                buffer.data.copy_(kept)

    def outputs(self, leaves: list[Any]) -> list[Tensor]:
        """Return the outputs with a gradient."""
        return [leaves[place] for place in self.out_places]


def dim_of(module: nn.Module, name: str, value: Any, collector: Collector) -> int | None:
    """Return the dimension of the samples of an argument; None if all samples share it."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return None
    first = 0 if getattr(module, "batch_first", True) else 1
    if isinstance(module, nn.MultiheadAttention):
        if name == "attn_mask":
            return 0 if value.dim() == 3 else None
        return 0 if name == "key_padding_mask" else _where_believed(value, first, collector)
    if isinstance(module, nn.RNNBase):
        return _where_believed(value, 1 if name == "hx" else first, collector)
    rows, batch = value.shape[0], collector.batch
    if rows == 0 or rows % batch:
        return None
    if value.requires_grad:
        return 0 if in_order(value, batch, collector.trusted) else None
    return 0 if rows == batch else None


def _where_believed(value: Tensor, dim: int, collector: Collector) -> int | None:
    """Return the dimension where a layer has its samples; None if the graph does not show them."""
    batch, trusted = collector.batch, collector.trusted
    if value.dim() <= dim or not value.requires_grad or batch == 1 or (collector.batch_dim and dim):
        return dim
    shown = other_order(value, batch, trusted) == SECOND if dim else in_order(value, batch, trusted)
    return dim if shown else None


def alike(module: nn.Module, values: list[Any], dims: list[int | None]) -> list[int | None]:
    """Return the dimensions of the samples of a layer's arguments, which may tell each other's.

    Input and state of a recurrent layer have the same samples. The graph does not show those of a
    state that is a parameter, expanded to as many rows.
    """
    if isinstance(module, nn.RNNCellBase) and 0 in dims:
        return [
            0 if isinstance(v, Tensor) and v.dim() == 2 else d
            for v, d in zip(values, dims, strict=True)
        ]
    if isinstance(module, nn.RNNBase) and dims[0] is not None:
        states = [isinstance(v, Tensor) and v.dim() == 3 for v in values[1:]]
        return [dims[0], *(1 if state else d for state, d in zip(states, dims[1:], strict=True))]
    return dims


def leads(module: nn.Module) -> str:
    """Return the argument whose rows are those of the outputs; empty where it has no name."""
    names = {nn.MultiheadAttention: "query", nn.RNNBase: "input"}
    return next((name for cls, name in names.items() if isinstance(module, cls)), "")


def out_dim(module: nn.Module, place: int, value: Tensor, batch: int) -> int | None:
    """Return the dimension of the samples of an output; None if it is not known."""
    first = 0 if getattr(module, "batch_first", True) else 1
    if isinstance(module, nn.MultiheadAttention):
        return first if place == 0 else 0
    if isinstance(module, nn.RNNBase):
        return first if place == 0 else 1
    sizes = [size == batch for size in value.shape]
    if sizes.count(True) > 1:
        return None  # which of them is that of the samples?
    if True in sizes:
        # Rows of samples in dimension 0, or positions, of which there are a multiple of B?
        known = sizes[0] or value.shape[0] % batch
        return sizes.index(True) if known else None
    return 0 if value.dim() and value.shape[0] and value.shape[0] % batch == 0 else None
