"""Parameters whose sums are known and whose gradients are not yet: weighted together, on a GPU.

A launch costs the host more than a small parameter costs the device. So the sums of a backward pass
wait until there are many, or until the pass ends, and a few launches weight all of them. The
gradients that autograd puts into ``p.grad`` meanwhile are memory without values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gq_triton.cluster_grad.forming import Sums, form_all
from gq_triton.cluster_grad.sink import Taken
from gq_triton.grouping.groups import Groups
from gq_triton.queues import Queues
from gq_triton.ring import write_back_

__all__ = ["Later"]

# Bytes of sums that wait for one another, and of what sums are to be formed from. Each launch has
# work for all of a large GPU well before.
ROOM = 512 << 20


class _Due(NamedTuple):
    """A parameter whose sums wait.

    Attributes:
        name: its name.
        groups: the clusters.
        sums: ``(K, P)``.
        weighted: where the weighted gradient goes, ``(P,)``.
        raw: where the raw gradient goes, in the parameter's shape.
        stream: the stream on which the sums are formed; None on the CPU.
    """

    name: str
    groups: Groups
    sums: Tensor
    weighted: Tensor
    raw: Tensor
    stream: Any


class Later:
    """The parameters of a backward pass that are yet to be weighted.

    Args:
        queues: the rings, read for the weights.
        statistics: by parameter name, where the statistics of its weighting go.
        grad_scale: returns the loss scale that the sums carry, or None.
    """

    def __init__(
        self,
        queues: Queues,
        statistics: dict[str, Tensor],
        grad_scale: Callable[[], Tensor | None],
    ) -> None:
        self._queues, self._statistics, self._grad_scale = queues, statistics, grad_scale
        self._due: list[_Due] = []
        self._bytes = 0
        # Sums that are yet to be formed, with their streams, and the bytes that they keep.
        self._unformed: list[tuple[Any, Sums]] = []
        self._kept = 0
        # By parameter name, the memory of a gradient that waits.
        self._places: dict[str, Tensor] = {}

    def serves(self, device: torch.device) -> bool:
        """Return whether waiting saves anything: launches do not cost the CPU."""
        return device.type != "cpu" or self._queues.options.backend == "triton"

    def __contains__(self, name: str) -> bool:
        """Return whether a gradient waits that did not reach ``p.grad`` yet."""
        return name in self._places

    def may_wait(self, param: Tensor) -> bool:
        """Return whether nobody reads a parameter's gradient before the backward pass ends.

        Autograd does where it adds to ``p.grad``, where it looks for NaN, and where it calls hooks.
        One hook of each kind is the accumulator's.
        """
        hooks: Any = param
        return (
            self.serves(param.device)
            and param.grad is None
            and len(hooks._backward_hooks or ()) == 1
            and len(hooks._post_accumulate_grad_hooks or ()) == 1
            and not torch.is_anomaly_enabled()
        )

    def form(self, sums: Sums) -> tuple[Tensor, Tensor | None]:
        """Take what a layer's sums are formed from; return memory that gets their values later."""
        noted = sums.waits
        memory = sums.later()
        if sums.waits and not noted:
            self._unformed.append((_stream(memory[0]), sums))
            self._kept += sums.nbytes
        return memory

    def take(self, name: str, groups: Groups, sums: Tensor) -> Taken:
        """Take the sums of a parameter, ``(K, P)``; return gradients that get their values later.

        Args:
            name: the parameter's name.
            groups: the clusters.
            sums: gradients summed by cluster, in the memory order of the parameter. They must not
                change any more, but may be memory that ``form`` returned.
        """
        param = self._queues.params[name]
        weighted = torch.empty_like(param, memory_format=torch.preserve_format)
        raw = torch.empty_like(weighted, dtype=sums.dtype)
        place = _memory(weighted)
        self._due.append(_Due(name, groups, sums, place, raw, _stream(sums)))
        self._places[name] = place
        self._bytes += sums.nbytes
        if self._bytes > ROOM:
            self._weigh()
        elif self._kept > ROOM:
            self._form()
        return Taken(weighted, raw)

    def arrived(self, name: str, grad: Tensor) -> None:
        """Note that ``p.grad`` has the gradient of a parameter.

        Autograd copies a gradient whose layout is not that of the parameter. The copy was made of
        memory without values.
        """
        place = self._places.pop(name, None)
        if place is not None and grad.data_ptr() != place.data_ptr():
            self._weigh()
            with torch.no_grad():
                write_back_(grad, place, self._queues.params[name])

    def settle(self) -> None:
        """Give all gradients their values."""
        self._places.clear()
        self._weigh()

    @torch.no_grad()
    def _form(self) -> None:
        unformed, self._unformed, self._kept = self._unformed, [], 0
        streams: dict[Any, list[Sums]] = {}
        for stream, sums in unformed:
            streams.setdefault(stream, []).append(sums)
        for stream, sums in streams.items():
            with _on(stream):
                form_all(sums)

    @torch.no_grad()
    def _weigh(self) -> None:
        due, self._due, self._bytes = self._due, [], 0
        self._form()
        batches: dict[Any, list[_Due]] = {}
        for one in due:
            # Of one launch: the clusters, the types and the stream.
            kind = one.sums.dtype, one.weighted.dtype, one.sums.device, one.stream
            batches.setdefault((id(one.groups.inverse_shares), *kind), []).append(one)
        for batch in batches.values():
            with _on(batch[0].stream):
                self._weigh_batch(batch)

    def _weigh_batch(self, batch: list[_Due]) -> None:
        names, _, sums, weighted, raw, _ = zip(*batch, strict=True)
        groups = batch[0].groups
        tables = self._queues.combine_all(
            names, sums, weighted, raw, inverse_shares=groups.inverse_shares,
            mixture=groups.mixture, sigma_scales=groups.sigma_scales,
            grad_scale=self._grad_scale(),
        )  # fmt: skip
        self._statistics.update(zip(names, tables, strict=True))


def _stream(tensor: Tensor) -> Any:
    """Return the stream on which a tensor is used now; None on the CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.device.type == "cuda" else None


def _memory(tensor: Tensor) -> Tensor:
    """Return the memory of a dense tensor, flat.

    Autograd takes a gradient into ``p.grad`` without a copy only if nobody else holds the tensor. A
    view holds its base, so this is none, or one of ``data``, which is none.
    """
    if tensor.is_contiguous():
        return tensor.data if tensor.dim() == 1 else tensor.data.view(-1)
    return tensor.new_empty(0).set_(tensor.untyped_storage(), 0, (tensor.numel(),), (1,))


@contextmanager
def _on(stream: Any) -> Iterator[None]:
    """Launch what is inside on a stream, for which the current one then waits."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    with torch.cuda.stream(stream):
        yield
    if current != stream:
        current.wait_stream(stream)
