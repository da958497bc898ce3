"""Clustered gradients of any module whose samples do not depend on each other, run as a whole.

The backward pass runs the module again for the samples of one cluster after the other, as
activation checkpointing runs a segment again, and takes the gradients of each run. Every sample is
processed once more. Where a second run would not repeat the first, because the module draws random
numbers or changes buffers, the graph of the first run is kept, and each cluster's gradients come
from a product with the output's gradient, masked by cluster.

Shapes: B samples, K clusters.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gq_triton.cluster_grad import passes
from gq_triton.cluster_grad.compiled_ops import autocast_of, exact
from gq_triton.cluster_grad.layers.order import in_order
from gq_triton.cluster_grad.layers.rows import accumulation_type
from gq_triton.cluster_grad.site import SITE, Call, Collector, Family, Site, UnknownRows, site_of
from gq_triton.cluster_grad.step import Step
from gq_triton.grouping.groups import Groups
from gq_triton.ring import flat

__all__ = ["OPAQUE", "SLICES", "parameters_of"]

# Modules of torch that use their submodules' weights, or functions that show nothing of theirs.
_IN_PARTS, _REENTRANT = "in parts", "it holds a checkpoint with use_reentrant=True"
OPAQUE = nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of all parameters of a module and its submodules."""
    return tuple(name for name, _ in module.named_parameters())


def _kept_as_is() -> Any:
    """Keep saved tensors from the hooks of a checkpointed segment around the module.

    The segment runs again in the backward pass, and must then save what it saved before. The module
    may run in another way by then.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


@dataclass(eq=False)
class _Run:
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
        out_places: the outputs with a gradient.
        out_dims: by such output, the dimension of the samples.
        graph: inputs and outputs of the run with their graph, where it is kept.
        expected: the outputs' values, where runs for some samples must be seen to give the same.
        repeats: whether another run gives the same.
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
    out_places: list[int] = field(default_factory=list)
    out_dims: list[int] = field(default_factory=list)
    graph: tuple[list[Tensor], list[Tensor]] | None = None
    expected: list[Tensor] | None = None
    repeats: bool = True

    def call(self, inputs: list[Tensor], values: list[Any]) -> tuple[list[Any], TreeSpec]:
        """Run the module; return its outputs and their structure.

        Args:
            inputs: the arguments that need a gradient.
            values: all arguments; those places are overwritten.
        """
        collector = self.site.collector
        values = list(values)
        for place, tensor in zip(self.places, inputs, strict=True):
            values[place] = tensor
        args, kwargs = tree_unflatten(values, self.spec)
        kept, collector.paused = collector.paused, True
        try:
            with torch.enable_grad(), self.autocast(), _kept_as_is():
                return tree_flatten(self.forward(*args, **kwargs))
        finally:
            collector.paused = kept

    def outputs(self, leaves: list[Any]) -> list[Tensor]:
        """Return the outputs with a gradient."""
        return [leaves[place] for place in self.out_places]


def _dim(module: nn.Module, name: str, value: Any, collector: Collector) -> int | None:
    """Return the dimension of the samples of an argument; None if all samples share it."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return None
    first = 0 if getattr(module, "batch_first", True) else 1
    if isinstance(module, nn.MultiheadAttention):
        if name == "attn_mask":
            return 0 if value.dim() == 3 else None
        return 0 if name == "key_padding_mask" else first
    if isinstance(module, nn.RNNBase):
        return 1 if name == "hx" else first
    rows, batch = value.shape[0], collector.batch
    if rows == 0 or rows % batch:
        return None
    if value.requires_grad:
        return 0 if in_order(value, batch, collector.trusted) else None
    return 0 if rows == batch else None


def _out_dim(module: nn.Module, place: int, value: Tensor, batch: int) -> int | None:
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


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _versions(module: nn.Module) -> list[int]:
    return [buffer._version for buffer in module.buffers()]


def _forward(module: nn.Module, call: Call, *args: Any, **kwargs: Any) -> Any:
    """Run a module so that its backward pass knows the gradients by cluster."""
    run, originals = _begun(module, site_of(call[1]), args, kwargs)
    site, batch = run.site, run.batch
    if site.options == _IN_PARTS:
        _note(run, _REENTRANT)
        forward = getattr(module, SITE).inner or type(module).forward.__get__(module)
        return forward(*args, **kwargs)
    known = [(v, d) for v, d in zip(run.values, run.dims, strict=True) if d is not None]
    if not known or any(v.dim() <= d or v.shape[d] % batch for v, d in known):
        return _as_one(run, "no argument has the samples in its first dimension")
    device = site.param(0).device
    before, versions = _random_state(device), _versions(module)
    changes = [tensor._version for tensor in originals]
    inputs = [tensor.view_as(tensor) for tensor in originals]
    leaves, out_spec = run.call(inputs, run.values)
    if changes != [tensor._version for tensor in originals]:
        return _not_known(run, leaves, out_spec, "it changes its input in place")
    if site.options is None and _checkpointed(leaves, inputs):
        site.options = _IN_PARTS
        return _not_known(run, leaves, out_spec, _REENTRANT)
    after = _random_state(device)
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    run.repeats = same and versions == _versions(module)
    unknown = _place_outputs(run, leaves)
    if unknown is not None:
        reason = f"its output {unknown} has no dimension of {batch} samples alone"
        return _not_known(run, leaves, out_spec, reason)
    if not run.out_places:
        return tree_unflatten(leaves, out_spec)
    outputs = run.outputs(leaves)
    if not (run.repeats and site.options is True):  # no run for a cluster was compared with it
        run.graph = inputs, outputs
    for place in run.places:
        run.values[place] = None
    params = [site.param(position) for position in run.wanted]
    detached = [output.detach() for output in outputs]
    if not (site.options is True and isinstance(module, OPAQUE)):
        # One batch does not show it: an expert drops samples only where too many are sent to it.
        run.expected = detached
    out: Any = _Slices.apply(run, call, len(originals), *originals, *params, *detached)
    for place, dim, value in zip(run.out_places, run.out_dims, out, strict=True):
        leaves[place] = value
        if dim == 0:
            site.collector.trusted.add((value.grad_fn, value.output_nr))
    return tree_unflatten(leaves, out_spec)


def _place_outputs(run: _Run, leaves: list[Any]) -> int | None:
    """Note where the outputs have the samples; return the first one that does not show it."""
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            dim = _out_dim(run.site.module, place, leaf, run.batch)
            if dim is None:
                return place
            run.out_places.append(place)
            run.out_dims.append(dim)
    return None


def _begun(
    module: nn.Module, site: Site | None, args: Any, kwargs: Any
) -> tuple[_Run, list[Tensor]]:
    """Return the run of a module and those of its arguments that need a gradient."""
    assert site is not None
    batch = site.collector.batch
    forward = getattr(module, SITE).inner or type(module).forward.__get__(module)
    values, spec = tree_flatten((args, kwargs))
    positional = [*inspect.signature(forward).parameters]
    # Arguments beyond the named ones belong to the last name, that of *args.
    names = [positional[min(place, len(positional) - 1)] for place in range(len(args))]
    dims: list[int | None] = []
    for name, value in [*zip(names, args, strict=True), *kwargs.items()]:
        dims += [_dim(module, name, leaf, site.collector) for leaf in tree_flatten(value)[0]]
    tensors = [isinstance(value, Tensor) and value.dim() > 0 for value in values]
    # A tensor that needs no gradient, such as a mask, may have the n B rows of one that does.
    rows = {v.shape[0] for v, d in zip(values, dims, strict=True) if d == 0 and v.requires_grad}
    if not isinstance(module, OPAQUE):
        for place, value in enumerate(values):
            if tensors[place] and not value.requires_grad and value.shape[0] in rows:
                dims[place] = 0
    places = [i for i, value in enumerate(values) if tensors[i] and value.requires_grad]
    params = [site.param(position) for position in range(len(site.attributes))]
    wanted = [position for position, param in enumerate(params) if param.requires_grad]
    autocast = autocast_of(params[0].device.type)
    run = _Run(site, batch, forward, values, spec, dims, places, wanted, autocast)
    return run, [values[place] for place in places]


def _as_one(run: _Run, reason: str) -> Any:
    """Run the module without clusters, so that autograd finds its gradient of the whole batch."""
    inputs = [run.values[place] for place in run.places]
    return _not_known(run, *run.call(inputs, run.values), reason)


def _not_known(run: _Run, leaves: list[Any], spec: TreeSpec, reason: str) -> Any:
    """Return the outputs of a run; autograd finds the parameters' gradient of the whole batch."""
    _note(run, reason)
    return tree_unflatten(leaves, spec)


def _note(run: _Run, reason: str) -> None:
    for position in run.wanted:
        run.site.collector.take_unknown(run.site.param(position), reason)


def _checkpointed(leaves: list[Any], inputs: list[Tensor]) -> bool:
    """Return whether outputs went through a reentrant checkpoint, which forbids products of them.

    Args:
        leaves: the outputs.
        inputs: where the graph of the module begins.
    """
    stack: list[Any] = [leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor)]
    seen = {tensor.grad_fn for tensor in inputs}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__.startswith("CheckpointFunction"):
            return True
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    return False


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, call: Call, count: int, *tensors: Tensor) -> Any:
        ctx.run, ctx.call, ctx.count = run, call, count
        ctx.save_for_backward(*tensors[:count])
        # The outputs are new tensors of this function.
        return tuple(t.view_as(t) for t in tensors[count + len(run.wanted) :])

    @staticmethod
    @exact
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(passes.AGAIN)
        run = ctx.run
        step = passes.enter(*ctx.call)[1]
        backward = _Backward(run, step, list(ctx.saved_tensors), list(grad_outputs))
        inputs, params = backward.gradients()
        return None, None, None, *inputs, *params, *[None for _ in run.out_places]


class _Backward:
    """The backward pass of one run of a module.

    Args:
        run: the run.
        step: the forward pass of the model.
        inputs: the arguments that need a gradient.
        grads: the gradients of the outputs.
    """

    def __init__(
        self, run: _Run, step: Step, inputs: list[Tensor], grads: list[Tensor | None]
    ) -> None:
        self.run, self.step, self.inputs = run, step, inputs
        self.grads = grads
        self.params = [run.site.param(position) for position in run.wanted]

    def gradients(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return the gradients of inputs and what is returned for the parameters."""
        run, groups = self.run, self.step.groups
        collector = run.site.collector
        kept, collector.paused = collector.paused, True
        try:
            if groups.labels.numel() != run.batch:
                return self._whole()
            found = None
            if run.repeats and run.site.options is not False:
                found = self._sliced(groups)
            if found is None:
                found = self._masked(groups)
        finally:
            collector.paused = kept
        inputs, sums = found
        results = []
        for position, param, total in zip(run.wanted, self.params, sums, strict=True):
            if total is None:
                results.append(None)
                continue
            blocks = iter([(0, param.numel(), total)])
            results.append(run.site.give(self.step, position, blocks, total.dtype))
        return inputs, results

    def _graph(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return inputs and outputs with a graph: the one that was kept, or that of a new run."""
        if self.run.graph is not None:
            return self.run.graph
        inputs = [tensor.detach().requires_grad_() for tensor in self.inputs]
        return inputs, self.run.outputs(self.run.call(inputs, self.run.values)[0])

    def _differentiate(
        self, outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor | None], more: bool
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        found = torch.autograd.grad(
            [output for output, _ in pairs], [*inputs, *self.params], [grad for _, grad in pairs],
            retain_graph=more, allow_unused=True,
        )  # fmt: skip
        return list(found[: len(inputs)]), list(found[len(inputs) :])

    def _whole(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return gradients of the whole batch: the samples are not those that were clustered."""
        for param in self.params:
            clustered = self.step.groups.labels.numel()
            reason = f"it saw {self.run.batch} samples, and {clustered} were clustered"
            self.run.site.collector.take_unknown(param, reason)
        inputs, outputs = self._graph()
        return self._differentiate(outputs, inputs, self.grads, more=False)

    def _masked(self, groups: Groups) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return the gradients of the inputs, and the parameters' sums by cluster."""
        inputs, outputs = self._graph()
        totals: list[Tensor | None] = [None for _ in inputs]
        sums: list[Tensor | None] = [None for _ in self.params]
        clusters = [k for k, size in enumerate(groups.sizes) if size]
        for k in clusters:
            grads = [
                None if grad is None else grad * _mask(groups.members[k], grad, dim)
                for grad, dim in zip(self.grads, self.run.out_dims, strict=True)
            ]
            more = k != clusters[-1]
            of_inputs, of_params = self._differentiate(outputs, inputs, grads, more)
            for place, grad in enumerate(of_inputs):
                if grad is not None:
                    known = totals[place]
                    totals[place] = grad if known is None else known + grad
            self._keep(sums, k, of_params, groups)
        return totals, sums

    def _sliced(self, groups: Groups) -> tuple[list[Tensor | None], list[Tensor | None]] | None:
        """Return what ``_masked`` does, from a run for each cluster; None if runs differ.

        The site's ``options`` are None before the first backward pass, then True if such runs have
        given what the run of the whole batch gave, else False. Of a module that holds a reentrant
        checkpoint they are ``_IN_PARTS``.
        """
        run = self.run
        # The functions of BatchNorm write to buffers without counting it as a change.
        known = run.site.options is True
        buffers = [] if known else [(b, b.clone()) for b in run.site.module.buffers()]
        totals: list[Tensor | None] = [None for _ in self.inputs]
        sums: list[Tensor | None] = [None for _ in self.params]
        for k, samples in enumerate(groups.order.split(groups.sizes)):
            if not len(samples):
                continue
            values = [self._rows(v, d, samples) for v, d in zip(run.values, run.dims, strict=True)]
            dims = [run.dims[place] for place in run.places]
            inputs = [
                self._rows(tensor, dim, samples).detach().requires_grad_()
                for tensor, dim in zip(self.inputs, dims, strict=True)
            ]
            outputs = self._repeated(inputs, values)
            if _restored(buffers) or outputs is None or not self._same(outputs, samples):
                run.site.options = False
                return None
            grads = [
                None if grad is None else self._rows(grad, dim, samples)
                for grad, dim in zip(self.grads, run.out_dims, strict=True)
            ]
            of_inputs, of_params = self._differentiate(outputs, inputs, grads, more=False)
            for place, (grad, dim) in enumerate(zip(of_inputs, dims, strict=True)):
                if grad is None:
                    continue
                if totals[place] is None:
                    totals[place] = torch.zeros_like(self.inputs[place], dtype=grad.dtype)
                total: Any = totals[place]
                if dim is None:
                    total += grad
                else:
                    total.index_copy_(dim, self._places(total.shape[dim], samples), grad)
            self._keep(sums, k, of_params, groups)
        run.site.options = True
        return totals, sums

    def _repeated(self, inputs: list[Tensor], values: list[Any]) -> list[Tensor] | None:
        """Run the module for some samples; None if it cannot be."""
        try:
            return self.run.outputs(self.run.call(inputs, values)[0])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return None

    def _same(self, outputs: list[Tensor], samples: Tensor) -> bool:
        """Return whether a run for some samples gives what the run for all of them gave."""
        if self.run.expected is None:
            return True
        for new, old, dim in zip(outputs, self.run.expected, self.run.out_dims, strict=True):
            old = self._rows(old, dim, samples)
            if new.shape != old.shape:
                return False
            limit = torch.finfo(old.dtype).eps ** 0.5 * (old.abs().amax() + 1e-30)
            if not bool((new.detach() - old).abs().amax() <= limit):
                return False
        return True

    def _places(self, rows: int, samples: Tensor) -> Tensor:
        """Return the places of some samples' rows, which lie together for each sample."""
        each = rows // self.run.batch
        if each == 1:
            return samples
        within = torch.arange(each, device=samples.device)
        return (samples[:, None] * each + within).flatten()

    def _rows(self, value: Any, dim: int | None, samples: Tensor) -> Any:
        if dim is None or value is None:
            return value
        return value.index_select(dim, self._places(value.shape[dim], samples))

    def _keep(
        self, sums: list[Tensor | None], k: int, grads: list[Tensor | None], groups: Groups
    ) -> None:
        """Write the gradients of a cluster's samples among the sums."""
        for place, (grad, param) in enumerate(zip(grads, self.params, strict=True)):
            if grad is None:
                continue
            total = sums[place]
            if total is None:
                dtype = accumulation_type(grad.dtype)
                total = torch.zeros(
                    groups.n_clusters, param.numel(), dtype=dtype, device=grad.device
                )
                sums[place] = total
            total[k] = flat(grad, like=param)


def _restored(buffers: list[tuple[Tensor, Tensor]]) -> bool:
    """Give buffers their values back; return whether one had others."""
    changed = [(buffer, kept) for buffer, kept in buffers if not torch.equal(buffer, kept)]
    for buffer, kept in changed:
        buffer.data.copy_(kept)
    return bool(changed)


def _mask(members: Tensor, grad: Tensor, dim: int) -> Tensor:
    """Return a factor that keeps the rows of some samples along a dimension."""
    rows = members.repeat_interleave(grad.shape[dim] // len(members))
    return rows.to(grad.dtype).view([-1 if d == dim else 1 for d in range(grad.dim())])


def _no_sums(site: Site, step: Step, tensors: list[Tensor], wanted: list[int]) -> Any:
    raise UnknownRows("a module that runs as a whole gives its sums itself")


SLICES = Family(_forward, _no_sums, runs_whole=True)
