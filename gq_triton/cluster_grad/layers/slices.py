"""Clustered gradients of any module whose samples do not depend on each other, run as a whole.

The backward pass runs the module again for the samples of one cluster after the other, as
activation checkpointing runs a segment again, and takes the gradients of each run. Every sample is
processed once more. Random numbers are recorded, and given again. Where a second run would not
repeat the first, because the module changes buffers or mixes samples, the graph of the first run is
kept, and each cluster's gradients come from a product with the output's gradient, masked by
cluster.

Shapes: B samples, K clusters.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gq_triton.cluster_grad import passes
from gq_triton.cluster_grad.compiled_ops import autocast_of, exact
from gq_triton.cluster_grad.layers.again import Backward
from gq_triton.cluster_grad.layers.noise import Noise, random_state
from gq_triton.cluster_grad.layers.run import OPAQUE, Run, alike, dim_of, known_of, leads, out_dim
from gq_triton.cluster_grad.site import SITE, Call, Family, Site, UnknownRows, site_of
from gq_triton.cluster_grad.step import Step
from gq_triton.replayed import refuse_replay

__all__ = ["SLICES", "parameters_of"]

_REENTRANT = "it holds a checkpoint with use_reentrant=True"


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of all parameters of a module and its submodules."""
    return tuple(name for name, _ in module.named_parameters())


def _versions(module: nn.Module) -> list[int]:
    return [buffer._version for buffer in module.buffers()]


def _forward(module: nn.Module, call: Call, *args: Any, **kwargs: Any) -> Any:
    """Run a module so that its backward pass knows the gradients by cluster."""
    run, originals = _begun(module, site_of(call[1]), args, kwargs)
    refuse_replay(
        f"{type(module).__name__} runs again for each cluster, whose sizes the host reads",
        "see report(), and call the step itself",
    )
    site, batch = run.site, run.batch
    shown = known_of(site)
    if shown.in_parts:
        _note(run, _REENTRANT)
        forward = getattr(module, SITE).inner or type(module).forward.__get__(module)
        return forward(*args, **kwargs)
    reason = _no_samples(run)
    if reason:
        return _as_one(run, reason)
    changes = [tensor._version for tensor in originals]
    inputs = [tensor.view_as(tensor) for tensor in originals]
    drew, leaves, out_spec = _watched(run, inputs)
    if changes != [tensor._version for tensor in originals]:
        return _not_known(run, leaves, out_spec, "it changes its input in place")
    if shown.repeats is None and _checkpointed(leaves, inputs):
        shown.in_parts = True
        return _not_known(run, leaves, out_spec, _REENTRANT)
    unknown = _place_outputs(run, leaves, inputs)
    if unknown is not None:
        reason = f"its output {unknown} has no dimension of {batch} samples alone"
        return _not_known(run, leaves, out_spec, reason)
    if not run.out_places:
        return tree_unflatten(leaves, out_spec)
    outputs = run.outputs(leaves)
    params = [site.param(position) for position in run.wanted]
    reason = _kept_graph(run, originals, inputs, outputs, params)
    if reason:
        return _not_known(run, leaves, out_spec, reason)
    for place in run.places:
        run.values[place] = None
    if drew or not (shown.repeats and isinstance(module, OPAQUE)):
        # One batch does not show it: an expert drops samples only where too many are sent to it.
        # The model may change the outputs in place.
        run.expected = [output.detach().clone() for output in outputs]
    out: Any = _Slices.apply(run, call, outputs, len(originals), *originals, *params)
    for place, dim, value in zip(run.out_places, run.out_dims, out, strict=True):
        leaves[place] = value
        if dim == 0:
            site.collector.trusted.add((value.grad_fn, value.output_nr))
    return tree_unflatten(leaves, out_spec)


def _no_samples(run: Run) -> str:
    """Return why no argument shows the samples; an empty string if one does."""
    if not run.ordered:
        return "its rows are in no known order"
    known = [(v, d) for v, d in zip(run.values, run.dims, strict=True) if d is not None]
    if not known or any(v.dim() <= d or v.shape[d] % run.batch for v, d in known):
        return "no argument has the samples in its first dimension"
    return ""


def _watched(run: Run, inputs: list[Tensor]) -> tuple[bool, list[Any], TreeSpec]:
    """Run the module, and note whether it can be run again.

    Returns:
        Whether it drew random numbers; its outputs and their structure.
    """
    shown, device = known_of(run.site), run.site.param(0).device
    before, versions = random_state(device), _versions(run.site.module)
    noise = Noise() if shown.draws and shown.repeats is not False else None
    leaves, out_spec = run.call(inputs, run.values, noise)
    pairs = zip(before, random_state(device), strict=True)
    drew = any(not torch.equal(earlier, later) for earlier, later in pairs)
    if drew:
        shown.draws, run.noise = True, noise
    given = not drew or (noise is not None and noise.whole)
    run.repeats = given and versions == _versions(run.site.module)
    return drew, leaves, out_spec


def _place_outputs(run: Run, leaves: list[Any], inputs: list[Tensor]) -> int | None:
    """Note where the outputs have the samples; return the first one that does not show it."""
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            dim = out_dim(run.site.module, place, leaf, run.batch)
            if dim is None and list(leaf.shape).count(run.batch) > 1:
                dim = run.dim_shown(place, leaf, inputs)
            if dim is None:
                return place
            run.out_places.append(place)
            run.out_dims.append(dim)
    return None


def _begun(
    module: nn.Module, site: Site | None, args: Any, kwargs: Any
) -> tuple[Run, list[Tensor]]:
    """Return the run of a module and those of its arguments that need a gradient."""
    assert site is not None
    batch = site.collector.batch
    forward = getattr(module, SITE).inner or type(module).forward.__get__(module)
    values, spec = tree_flatten((args, kwargs))
    positional = [*inspect.signature(forward).parameters]
    # Arguments beyond the named ones belong to the last name, that of *args.
    names = [positional[min(place, len(positional) - 1)] for place in range(len(args))]
    dims: list[int | None] = []
    lead, ordered = leads(module), True
    for name, value in [*zip(names, args, strict=True), *kwargs.items()]:
        found = [dim_of(module, name, leaf, site.collector) for leaf in tree_flatten(value)[0]]
        if name == lead:
            ordered = found[0] is not None and not isinstance(value, PackedSequence)
        dims += found
    dims = alike(module, values, dims)
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
    run = Run(site, batch, forward, values, spec, dims, places, wanted, autocast, ordered)
    return run, [values[place] for place in places]


def _as_one(run: Run, reason: str) -> Any:
    """Run the module without clusters, so that autograd finds its gradient of the whole batch."""
    inputs = [run.values[place] for place in run.places]
    return _not_known(run, *run.call(inputs, run.values), reason)


def _not_known(run: Run, leaves: list[Any], spec: TreeSpec, reason: str) -> Any:
    """Return the outputs of a run; autograd finds the parameters' gradient of the whole batch."""
    _note(run, reason)
    return tree_unflatten(leaves, spec)


def _note(run: Run, reason: str) -> None:
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


def _kept_graph(
    run: Run,
    originals: list[Tensor],
    inputs: list[Tensor],
    outputs: list[Tensor],
    params: list[Tensor],
) -> str:
    """Keep the graph of a run where the backward pass may need it; return why it cannot be kept.

    Behind the inputs of a module that is used on its own results are its earlier uses. Products
    with the outputs would go back through those too, so there a new run takes their place.
    """
    if run.repeats and known_of(run.site).repeats:
        return ""  # runs for a cluster were compared with those of the whole batch
    if not _leads_to(originals, params):
        run.graph = inputs, outputs
    elif not run.repeats:
        return "it is used on results of its own, and cannot run again"
    return ""


def _leads_to(tensors: list[Tensor], params: list[Tensor]) -> bool:
    """Return whether the graph behind tensors leads to one of some parameters."""
    stack: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and any(variable is param for param in params):
            return True
        stack.extend(parent for parent, _ in node.next_functions)
    return False


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Run, call: Call, outputs: list[Tensor], count: int, *tensors: Tensor
    ) -> Any:
        ctx.run, ctx.call = run, call
        ctx.save_for_backward(*tensors[:count])
        # The outputs are new tensors of this function, and no views: those could not be changed in
        # place.
        return tuple(output.detach() for output in outputs)

    @staticmethod
    @exact
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(passes.AGAIN)
        run = ctx.run
        step = passes.enter(*ctx.call)[1]
        backward = Backward(run, step, list(ctx.saved_tensors), list(grad_outputs))
        inputs, params = backward.gradients()
        return None, None, None, None, *inputs, *params


def _no_sums(site: Site, step: Step, tensors: list[Tensor], wanted: list[int]) -> Any:
    raise UnknownRows("a module that runs as a whole gives its sums itself")


SLICES = Family(_forward, _no_sums, runs_whole=True)
