"""The forward and backward passes of a model, as its layers go through them.

A forward pass has a *token*, a small tensor that its graph holds. The step of a forward pass lives
as long as the token.
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from gq_triton.cluster_grad.forming import Sums
from gq_triton.cluster_grad.site import (
    Block,
    Site,
    UnknownRows,
    collector_of,
    new_number,
    number_of,
    numbered,
    site_of,
    whole_block,
)
from gq_triton.cluster_grad.step import Step
from gq_triton.grouping.features import pooled
from gq_triton.replayed import refuse_replay
from gq_triton.ring import flat

__all__ = [
    "AGAIN",
    "OUTSIDE",
    "begin",
    "capture",
    "end",
    "enter",
    "in_backward",
    "param_grads",
    "step_of",
    "unordered",
    "use",
    "watch",
]

AGAIN = (
    "clustered gradients cannot be differentiated again: leave out create_graph=True, or use "
    'GradQueue(mode="microbatch")'
)
OUTSIDE = (
    "{} was called outside the model's own forward(), where its samples are not clustered: "
    'call the model, or use GradQueue(mode="microbatch")'
)
_steps: dict[int, Step] = {}


def in_backward() -> bool:
    """Return whether a backward pass runs, so that a forward call is a recomputation."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]


def step_of(token: Tensor) -> Step | None:
    """Return the step of a forward pass; None if its graph is gone."""
    return _steps.get(number_of(token))


def begin(clock: Tensor, session: int) -> Tensor:
    """Start the step of a forward pass and return its token; a recomputation keeps its step."""
    alive = collector_of(session)
    token = alive.token
    last = None if token is None else step_of(token)
    # A reentrant checkpoint around the whole model hides the forward pass, which then runs without
    # gradients. The last known step belongs to an older pass in that case, and is complete.
    goes_on = last is not None and (last.known_groups is None or last.finishing)
    if token is not None and in_backward() and goes_on:
        return token.clone()
    number = new_number()
    token = numbered(number)
    step = _steps[number] = alive.new_step()
    step.hidden = in_backward()
    weakref.finalize(token, _steps.pop, number)
    return token


def end(clock: Tensor, token: Tensor) -> None:
    """End the forward pass: a layer called from here on belongs to no step."""
    step = step_of(token)
    if step is not None:
        step.open = False


def use(clock: Tensor, token: Tensor, site: Tensor, graded: bool) -> None:
    """Count one use of a layer's parameters in the forward pass.

    A segment under a reentrant checkpoint runs without gradients first. That run is counted, and
    the recomputation in the backward pass is not.
    """
    step, where = step_of(token), site_of(site)
    assert where is not None
    if in_backward() and not (step is not None and step.hidden):
        return
    if step is not None and step.open:
        for name in where.trainable():
            step.uses[name] = step.uses.get(name, 0) + 1
    elif graded:
        raise RuntimeError(OUTSIDE.format(where.name))


def unordered(clock: Tensor, token: Tensor, site: Tensor) -> None:
    """Note that a layer saw rows of which it is not known to which samples they belong."""
    step = step_of(token)
    if step is not None:
        step.unordered.add(number_of(site))


def capture(clock: Tensor, token: Tensor, features: Tensor, channels_first: bool) -> None:
    """Keep the features ``(B, ...)`` of a step's samples."""
    step = step_of(token)
    if step is not None and step.open and (step.hidden or not in_backward()):
        features = _samples_first(features, step)
        step.features = pooled(features.detach(), channels_first)
        step.shape = tuple(features.shape)


def watch(grad: Tensor, token: Tensor) -> Tensor:
    """Keep the gradient at the model's output as the features of the step's samples; return it."""
    step = _steps[number_of(token)]
    if step.known_groups is None:
        samples = _samples_first(grad, step)
        step.features = pooled(samples.detach(), channels_first=grad.dim() > 3)
    return grad


def _samples_first(features: Tensor, step: Step) -> Tensor:
    """Return features ``(B, ...)`` from those of a model whose batch is the second dimension."""
    return features.transpose(0, 1) if step.batch_dim and features.dim() > 2 else features


def enter(token: Tensor, site: Tensor) -> tuple[Site, Step]:
    """Note that the backward pass of a step has reached a site; return both.

    Raises:
        RuntimeError: the plug-in was removed.
    """
    where, step = site_of(site), step_of(token)
    if where is None or step is None:
        raise RuntimeError("the handle of this GradQueue was removed: run the forward pass anew")
    # Layers that this backward pass recomputes from here on belong to this step.
    where.collector.token = token
    where.collector.enter_pass(step)
    return where, step


def param_grads(
    token: Tensor, site: Tensor, tensors: list[Tensor], wanted: list[int], traced: bool = False
) -> tuple[list[Tensor | None], bool]:
    """Collect the sums of a layer's gradients; return what its backward pass returns for them.

    Args:
        token: the token of the forward pass.
        site: the key of the layer's site.
        tensors: the tensors from which the layer's family computes its gradients.
        wanted: positions among the site's parameters.
        traced: whether a compiled graph calls.

    Returns:
        For each wanted parameter its gradient, or what the site returned for the sums; and whether
        these are gradients, because it is not known to which samples the rows belong.
    """
    if traced:
        refuse_replay("with clusters, a graph of torch.compile has the host wait", "do not compile")
    where, step = enter(token, site)
    step.traced = step.traced or traced
    try:
        if step.unordered and number_of(site) in step.unordered:
            raise UnknownRows(f"{where.name or 'the model'} saw rows in no known order")
        if step.groups is not None and step.mismatch:
            raise UnknownRows(step.mismatch)
        return where.family.gradients(where, step, tensors, wanted), False
    except UnknownRows as problem:
        for position in wanted:
            where.take_unknown(position, str(problem))
        gradients = where.family.gradients(_Whole(where), step.of_unknown(), tensors, wanted)
        return gradients, True


class _Whole(Site):
    """A site that returns the whole gradient of its parameters, which no sink takes."""

    def __init__(self, site: Site) -> None:
        vars(self).update(vars(site))
        self._site = site

    def param(self, position: int) -> Tensor:
        """Return the parameter at a position."""
        return self._site.param(position)

    def used_once(self, step: Step, position: int) -> bool:
        """Return False: the sums must be those of the whole parameter."""
        return False

    def give(
        self, step: Step, position: int, blocks: Iterator[Block], dtype: torch.dtype
    ) -> Tensor:
        """Return the gradient of a parameter, in its shape and type."""
        param = self._site.param(position)
        whole = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
        out = flat(whole, like=param)
        for start, stop, sums in blocks:
            out[start:stop] = sums[0]
        return whole.to(param.dtype)

    def give_whole(self, step: Step, position: int, sums: Tensor) -> Tensor:
        """Return the gradient of a parameter."""
        return self.give(step, position, whole_block(sums), sums.dtype)

    def give_sums(self, step: Step, position: int, sums: Sums, scale: bool) -> Tensor:
        """Return the gradient of a shift or scale."""
        return self.give(step, position, sums.blocks(scale), sums.dtype)
