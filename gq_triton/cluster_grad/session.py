"""From the clusters' gradient sums to ``p.grad``: uses, weighting, and the raw mean beside it."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.passes import in_backward
from gq_triton.cluster_grad.site import Block, new_number
from gq_triton.cluster_grad.step import Partial, Step
from gq_triton.grouping.groups import Groups
from gq_triton.law import match_norm_
from gq_triton.queues import Queues
from gq_triton.ring import flat

__all__ = ["Session"]


class _Fresh(NamedTuple):
    """A raw gradient on its way to ``p.grad``, in the backward pass that runs.

    Attributes:
        raw: the raw mean.
        steps: the forward passes that it goes back to.
        goes_on: whether ``p.grad`` still holds what earlier backward passes added to it.
    """

    raw: Tensor
    steps: list[Step]
    goes_on: bool | Tensor


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
        self.backend = queues.options.backend
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
        # What the samples counted in each forward pass that a raw gradient goes back to, and the
        # number of its backward pass.
        self._masses: dict[str, list[tuple[int, Tensor]]] = {}
        # The backward passes that the taken gradients go back to; whoever takes them empties it.
        self.passes: set[int] = set()
        # Of the backward pass that runs: its raw gradients, its forward passes and its number.
        self._fresh: dict[str, _Fresh] = {}
        self._steps: list[Step] = []
        self._running = False
        self._number = 0

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
            self._number += 1
            engine = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
            engine.queue_callback(self._end_pass)

    def _end_pass(self) -> None:
        """Forget what no later pass may see: uses that did not come, gradients not accumulated."""
        for step in self._steps:
            step.finishing = False
            step.partial.clear()
        self._steps, self._fresh, self._running = [], {}, False

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
            match_norm_([weighted], statistics)
        self.statistics[name] = statistics
        return weighted

    def _keep(self, step: Step, name: str, raw: Tensor) -> None:
        """Keep a raw mean gradient until ``p.grad`` has taken the weighted one."""
        raw = raw if step.groups.unit == 1 else raw / step.groups.unit
        fresh = self._fresh.get(name)
        if fresh is None:
            self._fresh[name] = _Fresh(raw, [step], self._goes_on(name))
            return
        steps = fresh.steps if step in fresh.steps else [*fresh.steps, step]
        self._fresh[name] = fresh._replace(raw=fresh.raw + raw, steps=steps)

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
        fresh = self._fresh.pop(name, None)
        if fresh is not None:
            raw, masses = fresh.raw, [(self._number, step.groups.mass) for step in fresh.steps]
            earlier = self.raw.get(name)
            if earlier is not None and isinstance(fresh.goes_on, Tensor):
                raw = torch.where(fresh.goes_on, earlier + raw, raw)
            elif earlier is not None and fresh.goes_on:
                raw = earlier + raw
            if earlier is not None and bool(fresh.goes_on):
                masses = self._masses[name] + masses
            self.raw[name], self._masses[name] = raw, masses
        self._left[name] = id(param.grad), param.grad._version

    def take_raw(self) -> dict[str, Tensor]:
        """Return the raw gradients by name of the parameters that have one, and forget all."""
        raw, self.raw, self._left, self._masses = self.raw, {}, {}, {}
        return {name: grad for name, grad in raw.items() if self.params[name].grad is not None}

    def take(self, name: str) -> Tensor | None:
        """Return the raw gradient of a parameter and forget it; None where it has none."""
        raw, masses = self.raw.pop(name, None), self._masses.pop(name, [])
        if self.params[name].grad is None:
            return None  # a gradient that the user has dropped
        self.passes.update(number for number, _ in masses)
        return raw

    def masses(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Return what this process's samples count in the gradients of parameters, ``(N, 2)``.

        It is the mean of ``Groups.mass`` over the forward passes that the gradient goes back to: a
        gradient of several micro-batches counts no more than one of a single micro-batch. Where no
        sample reached a parameter, as many count as in the first forward pass that the running
        backward pass goes through; outside of a backward pass none.

        Args:
            names: the parameters' names.
            device: where the result is wanted.
        """
        unreached: list[Tensor] = []
        means: dict[tuple[int, ...], Tensor] = {}
        rows = []
        for name in names:
            reached = self._masses.get(name) if self.params[name].grad is not None else None
            if reached is None:
                unreached = masses = unreached or [self._unreached(device)]
            else:
                masses = [mass for _, mass in reached]
            # Most parameters go back to the same passes: few launches.
            key = tuple(map(id, masses))
            if key not in means:
                means[key] = torch.stack(masses).mean(dim=0).to(device)
            rows.append(means[key])
        return torch.stack(rows)

    def _unreached(self, device: torch.device) -> Tensor:
        """Return what this process's samples count for a parameter that none of them reached."""
        if not in_backward():
            return torch.zeros(2, dtype=torch.float64, device=device)
        step = self._steps[0] if self._steps else self.step
        if step is None or (step.known_groups is None and step.features is None):
            # Nobody knows how many samples there are.
            return torch.ones(2, dtype=torch.float64, device=device)
        return step.groups.mass

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
