"""Where a layer meets its step: the calls that a compiled graph holds as opaque operations.

A graph made by ``torch.compile`` must hold neither a step's clusters nor a queue: it would replay
those of the step it was traced in. It holds two small tensors instead, the *token* of the forward
pass and the key of the layer's *site*, and calls of the functions below as operations, which find
the rest when they run. Operations without a result write to a *clock*: nothing but the compiler's
reason to keep them, in their order. Outside a compiled graph the functions are called as they are.
"""

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.step import Step, pooled

if TYPE_CHECKING:
    from gq_triton.cluster_grad.session import Session

__all__ = [
    "OUTSIDE",
    "Call",
    "Family",
    "Site",
    "begin",
    "capture",
    "end",
    "exact",
    "in_backward",
    "number",
    "param_grads",
    "prepare_for_compile",
    "traced_whole",
    "use",
    "watch",
]

# The token of the forward pass and the key of the layer's site.
Call = tuple[Tensor, Tensor]

OUTSIDE = (
    "{} was called outside the model's own forward(), where its samples are not clustered: "
    'call the model, or use GradQueue(mode="microbatch")'
)
_numbers = itertools.count(1)
_sessions: "weakref.WeakValueDictionary[int, Session]" = weakref.WeakValueDictionary()
_sites: "weakref.WeakValueDictionary[int, Site]" = weakref.WeakValueDictionary()
# A step lives as long as its token: as the graph of its forward pass.
_steps: dict[int, Step] = {}


class Family(NamedTuple):
    """How the layers of one kind run, and what their clustered gradients are made of.

    Attributes:
        forward: ``(module, call, *args)``: the layer's forward pass.
        gradients: ``(site, step, tensors, wanted)`` to the weighted gradients of the wanted ones
            among ``(weight, bias)``; the tensors are what the layer's backward pass knows.
    """

    forward: Callable[..., Tensor]
    gradients: Callable[["Site", Step, list[Tensor], list[int]], list[Tensor]]


class Site:
    """A layer whose gradients are clustered.

    Args:
        session: that of the model.
        name: the layer's name in the model.
        module: the layer.
        family: how it runs.
    """

    def __init__(self, session: "Session", name: str, module: nn.Module, family: Family) -> None:
        self.session, self.name, self.module, self.family = session, name, module, family
        # A tensor, and so an input of a compiled graph: layers of one kind share their graph.
        self.key = torch.tensor(next(_numbers))
        _sites[int(self.key)] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Site":
        """Return the site itself: a copy of the model has no clusters."""
        return self

    def param(self, position: int) -> Tensor:
        """Return the layer's weight (0) or bias (1)."""
        return getattr(self.module, ("weight", "bias")[position])


def number(session: "Session") -> int:
    """Make a session known by a number, which is returned."""
    key = next(_numbers)
    _sessions[key] = session
    return key


def in_backward() -> bool:
    """Return whether a backward pass runs, so that a forward call is a recomputation."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]


def _begin(clock: Tensor, session: int) -> Tensor:
    """Start the step of a forward pass, unless one is computed anew; return its token."""
    alive = _sessions[session]
    token = alive.token
    last = None if token is None else _steps.get(int(token))
    # A reentrant checkpoint around the whole model has hidden its forward pass: then the last step
    # known is an older one, which is done.
    goes_on = last is not None and (last.known_groups is None or last.finishing)
    if token is not None and in_backward() and goes_on:
        return token.clone()
    token = torch.tensor(next(_numbers))
    step = _steps[int(token)] = alive.new_step()
    step.hidden = in_backward()
    weakref.finalize(token, _steps.pop, int(token))
    return token


def _end(clock: Tensor, token: Tensor) -> None:
    """End the forward pass: a layer called from here on belongs to no step."""
    step = _steps.get(int(token))
    if step is not None:
        step.open = False


def _use(clock: Tensor, token: Tensor, site: Tensor, graded: bool) -> None:
    """Count one use of a layer's parameters in the forward pass.

    A segment under a reentrant checkpoint computes without gradients first: that is its use.
    """
    step, where = _steps.get(int(token)), _sites[int(site)]
    if in_backward() and not (step is not None and step.hidden):
        return
    if step is not None and step.open:
        names = where.session.trainable(where.module)
        where.session.watch(names)
        for name in names:
            step.uses[name] = step.uses.get(name, 0) + 1
    elif graded:
        raise RuntimeError(OUTSIDE.format(where.name))


def _capture(clock: Tensor, token: Tensor, features: Tensor, channels_first: bool) -> None:
    """Keep the features ``(B, ...)`` of a step's samples."""
    step = _steps.get(int(token))
    if step is not None and step.open and (step.hidden or not in_backward()):
        step.features = pooled(features.detach(), channels_first)


def _watch(grad: Tensor, token: Tensor) -> Tensor:
    """Keep the gradient at the model's output as the features of the step's samples."""
    step = _steps[int(token)]
    if step.known_groups is None:
        step.features = pooled(grad.detach(), channels_first=grad.dim() > 3)
    return grad


def _param_grads(
    token: Tensor, site: Tensor, tensors: list[Tensor], params: list[Tensor], wanted: list[int]
) -> list[Tensor]:
    """Return a layer's weighted gradients."""
    where, step = _sites.get(int(site)), _steps.get(int(token))
    if where is None or step is None:
        raise RuntimeError("the handle of this GradQueue was removed: run the forward pass anew")
    # What this backward pass computes anew from here on belongs to this step.
    where.session.token = token
    where.session.enter_pass(step)
    return where.family.gradients(where, step, tensors, wanted)


def exact(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a backward pass compute in the types of its tensors, also where autocast is on.

    ``loss.backward()`` inside autocast would narrow sums that are to be formed in float32.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grad_outputs: Tensor) -> Any:
        device = grad_outputs[0].device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grad_outputs)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grad_outputs)

    return run


_whole: list[Callable[..., Any]] = []


def traced_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that calls an autograd function: Dynamo must not look into it."""
    _whole.append(function)
    return function


def prepare_for_compile() -> None:
    """Tell Dynamo what is marked; it is not imported before an optimizer needs it anyway."""
    for function in _whole:
        torch.compiler.allow_in_graph(function)


_library = torch.library.Library("gq_triton", "DEF")


def _operation(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gq_triton::{name}", fake, lib=_library)
    return getattr(torch.ops.gq_triton, name).default


def _nothing(*args: Any) -> None:
    return None


_begin_op = _operation(
    "begin(Tensor(a!) clock, int session) -> Tensor",
    _begin,
    lambda clock, session: torch.empty((), dtype=torch.int64),
)
_end_op = _operation("end(Tensor(a!) clock, Tensor token) -> ()", _end, _nothing)
_use_op = _operation(
    "use(Tensor(a!) clock, Tensor token, Tensor site, bool graded) -> ()", _use, _nothing
)
_capture_op = _operation(
    "capture(Tensor(a!) clock, Tensor token, Tensor features, bool channels_first) -> ()",
    _capture,
    _nothing,
)
_watch_op = _operation(
    "watch(Tensor grad, Tensor token) -> Tensor",
    lambda grad, token: _watch(grad, token).clone(),
    lambda grad, token: torch.empty_like(grad),
)
_param_grads_op = _operation(
    "param_grads(Tensor token, Tensor site, Tensor[] tensors, Tensor[] params, int[] wanted)"
    " -> Tensor[]",
    _param_grads,
    lambda token, site, tensors, params, wanted: [torch.empty_like(param) for param in params],
)


def begin(clock: Tensor, session: int) -> Tensor:
    """Start the step of a forward pass; return its token, 0-d int64."""
    return (_begin_op if torch.compiler.is_compiling() else _begin)(clock, session)


def end(clock: Tensor, token: Tensor) -> None:
    """End the forward pass of a step."""
    (_end_op if torch.compiler.is_compiling() else _end)(clock, token)


def use(clock: Tensor, token: Tensor, site: Tensor, graded: bool) -> None:
    """Count one use of a layer's parameters in the forward pass.

    Raises:
        RuntimeError: gradients are wanted, but no forward pass of the model runs.
    """
    (_use_op if torch.compiler.is_compiling() else _use)(clock, token, site, graded)


def capture(clock: Tensor, token: Tensor, features: Tensor, channels_first: bool) -> None:
    """Keep the features ``(B, ...)`` of a step's samples."""
    operation = _capture_op if torch.compiler.is_compiling() else _capture
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
    output.register_hook(lambda grad: _watch(grad, token))
    return output


@traced_whole
def _traced_watch(output: Tensor, token: Tensor) -> Tensor:
    return _Watch.apply(output, token)  # pyright: ignore[reportReturnType]


def param_grads(ctx: Any, *tensors: Tensor) -> list[Tensor | None]:
    """Return the weighted gradients of a layer's parameters, in a backward pass.

    Args:
        ctx: the context of an autograd function whose arguments begin with the layer's input and
            ``params``; ``ctx.params`` are those, ``ctx.call`` the token and the site's key.
        tensors: what the layer's gradients are made of.
    """
    token, site = ctx.call
    positions = range(len(ctx.params))
    wanted = [i for i in positions if ctx.params[i] is not None and ctx.needs_input_grad[1 + i]]
    result: list[Tensor | None] = [None for _ in positions]
    if not wanted:
        return result
    params = [ctx.params[i] for i in wanted]
    # A graph is traced with tensors of the compiler's own. Its flag alone does not tell: before
    # torch 2.13 it is set while Dynamo reads Python, and not while backward passes are traced.
    if torch.compiler.is_compiling() or type(token) is not Tensor:
        grads = _param_grads_op(token, site, list(tensors), params, wanted)
    elif torch.is_grad_enabled():
        raise RuntimeError(
            "clustered gradients cannot be differentiated again: leave out create_graph=True, or "
            'use GradQueue(mode="microbatch")'
        )
    else:
        grads = _param_grads(token, site, list(tensors), params, wanted)
    for position, grad in zip(wanted, grads, strict=True):
        result[position] = grad
    return result
