"""The conversion of a model's modules, which then sum their gradients by cluster."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gq_triton.cluster_grad.arrival import (
    as_before,
    by_sample,
    is_ordered,
    order_of,
    samples_first,
)
from gq_triton.cluster_grad.compiled_ops import unordered, use
from gq_triton.cluster_grad.converted import Converted
from gq_triton.cluster_grad.copies import recorded
from gq_triton.cluster_grad.layers.attention import attend
from gq_triton.cluster_grad.layers.embedding import EMBEDDING
from gq_triton.cluster_grad.layers.registry import Layer, is_called
from gq_triton.cluster_grad.outside import CALLED_OUTSIDE, is_outside, joined
from gq_triton.cluster_grad.passes import OUTSIDE, in_backward
from gq_triton.cluster_grad.site import SITE, Collector, parameters_of
from gq_triton.cluster_grad.standins.origin import SAME, Origin, Root, saving_hooks
from gq_triton.cluster_grad.standins.standin import StandIn, plain, stand_in
from gq_triton.untraced import Untraced

__all__ = ["Conversion"]

# The compiler of torch 2.8 fails at stand-ins, that of 2.13 takes them; none between was tried.
COMPILES_STAND_INS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module, with clustered gradients if this forward pass will have a backward pass."""
    # The compiler of torch 2.8 does not know vars(module), here and below.
    own: Converted | None = getattr(module, SITE, None)
    if own is None:  # undone while the layer was being called
        return type(module).forward(module, *args, **kwargs)
    collector, graded, token = own.collector, torch.is_grad_enabled(), own.collector.token
    # A copy of the model, a recording, a frozen layer and a part of a module that runs as a whole
    # run unchanged, and so do all modules in a forward pass that nothing measures.
    if own.module is not module or collector.paused or collector.asleep or recorded():
        return _unchanged(module, own, args, kwargs)
    if not _trains(module, own):
        return _unchanged(module, own, args, kwargs)
    if graded and not torch.compiler.is_compiling() and not in_backward() and is_outside(token):
        return _outside(module, own, args, kwargs)
    if token is None and graded and own.site is not None:
        raise RuntimeError(OUTSIDE.format(own.name))
    if token is None:
        return _unchanged(module, own, args, kwargs)
    if own.shown:
        return _hidden(module, own, token, args, kwargs)
    return _given_or_own(module, own, token, args, kwargs)


def _outside(module: nn.Module, own: Converted, args: Any, kwargs: Any) -> Any:
    """Run a module that is called outside the model's ``forward``."""
    collector = own.collector
    with joined(collector, [*args, *kwargs.values()]) as token:
        if token is not None:
            return plain(_given_or_own(module, own, token, args, kwargs))
    whole = own.site is not None and own.site.runs_whole
    for param in module.parameters(recurse=whole):
        collector.take_unknown(param, CALLED_OUTSIDE)
    return _unchanged(module, own, args, kwargs)


def _hidden(module: nn.Module, own: Converted, token: Tensor, args: Any, kwargs: Any) -> Any:
    """Run a module of which other modules see stand-ins, without them."""
    attributes = module.__dict__
    shown = {name: attributes.pop(name) for name in own.shown}
    own.shown = []
    try:
        return _given_or_own(module, own, token, args, kwargs)
    finally:
        attributes.update(shown)
        own.shown = list(shown)


def _given_or_own(module: nn.Module, own: Converted, token: Tensor, args: Any, kwargs: Any) -> Any:
    """Run a module, without clusters where it was given tensors in place of its parameters.

    ``functional_call`` does so. What they are computed from has its gradient from autograd.
    """
    whole = own.site is not None and own.site.runs_whole
    for param in parameters_of(module, whole):
        if not isinstance(param, nn.Parameter):
            return _unchanged(module, own, args, kwargs)
    return _converted(module, own, token, args, kwargs)


def _converted(module: nn.Module, own: Converted, token: Tensor, args: Any, kwargs: Any) -> Any:
    """Run a module with clustered gradients."""
    collector, graded = own.collector, torch.is_grad_enabled()
    if not torch.compiler.is_compiling() and collector.lookout.on:
        collector.lookout.see(own.name, [*args, *kwargs.values()], collector.step)
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, StandIn)]
    if own.site is not None and own.site.runs_whole:
        use(collector.clock, token, own.site.key, graded)
        if not graded:
            return _unchanged(module, own, args, kwargs)
        return _as_whole.run(module, own, token, args, kwargs)
    if own.site is None or given:
        return _stood_in(module, own, token, args, kwargs)
    return _in_family(module, own, token, args, kwargs)


def _in_family(module: nn.Module, own: Converted, token: Tensor, args: Any, kwargs: Any) -> Any:
    """Run a layer that has a family."""
    site, collector = own.site, own.collector
    assert site is not None
    if site.input_name in kwargs:
        args = (*args, kwargs.pop(site.input_name))
    x = args[0] if args else None
    order, known = order_of(x, own) if isinstance(x, Tensor) else ("", None)
    if isinstance(x, Tensor):
        x = samples_first(x, order, collector.batch)
        if own.family is EMBEDDING and not order and not by_sample(x, collector):
            return _looked_up(module, own, token, x)
        args = (x, *args[1:])
    graded = torch.is_grad_enabled()
    use(collector.clock, token, site.key, graded)
    if not graded:
        out = _unchanged(module, own, args, kwargs)
    else:
        if known is None:
            known = not isinstance(x, Tensor) or is_ordered(x, collector)
        if not known:
            unordered(collector.clock, token, site.key)
        out = site.family.forward(module, (token, site.key), *args, **kwargs)
        if known and not torch.compiler.is_compiling() and out.grad_fn is not None:
            collector.trusted.add((out.grad_fn, out.output_nr))
    return as_before(out, order, collector.batch)


@Untraced  # it compares random states, and may run the module again
def _as_whole(module: nn.Module, own: Converted, token: Tensor, args: Any, kwargs: Any) -> Any:
    """Run a module whose gradients by cluster come from runs of the whole module."""
    assert own.site is not None
    # Nothing shows whether a stand-in with B rows, such as a table of positions, has those of
    # samples.
    args, kwargs = tree_map_only(StandIn, plain, (args, kwargs))
    return own.site.family.forward(module, (token, own.site.key), *args, **kwargs)


def _trains(module: nn.Module, own: Converted) -> bool:
    """Return whether a parameter of the module itself needs a gradient."""
    whole = own.attends or (own.site is not None and own.site.runs_whole)
    for param in parameters_of(module, whole):  # noqa: SIM110 - a generator takes twice as long
        if param.requires_grad:
            return True
    return False


def _unchanged(module: nn.Module, own: Converted, args: Any, kwargs: Any) -> Any:
    """Run the module's own ``forward``."""
    if own.inner is not None:
        return own.inner(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _origin(own: Converted, token: Tensor, root: Root, start: Tensor, link: str) -> Origin:
    collector = own.collector
    # Operations that meet samples in the second dimension are not followed. Attention puts them in
    # the first one.
    batch = 0 if collector.batch_dim and not own.attends else collector.batch
    return Origin(
        token, collector.clock, batch, collector.trusted, collector.inputs, (root,), (start,), link,
        saving_hooks(),
    )  # fmt: skip


def _looked_up(module: nn.Module, own: Converted, token: Tensor, indices: Tensor) -> Any:
    """Look up rows once for all samples; return them as a stand-in."""
    rows = type(module).forward(module, indices)
    attribute = own.attributes[0]
    param = module._parameters[attribute]
    assert param is not None
    root = Root(own.keys[attribute], param, indices)
    # A change of the stand-in in place must not reach the rows, whose gradient is asked for.
    return stand_in(rows.clone(), _origin(own, token, root, rows, SAME))


def _stood_in(module: nn.Module, own: Converted, token: Tensor, args: Any, kwargs: Any) -> Any:
    """Run a module's own ``forward`` on stand-ins of its parameters."""
    attributes = module.__dict__
    placed = _place(module, own, token)
    try:
        if own.attends:
            return attend(module, *args, **kwargs)
        return _unchanged(module, own, args, kwargs)
    finally:
        for attribute in placed:
            del attributes[attribute]


def _place(module: nn.Module, own: Converted, token: Tensor) -> list[str]:
    """Put stand-ins in the places of a module's parameters; return their attributes."""
    attributes = module.__dict__
    placed: list[str] = []
    if torch.compiler.is_compiling() and (own.broken or not COMPILES_STAND_INS):
        return placed
    for attribute in own.attributes:
        param = module._parameters[attribute]
        if param is not None and param.requires_grad and attribute not in attributes:
            start = param.view(param.shape)
            bias = module._parameters[own.biases[attribute]] if attribute in own.biases else None
            root = Root(own.keys[attribute], param, bias=bias)
            # An attribute of the instance hides the parameter, which stays where it is.
            attributes[attribute] = stand_in(start, _origin(own, token, root, start, SAME))
            placed.append(attribute)
    return placed


class Conversion:
    """The conversion of modules, so that they compute clustered gradients.

    Classes, names and ``state_dict`` keys stay: only ``forward`` and an attribute are set on the
    instances.

    Args:
        layers: the modules.
        collector: the receiver of the sums.

    Raises:
        ValueError: another plug-in has converted one of the modules.
    """

    def __init__(self, layers: list[Layer], collector: Collector) -> None:
        for layer in layers:
            own = vars(layer.module).get(SITE)
            # A copy of a model has what its original had, which does not count.
            if own is not None and own.module is layer.module:
                raise ValueError(
                    "another GradQueue computes the clustered gradients of "
                    f"{layer.name or 'the model'} already: call remove() on its handle first"
                )
        self._collector = collector
        # The forward that an instance had of its own, by module.
        self._changed: dict[nn.Module, Callable[..., Any] | None] = {}
        # Kept because graphs of earlier forward passes still find their sites.
        self._replaced: list[Converted] = []
        # Layers whose parameters other modules use without calling the layer.
        self._followed: list[nn.Module] = []
        for layer in layers:
            self.convert(layer)
            if not is_called(layer.module):
                self.follow(layer.module)  # modules around a list of parameters use them

    def convert(self, layer: Layer) -> None:
        """Convert a module, or convert it in another way than before."""
        attributes = vars(layer.module)
        own = attributes.get(SITE)
        if layer.module in self._changed:
            assert own is not None
            self._replaced.append(own)
        else:
            # A copy of a model has the forward of its original.
            self._changed[layer.module] = None if own is not None else attributes.get("forward")
        attributes[SITE] = Converted(self._collector, layer, self._changed[layer.module])
        if layer.family is not None and layer.family.runs_whole:
            inside = set(layer.module.modules())
            self._followed = [module for module in self._followed if module not in inside]
        # One function for all modules: those of one kind share their compiled graph.
        attributes["forward"] = MethodType(_forward, layer.module)

    def follow(self, module: nn.Module) -> bool:
        """Follow the uses of a layer's parameters by other modules; return False if that is done.

        Args:
            module: a layer of a known kind, or a container of parameters.
        """
        if module in self._followed:
            return False
        self._followed.append(module)
        return True

    def show(self, token: Tensor) -> None:
        """Show stand-ins of the followed layers to the whole model, whose forward pass begins."""
        for module in self._followed:
            own = vars(module)[SITE]
            # The parameters of a sharded model are whole only while their module runs.
            if not any(hasattr(p, "placements") for p in module._parameters.values()):
                own.shown = _place(module, own, token)

    def hide(self) -> None:
        """Take the stand-ins of ``show`` away."""
        for module in self._followed:
            own = vars(module)[SITE]
            for attribute in own.shown:
                vars(module).pop(attribute, None)
            own.shown = []

    def undo(self) -> None:
        """Give all modules back what they had."""
        for module, inner in self._changed.items():
            del vars(module)["forward"], vars(module)[SITE]
            if inner is not None:
                vars(module)["forward"] = inner
        self._changed.clear()
        self._replaced.clear()
