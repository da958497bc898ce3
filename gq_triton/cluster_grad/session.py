"""From the clusters' gradient sums to ``p.grad``: uses, weighting, and the raw mean beside it."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.passes import in_backward
from gq_triton.cluster_grad.site import Block, new_number
from gq_triton.cluster_grad.step import Partial, Step
from gq_triton.grouping.groups import Groups
from gq_triton.queues import Queues
from gq_triton.ring import flat, rescale_

__all__ = ["Session"]


class Session:
    """The clustered gradients of one model while its plug-in is attached.

    Args:
        queues: the rings, read for the weights.
        names: parameters' names.
        assign: finds the clusters of a step.
        match_norm: whether each weighted gradient gets the norm of the raw one here.
    """

    def __init__(
        self,
        queues: Queues,
        names: dict[Tensor, str],
        assign: Callable[[Step], Groups],
        *,
        match_norm: bool,
    ) -> None:
        self.queues = queues
        self.params = {name: param for param, name in names.items()}
        self.names = names
        self.step: Step | None = None
        self.backend = queues.backend
        # What compiled graphs see of it: compiled_ops.py.
        self.number, self.clock = new_number(self), torch.zeros(1, dtype=torch.int64)
        self.token: Tensor | None = None
        self.grad_scale: Callable[[], Tensor | None] = lambda: None
        # Raw gradients beside p.grad, and what the weighting of each parameter's last one did.
        self.raw: dict[str, Tensor] = {}
        self.statistics: dict[str, Tensor] = {}
        self.assign = assign
        self.match_norm = match_norm
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._watched: dict[str, Any] = {}
        # What p.grad looked like when the last backward pass had added to it: object and version.
        self._left: dict[str, tuple[int, int]] = {}
        # Of the backward pass that runs: raw gradients on their way to p.grad, and whether that
        # still held earlier ones before; its steps; whether any reached p.grad.
        self._fresh: dict[str, tuple[Tensor, bool | Tensor]] = {}
        self._running = self._committed = False
        # Whether the steps of that pass have been asked for already: none is to be remembered.
        self._taken = False
        self._steps: list[Step] = []
        # Steps of earlier passes that the present gradients go back to: accumulation.
        self._earlier: list[Step] = []

    def new_step(self) -> Step:
        """Return the step of a forward pass that begins."""
        if not in_backward():
            self._end_pass()  # left open by an error
        session = weakref.ref(self)  # the registry of steps must not keep the model alive

        def assign(step: Step) -> Groups:
            alive = session()
            if alive is None:
                raise RuntimeError("the GradQueue of this model is gone: keep it while training")
            return alive.assign(step)

        self.step = Step(assign)
        return self.step

    def release(self) -> None:
        """Forget the last step and give its memory back."""
        self.step = self.token = None
        self._scratch.clear()
        self.take_raw()
        for handle in self._watched.values():
            handle.remove()
        self._watched.clear()

    def trainable(self, module: nn.Module) -> list[str]:
        """Return the names of a layer's own parameters that have a gradient."""
        params = module.parameters(recurse=False)
        return [self.names[param] for param in params if param.requires_grad]

    def uses(self, step: Step, param: Tensor) -> int:
        """Return how often a parameter was used in a forward pass."""
        return step.uses.get(self.names[param], 1)

    def scratch(self, clusters: int, elements: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return room for a parameter's sums by cluster ``(K, elements)``, until the next call.

        On the CPU it is the same memory every time: fresh pages cost more than what is done there.
        """
        if like.device.type != "cpu":
            return torch.empty(clusters, elements, dtype=dtype, device=like.device)
        room = self._scratch.get(dtype)
        if room is None or room.numel() < clusters * elements:
            room = self._scratch[dtype] = torch.empty(clusters * elements, dtype=dtype)
        return room[: clusters * elements].view(clusters, elements)

    def give(
        self, step: Step, param: Tensor, blocks: Iterator[Block], dtype: torch.dtype
    ) -> Tensor:
        """Take one use's sums by cluster; return what they add to the weighted gradient.

        The clusters of all uses of a parameter are weighted together, so a later use returns the
        difference to what the earlier ones have returned. Whichever of them take part in a backward
        pass, ``p.grad`` ends right.

        Args:
            step: the forward pass they belong to.
            param: the parameter.
            blocks: its parts, in memory order, which together cover it.
            dtype: type of the sums.
        """
        name = self.names[param]
        uses, partial = step.uses.get(name, 1), step.partial.get(name)
        if uses == 1 and partial is None:
            weighted, raw = self._combine(step, name, param, blocks, dtype)
            self._keep(step, name, raw)
            return weighted
        if partial is None:
            shape = len(step.groups.sizes), param.numel()
            partial = Partial(torch.zeros(shape, dtype=dtype, device=param.device))
            step.partial[name] = partial
        for start, stop, sums in blocks:
            partial.sums[:, start:stop] += sums
        partial.uses += 1
        whole = iter([(0, param.numel(), partial.sums)])
        weighted, raw = self._combine(step, name, param, whole, dtype)
        result = weighted - partial.weighted
        self._keep(step, name, raw - partial.raw)
        partial.weighted, partial.raw = weighted, raw
        if partial.uses == uses:
            del step.partial[name]
        return result

    def enter_pass(self, step: Step) -> None:
        """Note that a step's gradients are computed in the backward pass that runs."""
        if not step.finishing:
            step.finishing = True
            self._steps.append(step)
        if not self._running:
            self._running = True
            engine = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
            engine.queue_callback(self._end_pass)

    def _end_pass(self) -> None:
        """Forget what no later pass may see: uses that did not come, gradients not accumulated."""
        for step in self._steps:
            step.finishing = False
            step.partial.clear()
        if self._committed and not self._taken:
            self._earlier += self._steps
        self._steps, self._fresh = [], {}
        self._running = self._committed = self._taken = False

    @property
    def accumulates(self) -> bool:
        """Whether the present gradients go back to earlier backward passes too."""
        return bool(self._earlier)

    def take_contributors(self) -> list[Step]:
        """Return the steps that the present gradients are made of, once."""
        steps = self._earlier + self._steps
        self._earlier, self._committed, self._taken = [], False, self._running
        return steps

    def finish(self, step: Step, param: Tensor, sums: Tensor) -> Tensor:
        """Return the weighted gradient from complete sums by cluster ``(K, *param.shape)``."""
        total = torch.stack([flat(part, like=param) for part in sums])
        blocks = iter([(0, param.numel(), total)])
        weighted, raw = self._combine(step, self.names[param], param, blocks, sums.dtype)
        self._keep(step, self.names[param], raw)
        return weighted

    def _combine(
        self, step: Step, name: str, param: Tensor, blocks: Iterator[Block], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted and the raw gradient of a parameter."""
        weighted = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
        raw = torch.empty_like(weighted)
        out, mean = flat(weighted, like=param), flat(raw, like=param)
        tables = []
        for start, stop, sums in blocks:
            into = out[start:stop], mean[start:stop]
            tables.append(self._weigh(step, name, (start, stop), sums, into)[2])
        table = tables[0] if len(tables) == 1 else torch.cat(tables)
        return self._rescaled(name, weighted, table).to(param.dtype), raw

    def _weigh(
        self, step: Step, name: str, part: tuple[int, int] | Tensor, sums: Tensor,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        groups = step.groups
        return self.queues.combine(
            name, part, sums, inverse_shares=groups.inverse_shares, mixture=groups.mixture,
            sigma_scales=groups.sigma_scales, grad_scale=self.grad_scale(), into=into,
        )  # fmt: skip

    def give_rows(self, step: Step, param: Tensor, rows: Tensor, sums: Tensor) -> Tensor:
        """Return the weighted gradient of a table of which only some rows were touched.

        A row that no sample touched has gradient 0 in every cluster, so 0 whatever its weight.

        Args:
            step: the forward pass.
            param: the table ``(V, d)``, contiguous.
            rows: the touched rows ``(U,)`` int64, without repetition.
            sums: ``(K, U * d)``.
        """
        name = self.names[param]
        part = self._weigh(step, name, rows, sums)
        weighted, raw = (torch.zeros_like(param, dtype=sums.dtype) for _ in range(2))
        for table, values in zip((weighted, raw), part[:2], strict=True):
            table.index_copy_(0, rows, values.view(len(rows), -1))
        self._keep(step, name, raw)
        return self._rescaled(name, weighted, part[2]).to(param.dtype)

    def _rescaled(self, name: str, weighted: Tensor, statistics: Tensor) -> Tensor:
        """Give a weighted gradient the norm of the raw one where ``match_norm`` asks for it.

        Also keep what the law did to it, ``(C, 5)``: nobody waits for the sum.
        """
        if self.match_norm:
            statistics = statistics.sum(dim=0, keepdim=True)
            rescale_([weighted], statistics)
            statistics[:, 1] = statistics[:, 0]
        self.statistics[name] = statistics
        return weighted

    def _keep(self, step: Step, name: str, raw: Tensor) -> None:
        """Keep a raw mean gradient until ``p.grad`` has taken the weighted one."""
        raw = raw if step.groups.unit == 1 else raw / step.groups.unit
        if name in self._fresh:
            more, goes_on = self._fresh[name]
            self._fresh[name] = more + raw, goes_on
        else:
            self._fresh[name] = raw, self._goes_on(name)

    def _goes_on(self, name: str) -> bool | Tensor:
        """Return whether ``p.grad`` still holds what earlier passes added to it, on its device."""
        grad, left = self.params[name].grad, self._left.get(name)
        if grad is None or left is None or left[0] != id(grad):
            return False
        # Changed in place: zeroed for a new step, or clipped.
        return True if left[1] == grad._version else (grad != 0).any()

    def note(self, param: Tensor) -> None:
        """Take the raw gradient along whose weighted one ``p.grad`` has just taken."""
        if param.grad is None:
            return
        name = self.names[param]
        if name in self._fresh:
            raw, goes_on = self._fresh.pop(name)
            if not self._committed:
                self._committed = True
                if not bool(goes_on):
                    self._earlier = []
            earlier = self.raw.get(name)
            if earlier is not None and isinstance(goes_on, Tensor):
                raw = torch.where(goes_on, earlier + raw, raw)
            elif earlier is not None and goes_on:
                raw = earlier + raw
            self.raw[name] = raw
        self._left[name] = id(param.grad), param.grad._version

    def take_raw(self) -> dict[str, Tensor]:
        """Return the raw gradients by name of the parameters that have one, and forget all."""
        raw, self.raw, self._left, self._earlier = self.raw, {}, {}, []
        return {name: grad for name, grad in raw.items() if self.params[name].grad is not None}

    def watch(self, names: list[str]) -> None:
        """See to it that ``note`` hears of these parameters' gradients."""
        session = weakref.ref(self)

        def after(param: Tensor) -> None:
            alive = session()
            if alive is not None:
                alive.note(param)

        for name in names:
            if name not in self._watched:
                hook = self.params[name].register_post_accumulate_grad_hook(after)
                self._watched[name] = hook
