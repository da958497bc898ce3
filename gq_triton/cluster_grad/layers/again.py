"""The backward pass of a module that runs again for the samples of each cluster.

Shapes: B samples, K clusters.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from gq_triton.cluster_grad.layers.noise import Repeated, random_state, set_random_state
from gq_triton.cluster_grad.layers.rows import accumulation_type
from gq_triton.cluster_grad.layers.run import Run, known_of
from gq_triton.cluster_grad.step import Step
from gq_triton.grouping.groups import Groups
from gq_triton.ring import flat

__all__ = ["Backward"]


class Backward:
    """The backward pass of one run of a module.

    Args:
        run: the run.
        step: the forward pass of the model.
        inputs: the arguments that need a gradient.
        grads: the gradients of the outputs.
    """

    def __init__(
        self, run: Run, step: Step, inputs: list[Tensor], grads: list[Tensor | None]
    ) -> None:
        self.run, self.step, self.inputs = run, step, inputs
        self.grads = grads
        self.params = [run.site.param(position) for position in run.wanted]

    def gradients(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return the gradients of inputs and what is returned for the parameters."""
        run, groups = self.run, self.step.groups
        collector, device = run.site.collector, self.params[0].device
        kept, collector.paused = collector.paused, True
        random = None if run.noise is None else random_state(device)
        try:
            if groups.labels.numel() != run.batch:
                return self._whole()
            found = None
            if run.repeats and known_of(run.site).repeats is not False:
                found = self._sliced(groups)
            if found is None:
                found = self._masked(groups)
        finally:
            collector.paused = kept
            if random is not None:
                set_random_state(device, random)
        inputs, sums = found
        results = []
        for position, param, total in zip(run.wanted, self.params, sums, strict=True):
            if total is None:
                results.append(None)
                continue
            blocks = iter([(0, param.numel(), total)])
            results.append(run.site.give(self.step, position, blocks, total.dtype))
        return inputs, results

    def _graph(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return inputs and outputs with a graph: the one that was kept, or that of a new run."""
        run = self.run
        if run.graph is not None:
            return run.graph
        inputs = [tensor.detach().requires_grad_() for tensor in self.inputs]
        outputs = run.outputs(run.call(inputs, run.values, self._noise_of(None))[0])
        if not self._same(outputs, None):
            raise RuntimeError(
                f"{run.site.name} is used on results of its own, and gives others when it runs "
                'again: use mode="microbatch"'
            )
        return inputs, outputs

    def _noise_of(self, samples: Tensor | None) -> Repeated | None:
        """Return what gives some samples their random numbers again; None stands for all."""
        run = self.run
        if run.noise is None:
            return None
        if samples is None:
            return Repeated(run.noise, run.batch, run.batch, lambda drawn, dim: drawn)
        rows = partial(self._rows, samples=samples)
        return Repeated(run.noise, run.batch, len(samples), rows)

    def _differentiate(
        self, outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor | None], more: bool
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        found = torch.autograd.grad(
            [output for output, _ in pairs], [*inputs, *self.params], [grad for _, grad in pairs],
            retain_graph=more, allow_unused=True,
        )  # fmt: skip
        return list(found[: len(inputs)]), list(found[len(inputs) :])

    def _whole(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return gradients of the whole batch: the samples are not those that were clustered."""
        for param in self.params:
            clustered = self.step.groups.labels.numel()
            reason = f"it saw {self.run.batch} samples, and {clustered} were clustered"
            self.run.site.collector.take_unknown(param, reason)
        inputs, outputs = self._graph()
        return self._differentiate(outputs, inputs, self.grads, more=False)

    def _masked(self, groups: Groups) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return the gradients of the inputs, and the parameters' sums by cluster."""
        inputs, outputs = self._graph()
        totals: list[Tensor | None] = [None for _ in inputs]
        sums: list[Tensor | None] = [None for _ in self.params]
        clusters = [k for k, size in enumerate(groups.sizes) if size]
        for k in clusters:
            grads = [
                None if grad is None else grad * _mask(groups.members[k], grad, dim)
                for grad, dim in zip(self.grads, self.run.out_dims, strict=True)
            ]
            more = k != clusters[-1]
            of_inputs, of_params = self._differentiate(outputs, inputs, grads, more)
            for place, grad in enumerate(of_inputs):
                if grad is not None:
                    known = totals[place]
                    totals[place] = grad if known is None else known + grad
            self._keep(sums, k, of_params, groups)
        return totals, sums

    def _sliced(self, groups: Groups) -> tuple[list[Tensor | None], list[Tensor | None]] | None:
        """Return what ``_masked`` does, from a run for each cluster; None if runs differ.

        The first backward pass shows it for torch's own modules, each one for others.
        """
        run, shown = self.run, known_of(self.run.site)
        # The functions of BatchNorm write to buffers without counting it as a change.
        buffers = [] if shown.repeats else [(b, b.clone()) for b in run.site.module.buffers()]
        totals: list[Tensor | None] = [None for _ in self.inputs]
        sums: list[Tensor | None] = [None for _ in self.params]
        for k, samples in enumerate(groups.order.split(groups.sizes)):
            if not len(samples):
                continue
            if len(samples) == run.batch:
                samples = samples.sort().values  # random numbers of all samples keep their order
            values = [self._rows(v, d, samples) for v, d in zip(run.values, run.dims, strict=True)]
            dims = [run.dims[place] for place in run.places]
            inputs = [
                self._rows(tensor, dim, samples).detach().requires_grad_()
                for tensor, dim in zip(self.inputs, dims, strict=True)
            ]
            outputs = self._repeated(inputs, values, samples)
            if _restored(buffers) or outputs is None or not self._same(outputs, samples):
                shown.repeats = False
                return None
            grads = [
                None if grad is None else self._rows(grad, dim, samples)
                for grad, dim in zip(self.grads, run.out_dims, strict=True)
            ]
            of_inputs, of_params = self._differentiate(outputs, inputs, grads, more=False)
            for place, (grad, dim) in enumerate(zip(of_inputs, dims, strict=True)):
                if grad is None:
                    continue
                if totals[place] is None:
                    totals[place] = torch.zeros_like(self.inputs[place], dtype=grad.dtype)
                total: Any = totals[place]
                if dim is None:
                    total += grad
                else:
                    total.index_copy_(dim, self._places(total.shape[dim], samples), grad)
            self._keep(sums, k, of_params, groups)
        shown.repeats = True
        return totals, sums

    def _repeated(
        self, inputs: list[Tensor], values: list[Any], samples: Tensor
    ) -> list[Tensor] | None:
        """Run the module for some samples; None if it cannot be."""
        try:
            return self.run.outputs(self.run.call(inputs, values, self._noise_of(samples))[0])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return None

    def _same(self, outputs: list[Tensor], samples: Tensor | None) -> bool:
        """Return whether a run for some samples, or all, gives what the first run gave them."""
        if self.run.expected is None:
            return True
        for new, old, dim in zip(outputs, self.run.expected, self.run.out_dims, strict=True):
            old = old if samples is None else self._rows(old, dim, samples)
            if new.shape != old.shape:
                return False
            limit = torch.finfo(old.dtype).eps ** 0.5 * (old.abs().amax() + 1e-30)
            if not bool((new.detach() - old).abs().amax() <= limit):
                return False
        return True

    def _places(self, rows: int, samples: Tensor) -> Tensor:
        """Return the places of some samples' rows, which lie together for each sample."""
        each = rows // self.run.batch
        if each == 1:
            return samples
        within = torch.arange(each, device=samples.device)
        return (samples[:, None] * each + within).flatten()

    def _rows(self, value: Any, dim: int | None, samples: Tensor) -> Any:
        if dim is None or value is None:
            return value
        return value.index_select(dim, self._places(value.shape[dim], samples))

    def _keep(
        self, sums: list[Tensor | None], k: int, grads: list[Tensor | None], groups: Groups
    ) -> None:
        """Write the gradients of a cluster's samples among the sums."""
        for place, (grad, param) in enumerate(zip(grads, self.params, strict=True)):
            if grad is None:
                continue
            total = sums[place]
            if total is None:
                dtype = accumulation_type(grad.dtype)
                total = torch.zeros(
                    groups.n_clusters, param.numel(), dtype=dtype, device=grad.device
                )
                sums[place] = total
            total[k] = flat(grad, like=param)


def _restored(buffers: list[tuple[Tensor, Tensor]]) -> bool:
    """Give buffers their values back; return whether one had others."""
    changed = [(buffer, kept) for buffer, kept in buffers if not torch.equal(buffer, kept)]
    for buffer, kept in changed:
        buffer.data.copy_(kept)
    return bool(changed)


def _mask(members: Tensor, grad: Tensor, dim: int) -> Tensor:
    """Return a factor that keeps the rows of some samples along a dimension."""
    rows = members.repeat_interleave(grad.shape[dim] // len(members))
    return rows.to(grad.dtype).view([-1 if d == dim else 1 for d in range(grad.dim())])
