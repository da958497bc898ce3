"""A stand-in for a CUDA graph: it records what a step launches, and runs that again.

A replay calls no Python of the step. Whatever Python decided while the step was recorded is frozen:
numbers, branches, addresses. Unlike a capture the recording also runs the step once.
"""

import contextlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter


class Recording(TorchDispatchMode):
    """A mode that records operations and kernels; the host may read no value meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._inside:  # the interpreter's own operations belong to a kernel
            return func(*args, **kwargs)
        assert func.__name__ != "_local_scalar_dense.default", (
            "the host reads a value of the device"
        )
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    @contextlib.contextmanager
    def __call__(self):
        """Record everything that runs inside."""
        run = interpreter.GridExecutor.__call__

        def launch(executor, *args, **kwargs):
            self._calls.append((executor, args, kwargs, None))
            self._inside = True
            try:
                return run(executor, *args, **kwargs)
            finally:
                self._inside = False

        with mock.patch.object(interpreter.GridExecutor, "__call__", launch), self:
            yield self

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
