"""The functions of ``passes``, callable in eager models and in compiled graphs.

A graph made by ``torch.compile`` must hold neither a step's clusters nor a queue: it would replay
those of the step it was traced in. It holds two small tensors instead, the token of the forward
pass and the key of the layer's site. It calls the functions of ``passes`` as opaque operations,
which find the step and the layer by these tensors when they run. Operations without a result write
to a *clock*, a tensor: only for that write does the compiler keep them, and their order. Outside a
compiled graph the functions are called directly.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gq_triton.cluster_grad import passes
from gq_triton.cluster_grad.standins.origin import saving_hooks
from gq_triton.untraced import Untraced

__all__ = [
    "autocast_of",
    "begin",
    "capture",
    "end",
    "exact",
    "param_grads",
    "prepare_for_compile",
    "traced_whole",
    "unhooked",
    "unordered",
    "use",
    "watch",
]


def exact(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backward pass that computes in the types of its tensors, also under autocast.

    A ``loss.backward()`` inside autocast would narrow sums that must be formed in float32.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grad_outputs: Tensor) -> Any:
        device = grad_outputs[0].device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grad_outputs)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grad_outputs)

    return run


def unhooked(param: Tensor | None) -> Tensor | None:
    """Return a parameter as an autograd function may save it for its backward pass.

    Saved tensors may pass through hooks (a checkpoint without ``use_reentrant``, ``save_on_cpu``).
    Torch 2.8 then gives a saved parameter back as a second tensor with the same accumulator of
    gradients. When that tensor is freed, the parameter loses its hooks.
    """
    if param is None or not (torch.compiler.is_compiling() or saving_hooks() is not None):
        return param
    return param.detach()


def autocast_of(device: str) -> Callable[[], Any]:
    """Return what enters the autocast of now again, in a backward pass that runs code again."""
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext
    dtype = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype)


_whole: list[Callable[..., Any]] = []


def traced_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that calls an autograd function, so that Dynamo does not look into it."""
    _whole.append(function)
    return function


def prepare_for_compile() -> None:
    """Tell Dynamo which functions are marked, and which it must not look into."""
    for function in _whole:
        torch.compiler.allow_in_graph(function)
    Untraced.prepare()


_library = torch.library.Library("gq_triton", "DEF")


def _operation(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    # torch.compile keeps graphs on disk by the names of their operations: one whose results get
    # other shapes, types or strides needs another name, or a graph of an older release is run.
    name = schema.partition("(")[0]
    # A CUDA graph (mode="reduce-overhead") would call the function once, and never in a replay.
    _library.define(schema, tags=(torch.Tag.cudagraph_unsafe,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gq_triton::{name}", fake, lib=_library)
    return getattr(torch.ops.gq_triton, name).default


def _nothing(*args: Any) -> None:
    return None


_begin_op = _operation(
    "begin(Tensor(a!) clock, int session) -> Tensor",
    passes.begin,
    lambda clock, session: torch.empty((), dtype=torch.int64, device="cpu"),
)
_end_op = _operation("end(Tensor(a!) clock, Tensor token) -> ()", passes.end, _nothing)
_use_op = _operation(
    "use(Tensor(a!) clock, Tensor token, Tensor site, bool graded) -> ()", passes.use, _nothing
)
_unordered_op = _operation(
    "unordered(Tensor(a!) clock, Tensor token, Tensor site) -> ()", passes.unordered, _nothing
)
_capture_op = _operation(
    "capture(Tensor(a!) clock, Tensor token, Tensor features, bool channels_first) -> ()",
    passes.capture,
    _nothing,
)
_watch_op = _operation(
    "watch(Tensor grad, Tensor token) -> Tensor",
    lambda grad, token: passes.watch(grad, token).clone(),
    lambda grad, token: torch.empty_like(grad),
)


def _traced_param_grads(
    token: Tensor, site: Tensor, tensors: list[Tensor], params: list[Tensor], wanted: list[int]
) -> list[Tensor]:
    grads, whole = passes.param_grads(token, site, tensors, wanted, traced=True)
    # A graph expects gradients in the layout that it was traced with.
    result = [torch.zeros_like(param) for param in params]
    for zeros, grad in zip(result, grads, strict=True):
        if whole and grad is not None:
            zeros.copy_(grad)
    return result


_param_grads_op = _operation(
    "param_grads(Tensor token, Tensor site, Tensor[] tensors, Tensor[] params, int[] wanted)"
    " -> Tensor[]",
    _traced_param_grads,
    lambda token, site, tensors, params, wanted: [torch.empty_like(param) for param in params],
)


def begin(clock: Tensor, session: int) -> Tensor:
    """Start the step of a forward pass; return its token, 0-d int64."""
    return (_begin_op if torch.compiler.is_compiling() else passes.begin)(clock, session)


def end(clock: Tensor, token: Tensor) -> None:
    """End the forward pass of a step."""
    (_end_op if torch.compiler.is_compiling() else passes.end)(clock, token)


def use(clock: Tensor, token: Tensor, site: Tensor, graded: bool) -> None:
    """Count one use of a layer's parameters in the forward pass.

    Raises:
        RuntimeError: gradients are wanted, but no forward pass of the model runs.
    """
    (_use_op if torch.compiler.is_compiling() else passes.use)(clock, token, site, graded)


def unordered(clock: Tensor, token: Tensor, site: Tensor) -> None:
    """Note that a layer saw rows of which it is not known to which samples they belong."""
    (_unordered_op if torch.compiler.is_compiling() else passes.unordered)(clock, token, site)


def capture(clock: Tensor, token: Tensor, features: Tensor, channels_first: bool) -> None:
    """Keep the features ``(B, ...)`` of a step's samples."""
    operation = _capture_op if torch.compiler.is_compiling() else passes.capture
    operation(clock, token, features, channels_first)


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, token: Tensor) -> Tensor:
        ctx.token = token
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _watch_op(grad_outputs[0], ctx.token), None


def watch(output: Tensor, token: Tensor) -> Tensor:
    """Return the model's output, whose gradient becomes the features of the step's samples."""
    if torch.compiler.is_compiling():
        return _traced_watch(output, token)
    output.register_hook(lambda grad: passes.watch(grad, token))
    return output


@traced_whole
def _traced_watch(output: Tensor, token: Tensor) -> Tensor:
    return _Watch.apply(output, token)  # pyright: ignore[reportReturnType]


def param_grads(ctx: Any, *tensors: Tensor) -> list[Tensor | None]:
    """Collect the sums of a layer's gradients; return what its backward pass returns for them.

    Args:
        ctx: the context of an autograd function whose first arguments are the layer's input, then
            the parameters. ``ctx.params`` holds these parameters, ``ctx.call`` the token and the
            key of the site.
        tensors: the tensors from which the layer's family computes its gradients.

    Raises:
        RuntimeError: the gradients are to be differentiated again, or the plug-in was removed.
    """
    token, site = ctx.call
    positions = range(len(ctx.params))
    wanted = [i for i in positions if ctx.params[i] is not None and ctx.needs_input_grad[1 + i]]
    result: list[Tensor | None] = [None for _ in positions]
    if not wanted:
        return result
    params = [ctx.params[i] for i in wanted]
    # A graph is traced with the compiler's own classes of tensors. is_compiling() alone does not
    # tell: before torch 2.13 it is True while Dynamo reads Python, but not while backward passes
    # are traced.
    if torch.compiler.is_compiling() or type(token) is not Tensor:
        grads = _param_grads_op(token, site, list(tensors), params, wanted)
    elif torch.is_grad_enabled():
        raise RuntimeError(passes.AGAIN)
    else:
        grads = passes.param_grads(token, site, list(tensors), wanted)[0]
    for position, grad in zip(wanted, grads, strict=True):
        result[position] = grad
    return result
