"""A model as it is now, for gradients that leave it and the process's random numbers alone.

Shapes: N samples, B of them in a batch, P trained parameters, all in one row.
"""

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from gq_triton.sampling.checks import check_data, check_model
from gq_triton.sampling.fetch import Fetch, moved, split_batch
from gq_triton.sampling.gradients import NUMBERS, together, trained
from gq_triton.sampling.scores import Loss, as_module, importance_score, losses_of_samples
from gq_triton.sampling.scores import sample_losses as losses_without_graph
from gq_triton.sampling.watch import device_of, run_model, scorer

__all__ = ["Frozen", "Random", "undisturbed"]

# Samples whose gradients are computed, or scores, at a time.
_ROWS = 512


class Frozen:
    """A copy of a model, with the loss and the dataset of its gradients.

    All gradients are those of trained parameters, flat, in the order of ``named_parameters``.

    Args:
        model: the model, which stays as it is.
        loss: as in ``importance_score``.
        dataset: a map-style dataset of ``(inputs, ..., targets)`` or dicts with ``"labels"``.
        evaluates: whether the copy runs in evaluation mode, else in the modes of the model.

    Raises:
        TypeError: the model is no module, the loss no loss, or the dataset is not map-style.
        ValueError: the dataset is empty, or the model has no trained parameter.
    """

    def __init__(self, model: nn.Module, loss: Loss, dataset: Any, evaluates: bool = True) -> None:
        check_model(model)
        check_data(dataset)
        self.loss: Any = as_module(loss)
        self.dataset, self.samples = dataset, len(dataset)
        if not self.samples:
            raise ValueError("the dataset must have at least one sample, got none")
        # A copy: buffers such as BatchNorm's, grads, modes and hooks stay the model's own.
        self.model = copy.deepcopy(scorer(model))
        self.model.zero_grad(set_to_none=True)
        if evaluates:
            self.model.eval()
        self.params = trained(self.model)
        self.size = sum(param.numel() for param in self.params.values())
        self.device = device_of(self.model)
        self._vectorized = True

    def read(self, indices: Tensor) -> tuple[Any, Any]:
        """Return inputs and targets of some samples, on the model's device."""
        if isinstance(self.dataset, TensorDataset):
            batch = self.dataset[indices.to(self.dataset.tensors[0].device)]
        else:
            batch = Fetch(self.dataset, default_collate)[indices.tolist(), False].batch
        return split_batch(moved(batch, self.device))

    def gradient(self, indices: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return ``sum_i w_i grad l_i`` of some samples, ``(P,)``; by default their mean."""
        return self.gradient_of(*self.read(indices), weights)

    def gradient_of(self, inputs: Any, targets: Any, weights: Tensor | None = None) -> Tensor:
        """Return what ``gradient`` does, of a batch."""
        with torch.enable_grad():
            losses = losses_of_samples(run_model(self.model, inputs), targets, self.loss)
            loss = losses.mean() if weights is None else (losses * weights.to(losses)).sum()
            found = torch.autograd.grad(loss, [*self.params.values()], allow_unused=True)
        pairs = zip(found, self.params.values(), strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    def mean(self, indices: Tensor | None = None) -> Tensor:
        """Return the mean gradient of some samples, or of all, ``(P,)`` in the model's type."""
        indices = torch.arange(self.samples) if indices is None else indices
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        for part in indices.split(_ROWS):
            total += self.gradient(part).double() * len(part)
        return (total / len(indices)).to(next(iter(self.params.values())).dtype)

    def rows(self, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield places ``(B,)`` and every sample's own gradient ``(B, P)`` in float64."""
        for part in indices.split(max(1, min(_ROWS, NUMBERS // self.size))):
            yield part, self._rows(part).double()

    def _rows(self, indices: Tensor) -> Tensor:
        if self._vectorized:
            found = together(self.model, self.params, self.loss, *self.read(indices))
            if found is not None:
                return found
            self._vectorized = False
        return torch.stack([self.gradient(index) for index in indices.split(1)])

    def scores(self, indices: Tensor, score: str) -> Tensor:
        """Return the scores ``(B,)`` of some samples, ``"gradient"``, ``"loss"`` or ``"norm"``."""
        if score == "norm":
            return torch.cat([rows.norm(dim=1) for _, rows in self.rows(indices)])
        function: Callable[..., Tensor] = (
            losses_without_graph if score == "loss" else importance_score
        )
        found = []
        for part in indices.split(_ROWS):
            inputs, targets = self.read(part)
            with torch.no_grad():
                outputs = run_model(self.model, inputs)
            found.append(function(outputs, targets, self.loss))
        scores = torch.cat(found).double()
        if bool((scores < 0).any()):
            raise ValueError(
                f"losses that are scores must be at least 0, got {float(scores.min()):g}"
            )
        return scores


class Random:
    """The state of all random numbers of the process: torch's, Python's and NumPy's."""

    def __init__(self) -> None:
        self._cpu, self._python = torch.get_rng_state(), random.getstate()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._numpy = sys.modules.get("numpy")
        self._of_numpy = None if self._numpy is None else self._numpy.random.get_state()

    def restore(self) -> None:
        """Make the random numbers go on from this state."""
        torch.set_rng_state(self._cpu)
        random.setstate(self._python)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._numpy is not None:
            self._numpy.random.set_state(self._of_numpy)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Give the process its random numbers back as they were."""
    before = Random()
    try:
        yield
    finally:
        before.restore()
