"""A whole training step in one CUDA graph, for loops that are written by hand."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from gq_triton.grad_queue import GradQueue
from gq_triton.holders import Holders, Options
from gq_triton.optim.base import GradQueueOptimizer
from gq_triton.replayed import to_be_replayed

__all__ = ["CapturedStep", "cuda_graph"]


def cuda_graph(
    step: Callable[..., Any], *holders: Optimizer | GradQueue, warmup: int = 3
) -> "CapturedStep":
    """Return a step that is captured in a CUDA graph once and replayed from then on.

    A replay is one launch, however many kernels the step has. The first ``warmup`` calls run the
    step as it is: they train. The next call captures it. A replay runs no Python, so
    all that Python decides in the step is decided for good: branches, numbers, which parameters get
    gradients.

    ``step`` zeroes the gradients, runs forward and backward passes and steps each optimizer, with
    ``scaler.scale``, ``scaler.step`` and ``scaler.update`` where a ``GradScaler`` is used. A
    scheduler steps outside. It can change the learning rate of ``GQSGD`` and ``GQAdamW``, which
    becomes a tensor on the device here. Optimizers of ``torch.optim`` need ``capturable=True`` and
    such a tensor from the start.

    Before every replay the host compares where parameters and state lie, and the options. If they
    lie elsewhere, as after loading a checkpoint, the next calls warm up and capture the step anew.
    A step that needs Python every time is refused with a sentence: a compiled model with clusters,
    modules that run again for their clusters, ``NoiseScale``, optimizers that count in Python.

    On several ranks a call runs the step as it is, after a warning: with the hook of
    ``gq_triton.dist`` or another one, under ``fully_shard``, and under ``DistributedDataParallel``
    with a warm-up of less than 11 steps. With a longer one torch's own rules for capturing it hold.

    No step has been captured on a GPU yet: what a call copies, checks and replays was tested with a
    recording in place of the graph.

    Args:
        step: takes a batch, takes one step, and returns tensors, such as the loss. Nothing that it
            does may make the host wait for the device.
        *holders: the optimizers that ``step`` steps. A ``GradQueue`` attached to one is found.
        warmup: how many steps come before the capture, at least 2: they make the state.

    Raises:
        RuntimeError: there is no CUDA device.
        ValueError: no optimizer, or too short a warm-up.

    Examples:
        >>> from gq_triton import GQAdamW
        >>> device = "cuda" if torch.cuda.is_available() else "cpu"
        >>> model = torch.nn.Linear(4, 2, device=device)
        >>> optimizer = GQAdamW(model.parameters(), lr=1e-3)
        >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        >>> def step(x):
        ...     optimizer.zero_grad()
        ...     loss = model(x).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss
        >>> if device == "cuda":
        ...     step = cuda_graph(step, optimizer)
        >>> for _ in range(6):
        ...     loss = step(torch.ones(8, 4))
        ...     scheduler.step()
    """
    if not torch.cuda.is_available():
        raise RuntimeError("cuda_graph needs a CUDA device, found none: call the step itself")
    return CapturedStep(step, holders, warmup, _CudaGraph)


class Graph(Protocol):
    """What a captured step needs of a graph."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Run a step without capturing it; return its result."""
        ...

    def capture(self, run: Callable[[], Any]) -> Any:
        """Record what a step launches, without launching it; return its result."""
        ...

    def replay(self) -> None:
        """Launch what was recorded."""
        ...


class CapturedStep:
    """A training step that is captured and replayed; see ``cuda_graph``."""

    def __init__(
        self,
        step: Callable[..., Any],
        holders: Sequence[Optimizer | GradQueue],
        warmup: int,
        new_graph: Callable[[torch.device], Graph],
    ) -> None:
        if warmup < 2:
            raise ValueError(f"warmup must be at least 2, got {warmup}: the steps make the state")
        self._holders = Holders(holders)
        self._step, self._warmup = step, warmup
        self._device = self._holders.optimizers[0].param_groups[0]["params"][0].device
        self._new_graph = new_graph
        self._calls = 0
        self._begins = True
        self._without: str | None = None  # why the step runs as it is
        self._graph = new_graph(self._device)
        self._captured: _Capture | None = None
        for optimizer in self._holders.optimizers:
            self._rates_on_device(optimizer)
            # The learning rate that was loaded is another tensor, wherever the state lies.
            optimizer.register_load_state_dict_post_hook(self._loaded)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step.

        Args:
            *args: the arguments of the step. Tensors are copied to the device. A call whose tensors
                have other shapes or types than the captured ones, or whose other arguments differ,
                runs as in the warm-up, without the graph.
            **kwargs: as ``args``.

        Returns:
            What the step returned. Tensors are copies, which the next step leaves alone.

        Raises:
            RuntimeError: an option of an optimizer was changed after the capture, or the step does
                something that no replay would do.
        """
        leaves, structure = tree_flatten((args, kwargs))
        if self._begins:
            self._begin()
        if self._without:
            args, kwargs = tree_unflatten([_to(leaf, self._device) for leaf in leaves], structure)
            return self._step(*args, **kwargs)
        self._holders.begin()
        if self._captured is not None and self._captured.places != self._holders.places():
            self.reset()
        if self._captured is None and self._calls >= self._warmup:
            self._captured = self._capture(leaves, structure)
        elif self._captured is None or not self._captured.take(leaves, structure):
            self._calls += 1
            return self._run(leaves, structure)
        if self._captured is None:  # the model runs otherwise from now on
            return self._run(leaves, structure)
        self._holders.check_options(self._captured.options)
        self._graph.replay()
        self._captured.show()
        self._holders.end()
        return tree_map(_copied, self._captured.result)

    @property
    def captured(self) -> bool:
        """Whether calls are replays by now."""
        return self._captured is not None

    def reset(self) -> None:
        """Forget the graph: the next calls warm up, and capture the step again.

        Call it after options or anything else that Python decides in the step was changed. Where
        parameters or state lie in other memory it is called by itself.
        """
        self._captured, self._calls, self._begins = None, 0, True
        self._graph = self._new_graph(self._device)

    def _loaded(self, optimizer: Optimizer) -> None:
        self._rates_on_device(optimizer)
        self.reset()

    def _begin(self) -> None:
        """Find out whether the step can be captured; warn, once, where it cannot."""
        why = self._holders.kept_from_a_graph(self._warmup)
        if why and why != self._without:
            warnings.warn(
                f"cuda_graph runs this step as it is, without a graph: {why}", stacklevel=3
            )
        self._begins, self._without = False, why

    def _rates_on_device(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, GradQueueOptimizer) or self._holders.divided:
            return
        # In float64, as Python has them: then a replay equals the step that was not captured.
        for group in optimizer.param_groups:
            rate = group["lr"]
            if not isinstance(rate, Tensor) or rate.device != self._device:
                group["lr"] = torch.as_tensor(rate, dtype=torch.float64).to(self._device, copy=True)

    def _run(self, leaves: list[Any], structure: Any) -> Any:
        args, kwargs = tree_unflatten([_to(leaf, self._device) for leaf in leaves], structure)
        run = self._graph.warm_up
        with to_be_replayed():
            result = self._holders.watched(lambda: run(lambda: self._step(*args, **kwargs)))
        self._holders.end()
        return result

    def _capture(self, leaves: list[Any], structure: Any) -> "_Capture | None":
        """Return the captured step; None where its Python would do other things the next time."""
        static = [_owned(leaf, self._device) for leaf in leaves]
        args, kwargs = tree_unflatten(static, structure)
        holders, run = self._holders, self._graph.capture
        options, learned = holders.options(), holders.learned()
        try:
            with to_be_replayed():
                result = holders.watched(lambda: run(lambda: self._step(*args, **kwargs)))
        except BaseException as error:
            self.reset()  # what was begun cannot be captured into again
            if isinstance(error, torch.AcceleratorError):
                raise RuntimeError(_NOT_CAPTURED) from error
            raise
        if holders.learned() != learned:
            self._graph = self._new_graph(self._device)
            return None
        return _Capture(static, structure, result, options, holders.places(), holders.shown())


class _Capture:
    """The arguments, the result, the options and the memory of a captured step."""

    def __init__(
        self,
        static: list[Any],
        structure: Any,
        result: Any,
        options: Options,
        places: list[Any],
        show: Callable[[], None],
    ) -> None:
        self._static, self._structure = static, structure
        self.result, self.options, self.places, self.show = result, options, places, show

    def take(self, leaves: list[Any], structure: Any) -> bool:
        """Copy arguments to where the graph reads them; return False if they do not fit."""
        if structure != self._structure:
            return False
        if not all(map(_fits, leaves, self._static)):
            return False
        for leaf, static in zip(leaves, self._static, strict=True):
            if isinstance(static, Tensor):
                static.copy_(leaf, non_blocking=True)
        return True


class _CudaGraph:
    """A CUDA graph and the stream of its capture, on which the steps before it run too.

    Autograd runs the end of a backward pass on the stream that it first met; were that another
    stream, the capture would have to join it.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, run: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = run()
        current.wait_stream(self._stream)
        return result

    def capture(self, run: Callable[[], Any]) -> Any:
        with torch.cuda.graph(self._graph, stream=self._stream):
            return run()

    def replay(self) -> None:
        self._graph.replay()


def _fits(leaf: Any, static: Any) -> bool:
    if not isinstance(static, Tensor):
        return not isinstance(leaf, Tensor) and bool(leaf == static)
    tensor = isinstance(leaf, Tensor)
    return tensor and leaf.shape == static.shape and leaf.dtype == static.dtype


def _to(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf


def _owned(leaf: Any, device: torch.device) -> Any:
    """Return a copy of a tensor on the device, which only the graph uses."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_like(leaf, device=device, requires_grad=False).copy_(leaf)


def _copied(result: Any) -> Any:
    return result.detach().clone() if isinstance(result, Tensor) else result


_NOT_CAPTURED = (
    "the step could not be captured, because something in it has the host wait for the device, as "
    ".item(), print() and a GradScaler do with an optimizer that is not fused: move it out of the "
    "step; the error above shows the line"
)
