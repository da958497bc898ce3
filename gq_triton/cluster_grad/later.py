"""Parameters whose sums are known and whose gradients are not yet: weighted together, on a GPU.

A launch costs the host more than a small parameter costs the device. So the sums of a backward pass
wait until there are many, or until the pass ends, and a few launches weight all of them. The
gradients that autograd puts into ``p.grad`` meanwhile are memory without values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gq_triton.cluster_grad.forming import Sums, form_all, memory_for
from gq_triton.cluster_grad.sink import Coming, Taken
from gq_triton.grouping.groups import Groups
from gq_triton.queues import Queues

__all__ = ["Later"]

# Bytes of sums that wait for one another, and of what sums are to be formed from. Each launch has
# work for all of a large GPU well before.
ROOM = 512 << 20


class _Due(Coming):
    """A parameter whose sums wait; its raw gradient is to come.

    Attributes:
        name: its name.
        param: the parameter.
        groups: the clusters.
        sums: ``(K, *)``, each cluster's dense, in the memory order of the parameter; or what they
            are formed from.
        scale: whether the parameter is a layer's scale, which is in ``sums`` beside the shift.
        kind: what all parameters of a launch share: types, device, and the stream on which the
            sums are formed, None on the CPU.
        memory: where the weighted gradient goes. Autograd takes a gradient into ``p.grad`` without
            a copy only if nobody else holds the tensor, so this is none.
        address: the first element of it.
        grad: the tensor in ``p.grad`` when it has arrived there, with that memory.
    """

    __slots__ = ("address", "grad", "groups", "kind", "memory", "name", "param", "scale", "sums")

    def __init__(
        self, settle: Callable[[], None], name: str, param: Tensor, groups: Any, sums: Any,
        scale: bool, kind: Any, weighted: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(param, settle)
        self.name, self.param, self.scale, self.kind = name, param, scale, kind
        self.groups: Any = groups
        self.sums: Any = sums
        self.memory: Any = weighted.untyped_storage()
        self.address = weighted.data_ptr()
        self.grad: Tensor | None = None

    def arrive(self, grad: Tensor) -> None:
        """Note that ``p.grad`` has the memory."""
        self.memory, self.grad = None, grad if self.value is None else None

    def place(self) -> Tensor:
        """Return the memory of the weighted gradient, in the shape of the parameter."""
        if self.grad is not None:
            # A version of its own: ``note`` has read that of ``p.grad``, which tells later passes
            # whether a user has changed it.
            return self.grad.data
        size, stride = _dense(self.param)
        return self.param.detach().new_empty(0).set_(self.memory, 0, size, stride)

    def formed(self) -> Tensor:
        """Return the sums."""
        return self.sums.formed(self.scale) if isinstance(self.sums, Sums) else self.sums

    def end(self, raw: Tensor) -> None:
        """Note that the parameter is weighted; forget what was needed for it."""
        self.value, self.sums, self.groups, self.grad = raw, None, None, None


def _dense(param: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and strides of a gradient, which are those of ``torch.empty_like``."""
    return param.shape, torch.empty_like(param, device="meta").stride()


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
        # By parameter name, what waits and did not reach ``p.grad`` yet.
        self._places: dict[str, _Due] = {}

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

    def take(self, name: str, groups: Groups, sums: Tensor | Sums, scale: bool = False) -> Taken:
        """Take the sums of a parameter; return gradients that get their values later.

        Args:
            name: the parameter's name.
            groups: the clusters.
            sums: gradients summed by cluster, ``(K, *)``, each cluster's in the memory order of the
                parameter, without holes. They must not change any more. Or the sums of a layer's
                shift and scale, which are formed later.
            scale: which of them is meant.
        """
        param = self._queues.params[name]
        weighted = torch.empty_like(param)
        device = weighted.device
        stream = _stream(device)
        kind = sums.dtype, weighted.dtype, device, stream
        due = _Due(self.settle, name, param, groups, sums, scale, kind, weighted)
        self._due.append(due)
        self._places[name] = due
        if isinstance(sums, Sums):
            noted = sums.waits
            sums.wait()
            if sums.waits and not noted:
                self._unformed.append((stream, sums))
                self._kept += sums.nbytes
            self._bytes += groups.n_clusters * weighted.numel() * sums.dtype.itemsize
        else:
            self._bytes += sums.nbytes
        if self._bytes > ROOM:
            self._weigh()
        elif self._kept > ROOM:
            self._form()
        return Taken(weighted, due)

    def arrived(self, name: str, grad: Tensor) -> None:
        """Note that ``p.grad`` has the gradient of a parameter.

        Autograd copies a gradient whose layout is not that of the parameter. The copy was made of
        memory without values.
        """
        due = self._places.pop(name, None)
        if due is None:
            return
        if grad.data_ptr() != due.address:
            place = due.place()
            self._weigh()
            with torch.no_grad():
                grad.copy_(place)
        due.arrive(grad)

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
            batches.setdefault((id(one.groups.inverse_shares), one.kind), []).append(one)
        for batch in batches.values():
            with _on(batch[0].kind[3]):
                self._weigh_batch(batch)

    def _weigh_batch(self, batch: list[_Due]) -> None:
        names, groups = [one.name for one in batch], batch[0].groups
        dtype, _, device, _ = batch[0].kind
        raw = memory_for([one.param.numel() for one in batch], dtype, device)
        tables = self._queues.combine_all(
            names, [one.formed() for one in batch], [one.place() for one in batch], raw,
            inverse_shares=groups.inverse_shares, mixture=groups.mixture,
            sigma_scales=groups.sigma_scales, grad_scale=self._grad_scale(),
        )  # fmt: skip
        for one, mean in zip(batch, raw, strict=True):
            one.end(mean)
        self._statistics.update(zip(names, tables, strict=True))


def _stream(device: torch.device) -> Any:
    """Return the stream on which a device is used now; None on the CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


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
