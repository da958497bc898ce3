"""The stand-in: a tensor computed from parameters alone, which follows the operations on it."""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from gq_triton.cluster_grad.compiled_ops import use
from gq_triton.cluster_grad.layers.conv import CONV, Geometry, convolved
from gq_triton.cluster_grad.layers.embedding import EMBEDDING, embedded
from gq_triton.cluster_grad.layers.linear import CONV1D, LINEAR, linear
from gq_triton.cluster_grad.layers.order import in_order, is_view_of_input
from gq_triton.cluster_grad.site import site_of
from gq_triton.cluster_grad.standins.meet import expanded, routed, tapped
from gq_triton.cluster_grad.standins.operations import (
    CHANGING,
    CONVOLVED,
    ELEMENTWISE,
    JOINED,
    MULTIPLIED,
    NORMALISED,
    TAPPED,
    link_of,
    tensors_of,
)
from gq_triton.cluster_grad.standins.origin import (
    OTHER,
    SAME,
    Origin,
    linked,
    merged,
    saving_hooks,
)

__all__ = ["StandIn", "plain", "stand_in", "without_stand_ins"]


class StandIn(Tensor):
    """A tensor that stands for a parameter, or for what is computed from parameters alone."""

    _gq_origin: Origin
    # How often the memory had been written to when the stand-in was made.
    _gq_version: int

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on stand-ins; its result is one too unless an operand has samples."""
        with torch._C.DisableTorchFunctionSubclass():
            given, named = tuple(args), kwargs or {}
            if any(_is_spoilt(tensor) for tensor in tensors_of([*given, *named.values()])):
                given, named = tree_map_only(StandIn, _unless_valid, (given, named))
                if not any(isinstance(t, StandIn) for t in tensors_of([*given, *named.values()])):
                    return func(*given, **named)
            return _run(func, given, named)


def _is_spoilt(tensor: Tensor) -> bool:
    """Return whether a tensor is a stand-in that no longer is what its origin says, or may be."""
    if not isinstance(tensor, StandIn) or torch.compiler.is_compiling():
        return False
    origin = tensor._gq_origin
    if saving_hooks() != origin.hooks or (torch.is_grad_enabled() and not tensor.requires_grad):
        return True
    if tensor._version == tensor._gq_version:
        return False
    # Autograd allows changes in the memory of a parameter only where it does not look.
    memory = tensor.untyped_storage().data_ptr()
    return all(root.param.untyped_storage().data_ptr() != memory for root in origin.roots)


def _unless_valid(tensor: Tensor) -> Tensor:
    return _plain(tensor) if _is_spoilt(tensor) else tensor


def stand_in(tensor: Tensor, origin: Origin) -> StandIn:
    """Return a stand-in with the values and the graph of a tensor."""
    made = tensor.as_subclass(StandIn)
    made._gq_origin, made._gq_version = origin, tensor._version
    return made


def plain(value: Any) -> Any:
    """Return a stand-in as an ordinary tensor with the same graph; any other value as it is."""
    if not isinstance(value, StandIn):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return _plain(value)


def without_stand_ins(output: Any) -> Any:
    """Return a model's output with ordinary tensors in place of stand-ins."""
    if isinstance(output, Tensor):
        return plain(output)
    if type(output) in (tuple, list):
        return type(output)([without_stand_ins(value) for value in output])
    if isinstance(output, MutableMapping):
        for key in list(output):
            if isinstance(output[key], StandIn):
                output[key] = plain(output[key])
    return output


def _plain(tensor: Tensor) -> Tensor:
    return tensor.view(tensor.shape)


def _of_samples(tensor: Tensor, origin: Origin) -> bool:
    """Return whether the rows of a tensor are known to belong to samples, in their order."""
    if tensor.dim() == 0 or isinstance(tensor, (StandIn, nn.Parameter)):
        return False
    rows, batch = tensor.shape[0], origin.batch
    if batch == 0 or rows == 0 or rows % batch:
        return False
    if tensor.requires_grad or not torch.is_grad_enabled():
        return in_order(tensor, batch, origin.trusted)
    # Nothing tells a constant from samples that need no gradient, except the model's own inputs.
    return not torch.compiler.is_compiling() and is_view_of_input(tensor, origin.inputs, batch)


def _of_known(out: Tensor, origin: Origin) -> Tensor:
    """Return the result of a family's operation on samples, whose rows are theirs as well."""
    if not torch.compiler.is_compiling() and out.grad_fn is not None:
        origin.trusted.add((out.grad_fn, out.output_nr))
    return out


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args and isinstance(args[0], StandIn) and func in CHANGING:
        return _other(func, args, kwargs)
    if func in ELEMENTWISE and "out" not in kwargs:
        return _elementwise(func, args, kwargs)
    if func in JOINED and args and "out" not in kwargs:
        return _joined(func, args, kwargs)
    if func is F.linear:
        return _linear(*args, **kwargs)
    if func is F.embedding:
        return _embedding(func, args, kwargs)
    if func in CONVOLVED:
        return _convolution(func, args, kwargs)
    if func in NORMALISED:
        return _normalised(func, args, kwargs)
    if func in MULTIPLIED:
        return _product(func, args, kwargs)
    if func is F.scaled_dot_product_attention:
        return _attention(func, args, kwargs)
    if func is F.prelu:
        return _prelu(*args, **kwargs)
    return _other(func, args, kwargs)


def _other(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation that does not meet the samples in a known way."""
    if func in TAPPED and not torch.compiler.is_compiling():
        return _tapped(func, args, kwargs)
    out = func(*args, **kwargs)
    if isinstance(out, Tensor):
        return _follow(func, args, kwargs, out)
    if isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
        parts = [_follow(func, args, kwargs, part) for part in out]
        return type(out)(parts) if type(out) in (tuple, list) else out
    return out


def _tapped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation whose result shows whether it has the samples in dimension 0."""
    given = tensors_of([*args, *kwargs.values()])
    stand_ins: list[Any] = [tensor for tensor in given if isinstance(tensor, StandIn)]
    origin: Origin = stand_ins[0]._gq_origin
    others = [tensor for tensor in given if not isinstance(tensor, StandIn)]
    samples = [tensor for tensor in others if _of_samples(tensor, origin)]
    if not samples or not torch.is_grad_enabled():
        out = func(*args, **kwargs)
        return _follow(func, args, kwargs, out) if isinstance(out, Tensor) else out
    spec = tree_flatten((args, kwargs))

    def arguments(values: list[Tensor]) -> tuple[Any, Any]:
        places = iter(values)
        leaves = [next(places) if isinstance(leaf, StandIn) else leaf for leaf in spec[0]]
        return tree_unflatten(leaves, spec[1])

    given_values = [(_plain(stand), stand._gq_origin) for stand in stand_ins]
    out = tapped(func, given_values, arguments, samples[0].shape[0])
    return func(*args, **kwargs) if out is None else out


def _follow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
    """Return a result as a stand-in, if it comes from parameters and constants alone."""
    if not out.is_floating_point() or (torch.is_grad_enabled() and not out.requires_grad):
        return out
    given = tensors_of([*args, *kwargs.values()])
    stand_ins = [tensor for tensor in given if isinstance(tensor, StandIn)]
    origin: Origin = stand_ins[0]._gq_origin
    # Other tensors with a gradient: samples, or parameters that no stand-in stands for, whose
    # gradient a route through stand-ins would not reach.
    others = [tensor for tensor in given if not isinstance(tensor, StandIn)]
    if any(tensor.requires_grad or _of_samples(tensor, origin) for tensor in others):
        return out
    link = link_of(func, args, stand_ins[0], out) if len(stand_ins) == 1 else OTHER
    if link == OTHER and torch.compiler.is_compiling():
        return out  # a compiled graph cannot go back through the computation cluster by cluster
    return stand_in(out, merged(stand_ins, link))


def _meets(tensor: Any, dims: int, rows: int) -> Tensor | None:
    """Return a stand-in expanded to ``rows`` rows of ``dims`` dimensions; None if it cannot be."""
    origin: Origin = tensor._gq_origin
    values = _plain(tensor)
    if dims > tensor.dim():
        values = values.reshape(*[1] * (dims - tensor.dim()), *tensor.shape)
        origin = origin if origin.link == SAME else linked(origin, OTHER)
    if values.shape[0] == rows and rows > 1:
        # Rows that were looked up for each sample, as positions that are counted or expanded.
        indices = origin.roots[0].indices
        own = indices is not None and indices.dim() > 0 and len(indices) == rows
        if origin.link == SAME and not own:
            origin = linked(origin, OTHER)
    elif values.shape[0] != 1:
        return None
    if origin.link == OTHER and torch.compiler.is_compiling():
        return None
    return expanded(values, origin, rows)


def _all_meet(operands: list[Any], rows: int, dims: int) -> list[Any]:
    """Return operands with their stand-ins expanded; a stand-in that cannot be is made plain."""
    met = []
    for operand in operands:
        if isinstance(operand, StandIn):
            values = _meets(operand, dims, rows)
            met.append(_plain(operand) if values is None else values)
        else:
            met.append(operand)
    return met


def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation that broadcasts its operands."""
    operands = tensors_of(args)
    origin: Origin = next(t for t in operands if isinstance(t, StandIn))._gq_origin
    shape = torch.broadcast_shapes(*[tensor.shape for tensor in operands])
    samples = [
        tensor
        for tensor in operands
        if tensor.dim() == len(shape)
        and tensor.shape[0] == shape[0]
        and _of_samples(tensor, origin)
    ]
    if not samples:
        return _other(func, args, kwargs)
    return func(*_all_meet(list(args), shape[0], len(shape)), **kwargs)


def _joined(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a concatenation; along other dimensions than the first, rows stay those of samples."""
    parts = list(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    origin: Origin = next(t for t in parts if isinstance(t, StandIn))._gq_origin
    samples = [tensor for tensor in parts if _of_samples(tensor, origin)]
    if not samples or dim % samples[0].dim() == 0:
        return _other(func, args, kwargs)
    rows, dims = samples[0].shape[0], samples[0].dim()
    return func(_all_meet(parts, rows, dims), *args[1:], **kwargs)


def _attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run attention: a stand-in among queries, keys, values and mask has the samples first."""
    given = tensors_of([*args, *kwargs.values()])
    origin: Origin = next(t for t in given if isinstance(t, StandIn))._gq_origin
    samples = [tensor for tensor in given if _of_samples(tensor, origin)]
    if not samples:
        return _other(func, args, kwargs)
    rows, dims = samples[0].shape[0], samples[0].dim()
    names = list(kwargs)
    values = _all_meet([kwargs[name] for name in names], rows, dims)
    return func(*_all_meet(list(args), rows, dims), **dict(zip(names, values, strict=True)))


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a matrix product of samples with a stand-in: as a linear layer, or a product of each."""
    left, right = args
    stand: Any = right if isinstance(right, StandIn) else left
    other = left if stand is right else right
    if not _of_samples(other, stand._gq_origin):
        return _other(func, args, kwargs)
    if stand is right and right.dim() == 2 and left.dim() > 1:
        entered = _entered(right, "product", CONV1D)
        if entered is None:
            return func(*args, **kwargs)
        out = linear(left, entered[0], None, True, entered[1])
        return _of_known(out, stand._gq_origin)
    dims = max(left.dim(), right.dim())
    if stand.dim() < 2 or other.dim() < max(3, dims):
        return _other(func, args, kwargs)
    return func(*_all_meet([left, right], other.shape[0], dims), **kwargs)


def _with_bias(out: Tensor, bias: Any, shape: Sequence[int]) -> Any:
    """Add a bias, which may be a stand-in, to a result of samples."""
    if bias is None:
        return out
    if not isinstance(bias, StandIn):
        return out + bias.view(shape)
    return _elementwise(torch.add, (out, _viewed(bias, shape)), {})


def _viewed(tensor: Any, shape: Sequence[int]) -> Any:
    """Return a stand-in in another shape."""
    return _follow(Tensor.view, (tensor, shape), {}, tensor.view(shape))


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Run ``F.linear``."""
    given = [t for t in (x, weight, bias) if isinstance(t, StandIn)]
    origin: Origin = given[0]._gq_origin
    if not _of_samples(x, origin) or weight.dim() != 2:
        return _other(F.linear, (x, weight, bias), {})
    if not isinstance(weight, StandIn):
        return _with_bias(F.linear(x, weight), bias, (-1,))
    both = _with_its_bias(weight, bias) if isinstance(bias, StandIn) else None
    if both is not None:
        return _of_known(linear(x, both[0], both[1], False, both[2]), origin)
    entered = _entered(weight, "linear", LINEAR)
    out = F.linear(x, weight) if entered is None else linear(x, entered[0], None, False, entered[1])
    return _with_bias(_of_known(out, origin), bias, (-1,))


def _with_its_bias(weight: Any, bias: Any) -> Any:
    """Return weight and bias as those of one linear layer, and its call; None if they are not."""
    if not (_is_whole(weight) and _is_whole(bias)):
        return None
    origin: Origin = weight._gq_origin
    root, other = origin.roots[0], bias._gq_origin.roots[0].param
    if root.bias is not other or weight.dtype != bias.dtype or len(bias) != len(weight):
        return None
    key = root.sites["linear, bias"]
    use(origin.clock, origin.token, key, torch.is_grad_enabled())
    return root.param, other, (origin.token, key)


def _is_whole(stand: Any) -> bool:
    """Return whether a stand-in has the shape and type of its only parameter."""
    origin: Origin = stand._gq_origin
    root = origin.roots[0]
    same = origin.link == SAME and root.indices is None
    return same and stand.shape == root.param.shape and stand.dtype == root.param.dtype


def _entered(weight: Any, kind: str, family: Any) -> tuple[Tensor, Any] | None:
    """Return a stand-in as the parameter of a family's operation, with its call; None if not."""
    origin: Origin = weight._gq_origin
    root = origin.roots[0]
    if _is_whole(weight):
        key = root.sites.get(kind)
        if key is not None:
            use(origin.clock, origin.token, key, torch.is_grad_enabled())
            return root.param, (origin.token, key)
    if torch.compiler.is_compiling():
        return None
    return routed(_plain(weight), origin, family)


def _embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``F.embedding`` in the table of a stand-in."""
    names = "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"
    given = dict(zip(names, args, strict=False)) | kwargs
    indices, table = given["input"], given["weight"]
    if isinstance(indices, StandIn) or not isinstance(table, StandIn):
        return _other(func, args, kwargs)
    changed = given.get("max_norm") or given.get("scale_grad_by_freq") or given.get("sparse")
    rows = indices.shape[0] if indices.dim() else 0
    origin: Origin = table._gq_origin
    known = rows == origin.batch and is_view_of_input(indices, origin.inputs, rows)
    if torch.compiler.is_compiling():
        known = indices.dim() > 1 and rows == origin.batch and indices.shape[1] != rows
    if changed or not known:
        return _other(func, args, kwargs)
    entered = _entered(table, "embedding", EMBEDDING)
    if entered is None:
        return func(*args, **kwargs)
    out = embedded(indices, entered[0], given.get("padding_idx"), entered[1])
    return _of_known(out, origin)


def _convolution(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a convolution whose kernel is a stand-in."""
    names = "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    given = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = given["input"], given["weight"], given.pop("bias", None)
    spatial = weight.dim() - 2
    stand: Any = next(t for t in (weight, bias, x) if isinstance(t, StandIn))
    if not _of_samples(x, stand._gq_origin) or x.dim() != weight.dim():
        return _other(func, args, kwargs)
    shown = not isinstance(given.get("padding"), str) and not torch.compiler.is_compiling()
    if isinstance(weight, StandIn) and shown:
        kernel, call = routed(_plain(weight), weight._gq_origin, CONV)
        defaults = {"stride": 1, "padding": 0, "dilation": 1}
        sizes = [given.get(name, default) for name, default in defaults.items()]
        wide = [(size,) * spatial if isinstance(size, int) else tuple(size) for size in sizes]
        geometry = Geometry(wide[0], wide[1], wide[2], given.get("groups", 1))
        site = site_of(call[1])
        assert site is not None
        site.options = geometry
        out = _of_known(convolved(x, kernel, None, geometry, call), stand._gq_origin)
    else:
        out = func(**given)
    return _with_bias(out, bias, (-1, *[1] * spatial))


def _normalised(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a normalisation, then scale and shift its result."""
    given = dict(zip(NORMALISED[func], args, strict=False)) | kwargs
    weight, bias = given.pop("weight", None), given.pop("bias", None)
    x = given["input"]
    stand: Any = next(t for t in (weight, bias, x) if isinstance(t, StandIn))
    if not _of_samples(x, stand._gq_origin):
        return _other(func, args, kwargs)
    out = func(**given)
    # Scale and shift belong to the last dimensions, or to channels.
    last = func is F.layer_norm or func is F.rms_norm
    shape = list(given["normalized_shape"]) if last else [-1, *[1] * (x.dim() - 2)]
    if isinstance(weight, StandIn):
        out = _elementwise(torch.mul, (out, _viewed(weight, shape)), {})
    elif weight is not None:
        out = out * weight.view(shape)
    return _with_bias(out, bias, shape)


def _prelu(x: Any, weight: Any) -> Any:
    """Run ``F.prelu``, whose slope belongs to channels."""
    if isinstance(x, StandIn) or not _of_samples(x, weight._gq_origin):
        return _other(F.prelu, (x, weight), {})
    shape = [-1 if dim == 1 else 1 for dim in range(x.dim())] if x.dim() > 1 else [-1]
    return torch.where(x > 0, x, _elementwise(torch.mul, (x, _viewed(weight, shape)), {}))
