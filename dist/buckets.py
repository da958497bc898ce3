"""DDP's buckets: the parameters in each, the first one of a step, and the saved run's buckets."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gq_triton.engines import engine
from gq_triton.saved.rules import Also, ListOf, OneOf, check

__all__ = ["BucketBuffers", "Buckets"]


class BucketBuffers:
    """Buffers by bucket, kept from step to step: on the CPU fresh memory pages cost time."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, ...], Tensor] = {}

    def get(self, names: Sequence[str], make: Callable[[], Tensor]) -> Tensor:
        """Return the buffer of a bucket; allocate it when the bucket is new.

        When DDP has cut its buckets anew, the buffers of old buckets that share a parameter with
        the new one are freed.

        Args:
            names: the names of the bucket's parameters.
            make: allocates the buffer.
        """
        key = tuple(names)
        if key not in self.held:
            others = {k: kept for k, kept in self.held.items() if set(k).isdisjoint(key)}
            self.held = {**others, key: make()}
        return self.held[key]


class Buckets:
    """The buckets of one DDP module, identified by the names of their parameters.

    DDP's bucket numbers identify nothing: two buckets have the number 0 in the first step of a
    static graph, and DDP cuts all buckets anew after the first steps.

    Args:
        params: the model's parameters by name.
        backend: name of the engine, checked for every new bucket's device.
    """

    def __init__(self, params: Mapping[str, Tensor], backend: str) -> None:
        self._params, self._backend = params, backend
        self._names = {id(param): name for name, param in params.items()}
        self._checked: set[tuple[str, ...]] = set()
        self._seen: set[str] = set()
        self._current: list[tuple[str, ...]] = []
        self.saved: list[tuple[str, ...]] = []
        self._steps_since_load = 0

    def names(self, bucket: Any) -> tuple[str, ...]:
        """Return the names of a ``GradBucket``'s parameters, in its order; check new buckets.

        Raises:
            ValueError: a sparse gradient, a parameter that the state does not know, or a parameter
                with holes in memory.
        """
        params = bucket.parameters()
        unknown = [tuple(param.shape) for param in params if id(param) not in self._names]
        if unknown:
            raise ValueError(
                f"DDP reduces a parameter of shape {unknown[0]} that the state does not know: "
                "build GradQueueState from the model that DDP wraps, after its last change"
            )
        names = tuple(self._names[id(param)] for param in params)
        if names not in self._checked:
            buffer = bucket.buffer()
            if buffer.layout != torch.strided:
                raise ValueError(
                    f"{', '.join(names)} has a gradient of layout {buffer.layout}, which a queue "
                    "cannot hold: build the layer with sparse=False"
                )
            for name, param in zip(names, params, strict=True):
                _check_memory(name, param)
            engine(buffer.device, self._backend)
            self._checked.add(names)
        return names

    def begins_step(self, names: tuple[str, ...]) -> bool:
        """Return whether a bucket is the first one of a backward pass.

        A pass begins with the very first bucket, and again when a parameter comes a second time.
        The end of autograd's backward pass is no criterion: a rank that has joined runs none.
        """
        if self._seen and self._seen.isdisjoint(names):
            self._seen.update(names)
            return False
        self._steps_since_load += 1
        self._seen = set(names)
        self._current = []
        return True

    def expect_step(self) -> None:
        """Let the next bucket begin a step: another DDP module may have other parameters."""
        self._seen = set()

    def note(self, names: tuple[str, ...], static_graph: bool) -> None:
        """Remember a bucket of this step, or the saved run's buckets that are reduced instead."""
        self._current += self.former(names, static_graph) or [names]

    def former(self, names: tuple[str, ...], static_graph: bool) -> list[tuple[str, ...]]:
        """Return the saved run's buckets that replace this bucket in the reduction.

        In the first steps after loading, the saved run's buckets are reduced one by one, so that
        sums over ranks are formed in the saved run's order. The list is empty where the bucket is
        reduced as it is.
        """
        initial = 2 if static_graph else 1
        if self._steps_since_load > initial or names in self.saved:
            return []
        members = set(names)
        former = [bucket for bucket in self.saved if not members.isdisjoint(bucket)]
        return former if sum(map(len, former)) == len(members.union(*former)) == len(names) else []

    def split(self, names: Sequence[str], buffer: Tensor) -> list[Tensor]:
        """Return each parameter's slice of a bucket, flat, in the parameter's memory order.

        ``bucket.gradients()`` would be wrong for ``channels_last``: it reads a slice in row-major
        order, and DDP writes the slice in the parameter's memory order.
        """
        return list(buffer.split([self._params[name].numel() for name in names]))

    def layout(self) -> list[list[str]]:
        """Return the parameters' names in every bucket of the last step, for a saved state."""
        return [list(names) for names in self._current or self.saved]

    def check_saved(self, layout: Any) -> None:
        """Raise a ValueError that names what keeps a saved layout from being loaded."""
        rule = ListOf(ListOf(OneOf(self._params.keys()), shortest=1))
        check(layout, Also(rule, _twice), "the saved layout of the buckets")

    def load(self, layout: Sequence[Sequence[str]]) -> None:
        """Load the buckets of a saved state; the next bucket begins a step."""
        self.saved = [tuple(names) for names in layout]
        self._current, self._seen, self._steps_since_load = [], set(), 0


def _twice(layout: Sequence[Sequence[str]]) -> str | None:
    """Return a message that names a parameter that lies in two buckets; None where none does."""
    names = [name for bucket in layout for name in bucket]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    return f"it has {twice[0]!r} twice" if twice else None


def _check_memory(name: str, param: Tensor) -> None:
    """Raise a ValueError where DDP lays out the gradient in another order than the ring's."""
    row = torch.empty_like(param, device="meta", memory_format=torch.preserve_format)
    if row.stride() != param.stride() and not row.is_contiguous():
        raise ValueError(
            f"{name} of strides {param.stride()} has holes in memory: make it contiguous before "
            "DDP wraps the model"
        )
