"""A stand-in for a CUDA graph: it records what a step launches, and runs that again.

A replay calls no Python of the step. Whatever Python decided while the step was recorded is frozen:
numbers, branches, addresses. Unlike a capture the recording also runs the step once.
"""

import contextlib
import gc
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from meta_steps import product_frame
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import interpreter

from gq_triton.captured import CapturedStep

# Files of the package whose small tensors, numbers of passes and layers, are the host's own.
ON_HOST = "cluster_grad/passes.py", "cluster_grad/site.py"


def _memory(value: Any) -> Any:
    """Return another tensor on the same memory; what is no tensor stays as it is.

    Autograd asks whether anybody else holds a gradient, and takes it without a copy if not.
    """
    if not isinstance(value, Tensor):
        return value
    with torch.no_grad():
        place = value.storage_offset(), value.shape, value.stride()
        return value.detach().new_empty(0).set_(value.untyped_storage(), *place)


class Recording(TorchDispatchMode):
    """A mode that records operations and kernels; the host may read no value meanwhile.

    Args:
        on_host: files of the package whose small tensors are the host's own, which it may read.
    """

    def __init__(self, on_host: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._on_host = on_host
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._inside:  # the interpreter's own operations belong to a kernel
            return func(*args, **kwargs)
        if func.__name__ == "_local_scalar_dense.default":
            reader = product_frame()
            assert reader.startswith(self._on_host or "-"), f"{reader} reads a value of the device"
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self._calls.append((func, *tree_map(_memory, (args, kwargs, result))))
        return result

    @contextlib.contextmanager
    def __call__(self):
        """Record everything that runs inside."""
        run = interpreter.GridExecutor.__call__

        def launch(executor, *args, **kwargs):
            self._calls.append((executor, *tree_map(_memory, (args, kwargs)), None))
            self._inside = True
            try:
                return run(executor, *args, **kwargs)
            finally:
                self._inside = False

        with mock.patch.object(interpreter.GridExecutor, "__call__", launch), self:
            yield self

    def dangling(self) -> list[str]:
        """Return what reads or writes memory that existed before and that nobody else holds now.

        A graph holds the memory of its own tensors alone: this memory may be another tensor's.
        """
        made, outside, here = set[int](), dict[int, str](), Counter[int]()
        for call, args, kwargs, result in self._calls:
            for place, values in enumerate((tree_leaves((args, kwargs)), tree_leaves(result))):
                for value in values:
                    if not isinstance(value, Tensor):
                        continue
                    key = value.untyped_storage()._cdata
                    here[key] += 1
                    # What torch.tensor() makes of numbers is the host's own.
                    fresh = getattr(call, "__name__", "") == "lift_fresh.default"
                    if place == 0 and key not in made and not fresh:
                        outside.setdefault(key, f"{call} of {tuple(value.shape)}")
                    elif key not in outside:
                        made.add(key)
        gc.collect()
        count: Any = torch._C._storage_Use_Count  # pyright: ignore[reportAttributeAccessIssue]
        # The object by which Python was shown a storage may hold it, too.
        probe = torch.ones(1)
        shown = count(probe.untyped_storage()._cdata) - 1
        return [what for key, what in outside.items() if count(key) <= here[key] + shown]

    @torch.no_grad()
    def replay(self) -> None:
        """Run all that was recorded again, in the same memory."""
        for call, args, kwargs, result in self._calls:
            again = call(*args, **kwargs)
            if getattr(call, "__name__", "").startswith(("empty", "new_empty")):
                continue
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def captured(loop: Any, warmup: int = 3, log: list[str] | None = None) -> CapturedStep:
    """Return a captured step whose graph is a recording, which undoes what the recording ran.

    Args:
        loop: has the step, ``holders()``, and ``tensors()``: all that a step changes, apart from
            gradients.
        warmup: as for ``cuda_graph``.
        log: gets a word for every step, capture and replay.
    """
    noted: list[str] = [] if log is None else log

    class Stand:
        def __init__(self, device: torch.device) -> None:
            self.recording = Recording(on_host=ON_HOST)

        def warm_up(self, run: Callable[[], Any]) -> Any:
            noted.append("step")
            return run()

        def capture(self, run: Callable[[], Any]) -> Any:
            noted.append("capture")
            before = [tensor.detach().clone() for tensor in loop.tensors()]
            with self.recording():
                result = run()
            with torch.no_grad():
                for tensor, value in zip(loop.tensors(), before, strict=True):
                    tensor.copy_(value)
            return result

        def replay(self) -> None:
            noted.append("replay")
            self.recording.replay()

    return CapturedStep(loop.step, loop.holders(), warmup, Stand)
