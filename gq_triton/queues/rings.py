"""The state of a model's queues: the rings by parameter name, their counters, and the losses."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gq_triton.describe import memory
from gq_triton.float8 import stored_type
from gq_triton.options import LawOptions
from gq_triton.queues.losses import length_of, new_losses, record_loss
from gq_triton.queues.saved import SHAPE_OPTIONS, digests, saved_rule
from gq_triton.ring import fill_ring, in_use, local, new_counter, new_queue, refuse_capture, rows
from gq_triton.saved.rules import COUNTER_LIMIT, check

__all__ = ["Rings"]


class Rings:
    """The last L raw gradients of every parameter of a model, and the losses of the last steps.

    A ring is allocated when its parameter first has a gradient, on its device and in its memory
    order, so that nothing depends on when the model was moved or wrapped.

    Args:
        params: parameters by name.
        options: options of the law.
    """

    # Whether a parameter's ring is here as a whole, not a part of it and statistics of the rest.
    whole = True

    def __init__(self, params: Mapping[str, Tensor], options: LawOptions) -> None:
        self.params = dict(params)
        self.options = options
        self._queue: dict[str, Tensor] = {}
        self._queued: dict[str, Tensor] = {}
        self._layouts: dict[str, tuple[torch.device, tuple[int, ...]]] = {}
        # By parameter name, its ring and the view (L, P) of it that engines take.
        self._views: dict[str, tuple[Tensor, Tensor]] = {}
        self._losses: Tensor | None = None

    def __repr__(self) -> str:
        """Return the numbers of parameters and elements, and the bytes of the rings here."""
        return memory(self.params.values(), self._queue.values())

    def _stored_type(self, name: str) -> torch.dtype:
        """Return the type of a parameter's ring."""
        return stored_type(self.options.queue_dtype, self.params[name].dtype)

    def _allocate(self, name: str) -> None:
        """Allocate a parameter's ring, or bring one to the parameter's device and order."""
        param = self.params[name]
        layout = local(param).device, param.stride()
        if self._layouts.get(name) == layout:
            return
        self._layouts[name], queue = layout, self._queue.get(name)
        fresh = new_queue(param, self.options.queue_length, self.options.queue_dtype)
        if queue is not None:
            fill_ring(fresh, queue)
            in_use(queue)
        self._queue[name] = fresh
        counter = self._queued.get(name, new_counter(param))
        self._queued[name] = counter.to(local(fresh).device)

    def _flat_rings(self, names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Return rings ``(L, P)`` and their counters, as engines take them; allocate new ones."""
        flat = []
        for name in names:
            self._allocate(name)
            queue, known = self._queue[name], self._views.get(name)
            # Another ring, or one whose memory a program has moved, has another view.
            if known is None or known[0] is not queue or not _same_memory(*known):
                shard = local(queue)
                known = self._views[name] = shard, rows(shard)
            flat.append(known[1])
        return flat, [self._queued[name] for name in names]

    def record_loss(self, loss: Tensor | float) -> None:
        """Record this step's unscaled loss for the effective length, without waiting for it.

        Args:
            loss: one number, 0-d or one element.
        """
        if self.options.loss_window is None:
            return
        device = loss.device if isinstance(loss, Tensor) else torch.device("cpu")
        earlier = self._history(device)
        # Loaded losses may lie on another device.
        losses = earlier.to(loss.device) if isinstance(loss, Tensor) else earlier
        recorded = record_loss(losses, loss)
        if self._losses is losses:  # a replay finds the losses where they are now
            losses.copy_(recorded)
        else:
            refuse_capture("a history of losses", recorded.device)
            self._losses = recorded
        in_use(earlier, losses)

    def effective_length(
        self, device: torch.device | None = None, coming: Tensor | None = None
    ) -> Tensor | None:
        """Return how many of the newest gradients the statistics use, 0-d int64; None for L.

        Args:
            device: where the length is needed; None leaves it where the losses are.
            coming: a loss that is yet to be recorded, 0-d, or None.
        """
        losses = self._losses
        if coming is not None and self.options.loss_window is not None:
            losses = record_loss(self._history(coming.device).to(coming.device), coming)
        length = length_of(losses, self.options, device or torch.device("cpu"))
        if length is None or device is None:
            return length
        return length.to(device, non_blocking=True)

    def _history(self, device: torch.device) -> Tensor:
        """Return the losses recorded so far, or an empty history on ``device``."""
        window = self.options.loss_window
        assert window is not None
        if self._losses is None:
            return new_losses(window, self.options.queue_length, device)
        return self._losses

    def init_state(self) -> None:
        """Allocate the ring of every trainable parameter and the losses before the first step.

        A checkpoint library that needs the state's shapes before the first step then finds them.
        """
        for name, param in self.params.items():
            if param.requires_grad:
                self._allocate(name)
        if self.options.loss_window is not None and self._losses is None:
            self._losses = self._history(next(iter(self.params.values())).device)

    def _rings(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield every whole ring and its counter by name."""
        for name, queue in self._queue.items():
            yield name, queue, self._queued[name]

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors of the rings, counters and losses that this rank holds."""
        yield from self._queue.values()
        yield from self._queued.values()
        if self._losses is not None:
            yield self._losses

    def digest(self) -> str:
        """Return the SHA-256 of all rings, counters and losses: equal exactly where those are.

        The host waits for the device and reads everything: meant for checks, not for every step.
        """
        return hashlib.sha256(b"".join(self.digests().values())).hexdigest()

    def digests(self) -> dict[str, bytes]:
        """Return the SHA-256 of each parameter's ring and counter by name, and that of the losses.

        A ring that nothing was queued in counts as absent, allocated or not. The losses come last,
        under ``LOSSES``.
        """
        return digests(self.params, self._rings(), self._losses)

    def shared_digests(self) -> dict[str, bytes]:
        """Return the digests, by name, of the state that all ranks must share: here all of it."""
        return self.digests()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values: ``torch.load(weights_only=True)`` reads it.

        Returns:
            ``queue``: rings ``(L, *param.shape)`` by name; ``queued``: how many gradients each has
            taken; ``losses``; ``options``.
        """
        rings = list(self._rings())
        return {
            "options": {name: getattr(self.options, name) for name in SHAPE_OPTIONS},
            "losses": self._losses,
            "queue": {name: queue for name, queue, _ in rings},
            "queued": {name: queued for name, _, queued in rings},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state; training continues bit for bit.

        Raises:
            ValueError: the state belongs to another model or to other options. Nothing is changed.
        """
        self.check_saved(state)
        for name, queue in state["queue"].items():
            self._queue[name] = queue.detach().clone()
            self._queued[name] = state["queued"][name].detach().clone()
        for name in [name for name in self._queue if name not in state["queue"]]:
            del self._queue[name], self._queued[name]
        losses = state["losses"]
        self._losses = None if losses is None else losses.detach().clone()
        self._layouts.clear()
        self._views.clear()

    def check_saved(self, state: Any, highest: int = COUNTER_LIMIT - 1) -> None:
        """Raise a ValueError that names what keeps a saved state from being loaded.

        Args:
            state: what ``state_dict`` returned; further keys are not looked at.
            highest: the largest number of gradients that a ring may have taken.
        """
        check(state, saved_rule(self.params, self.options, highest), "the saved queue")


def _same_memory(ring: Tensor, view: Tensor) -> bool:
    """Return whether a view of a ring still shows its memory and all its elements."""
    return view.data_ptr() == ring.data_ptr() and view.numel() == ring.numel()
