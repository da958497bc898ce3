"""Layers that are called outside the model's ``forward``, as a head on its outputs is.

Where the graph of the layer's input leads to one forward pass of the model, the layer joins it, and
its rows are those of that pass. Otherwise it runs as it is: nothing tells one batch from another.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from gq_triton.cluster_grad.passes import step_of
from gq_triton.cluster_grad.site import Collector, number_of
from gq_triton.cluster_grad.step import Step

__all__ = ["CALLED_OUTSIDE", "is_outside", "joined"]

CALLED_OUTSIDE = "it was called outside the model's forward(), with nothing that forward() returned"
# The number of operations that are followed back.
_LIMIT = 500


def is_outside(token: Tensor | None) -> bool:
    """Return whether the forward pass of a token is over, or there was none."""
    step = None if token is None else step_of(token)
    return step is None or not step.open


@contextmanager
def joined(collector: Collector, inputs: Iterable[Any]) -> Iterator[Tensor | None]:
    """Let a layer be part of the forward pass that its inputs come from.

    Args:
        collector: the receiver of the model's sums.
        inputs: the arguments of the layer.

    Yields:
        The token of the forward pass; None if there is none, or its backward pass has begun.
    """
    token, step = _behind(inputs)
    if token is None or step is None or step.arguments is None or step.known_groups is not None:
        yield None
        return
    kept = collector.token, collector.batch, collector.inputs
    collector.token, collector.batch = token, step.arguments.samples or 1
    collector.inputs, step.open = {}, True
    try:
        yield token
    finally:
        step.open = False
        collector.token, collector.batch, collector.inputs = kept
        collector.trusted.clear()


def _behind(inputs: Iterable[Any]) -> tuple[Tensor | None, Step | None]:
    """Return token and step of the only forward pass that tensors come from; None if not one."""
    stack = [value.grad_fn for value in inputs if isinstance(value, Tensor)]
    seen, found = set(), dict[int, Tensor]()
    while stack and len(seen) < _LIMIT:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        call = getattr(node, "call", None)
        if call is None:
            stack += [parent for parent, _ in node.next_functions]
        else:
            found[number_of(call[0])] = call[0]
    if stack or len(found) != 1:
        return None, None
    (token,) = found.values()
    return token, step_of(token)
