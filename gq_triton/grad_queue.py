"""GradQueue: the plug-in that weights the gradients of any torch optimizer in any loop."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gq_triton.optim.base import GradQueueOptimizer
from gq_triton.queues import Queues
from gq_triton.ring import MIN_QUEUE_LENGTH, flat, local, write_back_

__all__ = ["GradQueue", "Handle", "parameter_names"]

# Optimizers that a plug-in weights already, so that no second one weights twice.
_attached: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


def parameter_names(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters by name, without what DDP and ``torch.compile`` prepend."""
    named = model.named_parameters()
    return {name.replace("_orig_mod.", "").removeprefix("module."): p for name, p in named}


class Handle:
    """What ``attach`` returns: ``remove`` undoes it."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Leave the optimizer as it was; a second call does nothing."""
        if self._undo is not None:
            self._undo()
            self._undo = None


class GradQueue:
    """Weights gradients by their scarcity just before an optimizer's step.

    The last L raw gradients of every parameter are kept; a new one is multiplied, element by
    element, by ``clip(|g - mu| / sigma, 1/rho, rho)`` (Grad Queue, arXiv 2404.16917, equations 1
    and 2). The user's loop does not change.

    Args:
        model: the model whose parameters the optimizer updates; a DDP or compiled one may be given.
        queue_length: L, gradients kept per element.
        min_queue_length: lower bound of the effective length.
        rho: bound of the weight, at least 1; 1 switches the law off.
        loss_window: None keeps the effective length at ``queue_length``; w turns on the paper's
            rule with windows of w losses (section 3.1); see ``record_loss``.
        queue_dtype: type of the queue; None takes the parameter's.
        match_norm: rescale each parameter's weighted gradient to the norm of the raw one.
        backend: ``"auto"``, ``"triton"``, ``"numba"`` or ``"torch"``.

    Raises:
        ValueError: an option that cannot hold.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.Adagrad(model.parameters())
        >>> queue = GradQueue(model)
        >>> handle = queue.attach(optimizer)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> queue.metrics()["mean_weight"]
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        queue_length: int = 5,
        min_queue_length: int = MIN_QUEUE_LENGTH,
        rho: float = 3.0,
        loss_window: int | None = None,
        queue_dtype: torch.dtype | None = None,
        match_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        self._names = {param: name for name, param in parameter_names(model).items()}
        self._queues = Queues(
            {name: param for param, name in self._names.items()},
            queue_length=queue_length,
            min_queue_length=min_queue_length,
            rho=rho,
            loss_window=loss_window,
            queue_dtype=queue_dtype,
            match_norm=match_norm,
            backend=backend,
        )
        self._handle: Handle | None = None

    def attach(self, optimizer: Optimizer, grad_scaler: Any = None) -> Handle:
        """Weight the gradients in every ``optimizer.step()`` from now on.

        Args:
            optimizer: any torch optimizer over parameters of the model.
            grad_scaler: the loop's ``torch.amp.GradScaler``, if there is one.

        Returns:
            A handle; ``handle.remove()`` undoes it. The queue stays.

        Raises:
            TypeError: not a torch optimizer.
            ValueError: the gradients would be weighted twice, or none of them is the model's.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"attach needs a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, GradQueueOptimizer):
            name = type(optimizer).__name__
            raise ValueError(
                f"{name} weights its gradients itself: attach to a plain torch optimizer, or use "
                f"{name} without GradQueue"
            )
        if self._handle is not None or optimizer in _attached:
            raise ValueError(
                "attached already, and a second time would weight twice: call remove() on the "
                "first handle"
            )
        if not any(p in self._names for g in optimizer.param_groups for p in g["params"]):
            raise ValueError("none of the optimizer's parameters belongs to the model")

        def before_step(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # args[0] is the optimizer itself.
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                self._weigh(optimizer)
                return None
            # The closure computes the gradients inside step(): weigh them when it returns.
            weighing = self._closure(optimizer, closure)
            rest = {name: value for name, value in kwargs.items() if name != "closure"}
            return (args[0], weighing, *args[2:]), rest

        hook = optimizer.register_step_pre_hook(before_step)

        def undo() -> None:
            hook.remove()
            _attached.discard(optimizer)
            self._handle = None

        _attached.add(optimizer)
        self._handle = Handle(undo)
        return self._handle

    def _closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def weighing() -> Any:
            loss = closure()
            if loss is not None:
                self.record_loss(loss)
            self._weigh(optimizer)
            return loss

        return weighing

    @torch.no_grad()
    def _weigh(self, optimizer: Optimizer) -> None:
        """Weight what the optimizer is about to use, and queue the raw gradients."""
        # Set by GradScaler during a step that unscales by itself (fused optimizers).
        grad_scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        batches: dict[Any, list[tuple[str, Tensor, Tensor]]] = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None or param not in self._names:
                    continue
                self._check_dense(param)
                grad, like = local(param.grad), local(param)
                key = grad.device, grad.dtype, param.dtype, getattr(param, "placements", None)
                batches.setdefault(key, []).append((self._names[param], grad, like))
        for batch in batches.values():
            values = [flat(grad, like) for _, grad, like in batch]
            self._queues.weigh_(
                [name for name, _, _ in batch], values, grad_scale=grad_scale, found_inf=found_inf
            )
            for (_, grad, like), value in zip(batch, values, strict=True):
                write_back_(grad, value, like)

    def _check_dense(self, param: Tensor) -> None:
        grad = param.grad
        assert grad is not None
        if grad.layout != torch.strided or grad.is_complex():
            raise ValueError(
                f"{self._names[param]} has a gradient of layout {grad.layout} and type "
                f"{grad.dtype}, which a queue cannot hold: build the layer with sparse=False, or "
                "give the parameter to an optimizer of its own"
            )

    def record_loss(self, loss: Tensor | float) -> None:
        """Tell the effective length the loss of the step to come, unscaled.

        Needed only with ``loss_window``, and only where ``optimizer.step`` gets no closure.

        Args:
            loss: one number, 0-d or one element.
        """
        self._queues.record_loss(loss)

    def metrics(self) -> dict[str, Any]:
        """Return what the law did in the last step, in one transfer to the host.

        Returns:
            ``mean_weight``; ``norm_ratio``, ``|g*| / |g|``; ``saturated_high`` and
            ``saturated_low``, shares of elements at rho and at 1/rho; ``effective_length``;
            ``cluster_sizes``, None without clusters. Empty before the first step.
        """
        values: dict[str, Any] = dict(self._queues.metrics())
        return values | {"cluster_sizes": None} if values else values

    def digest(self) -> str:
        """Return the SHA-256 of the queue: equal exactly where every element of it is."""
        return self._queues.digest()

    def state_dict(self) -> dict[str, Any]:
        """Return the queue: tensors by parameter name and plain values."""
        return self._queues.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved queue; training continues bit for bit.

        Raises:
            ValueError: the state belongs to another model or other options. Nothing is changed.
        """
        self._queues.load_state_dict(state)
