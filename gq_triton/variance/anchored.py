"""Gradients with less variance by the gradient of an earlier model: SVRG and SCSG.

Johnson and Zhang (2013); Lei et al., "Non-convex finite-sum optimization via SCSG methods" (2017).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.options import shown
from gq_triton.replayed import refuse_replay
from gq_triton.sampling.checks import count, number, raise_all
from gq_triton.sampling.ranks import stream
from gq_triton.sampling.scores import Loss, losses_of_samples
from gq_triton.sampling.watch import evaluation_mode, run_model, scorer
from gq_triton.saved.rules import Integer, Maybe, Record, check
from gq_triton.saved.tensors import REAL_TYPES, TensorLike
from gq_triton.variance.estimators import uniform
from gq_triton.variance.frozen import Frozen, Random, undisturbed
from gq_triton.variance.statistics import Moments, Running

__all__ = ["SCSG", "SVRG", "AnchoredBatches"]

_COUNTS = "Python counts the steps before the next anchor"


class SVRG:
    r"""Leaves ``g(w) - g(a) + mean`` in ``p.grad``: a batch's gradient, corrected by an anchor.

    The anchor ``a`` is a copy of the model that is made every ``every`` steps, and ``mean`` its
    gradient over the whole dataset. The estimate is unbiased for batches that are drawn uniformly.
    Its variance is that of ``g_i(w) - g_i(a)``: 0 at the anchor, and larger than the plain
    gradient's far from it. A step costs two forward and two backward passes.

    Call ``backward(inputs, targets)`` instead of ``loss.backward()``; any optimizer then takes its
    step. Both gradients are taken in the model's modes, with the same random numbers, so that
    dropout drops the same. With BatchNorm in training mode a sample's gradient depends on its
    batch, and no such correction is exact.

    Args:
        model: the model that is trained.
        loss: as in ``importance_score``; what is minimised is its mean over samples.
        dataset: a map-style dataset of ``(inputs, ..., targets)`` or dicts with ``"labels"``.
        every: steps between anchors.

    Raises:
        TypeError: the model is no module, the loss no loss, or the dataset is not map-style.
        ValueError: an argument is out of its range, the dataset is empty, or the model has no
            trained parameter.

    Examples:
        >>> import torch
        >>> from gq_triton.variance import SVRG
        >>> x = torch.randn(100, 4)
        >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> svrg = SVRG(model, "cross_entropy", data, every=10)
        >>> for inputs, targets in torch.utils.data.DataLoader(data, batch_size=10):
        ...     optimizer.zero_grad()
        ...     loss = svrg.backward(inputs, targets)
        ...     optimizer.step()
    """

    def __init__(self, model: nn.Module, loss: Loss, dataset: Any, every: int) -> None:
        raise_all(count("every", every))
        self._every = every
        self._begin(model, loss, dataset)

    def _begin(self, model: nn.Module, loss: Loss, dataset: Any) -> None:
        self.anchor = Frozen(model, loss, dataset, evaluates=False)
        self.model, self.loss, self.dataset = scorer(model), self.anchor.loss, dataset
        named = self.model.named_parameters()
        self._params = [param for _, param in named if param.requires_grad]
        self.mean: Tensor | None = None
        self.anchors = 0  # how many were made
        self._left = 0  # steps before the next one

    def snapshot(self) -> None:
        """Make the present model the anchor, in one pass over the samples that it is to know.

        Raises:
            ValueError: its gradient is not finite; the anchor stays.
        """
        anchor = Frozen(self.model, self.loss, self.dataset, evaluates=False)
        with undisturbed():
            mean = anchor.mean(self._indices())
        if not bool(mean.isfinite().all()):
            raise ValueError(
                "the gradient of the dataset must be finite, got a NaN or an infinity: look at the "
                "model's outputs and the loss"
            )
        self.anchor, self.mean = anchor, mean
        self._left = self._length()
        self.anchors += 1

    def backward(self, inputs: Any, targets: Any) -> Tensor:
        """Add the estimate of a batch to ``p.grad``, as ``loss.backward()`` adds its gradient.

        A new anchor is made first where one is due.

        Args:
            inputs: what the model takes: a tensor; arguments in a list or tuple; keywords in a
                dict.
            targets: what the loss takes.

        Returns:
            The batch's mean loss, without a graph.
        """
        refuse_replay(_COUNTS, "call the step itself")
        if not self._left:
            self.snapshot()
        self._left -= 1
        before = Random()
        with torch.enable_grad():
            losses = losses_of_samples(run_model(self.model, inputs), targets, self.loss)
            loss = losses.mean()
            loss.backward()
        with undisturbed(), torch.no_grad():
            before.restore()
            assert self.mean is not None
            correction = self.mean - self.anchor.gradient_of(inputs, targets)
            for param, part in zip(self._params, self._parts(correction), strict=True):
                if param.grad is None:
                    param.grad = part.clone()
                else:
                    param.grad += part
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the anchor with its mean gradient, and the steps before the next one."""
        return {
            "anchor": {name: t.clone() for name, t in self.anchor.model.state_dict().items()},
            "mean": None if self.mean is None else self.mean.clone(),
            "anchors": self.anchors,
            "left": self._left,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, with tensors on any device.

        Raises:
            ValueError: the state is of another model, or was altered.
        """
        own = self.anchor.model.state_dict()
        tensors = {
            name: TensorLike(
                tuple(one.shape), REAL_TYPES if one.is_floating_point() else [one.dtype]
            )
            for name, one in own.items()
            if isinstance(one, Tensor)
        }
        rules = {
            "anchor": Record(tensors, unknown="that this model lacks"),
            "mean": Maybe(TensorLike((self.anchor.size,), finite=True)),
            "anchors": Integer(),
            "left": Integer(),
        }
        check(state, Record(rules), f"the saved {type(self).__name__}")
        mean = state["mean"]
        self.anchor.model.load_state_dict(state["anchor"])
        self.mean = None if mean is None else mean.to(self.anchor.device, copy=True)
        self.anchors, self._left = state["anchors"], state["left"]

    def _parts(self, flat: Tensor) -> list[Tensor]:
        sizes = [param.numel() for param in self._params]
        pairs = zip(flat.split(sizes), self._params, strict=True)
        return [part.view_as(param) for part, param in pairs]

    def _indices(self) -> Tensor:
        """Return the samples over which the anchor's gradient is taken."""
        return torch.arange(len(self.dataset))

    def _length(self) -> int:
        """Return the number of steps with a new anchor."""
        return self._every


class SCSG(SVRG):
    """SVRG whose anchor knows a random part of the dataset, for a random number of steps.

    The part has ``anchor_samples * growth^j`` samples for anchor j, at most all of them. The number
    of steps is geometric with the mean ``part / batch_size``, as in the paper; the importance
    sampling paper's code takes a fixed number.

    Args:
        model: as in ``SVRG``.
        loss: as in ``SVRG``.
        dataset: as in ``SVRG``.
        batch_size: size of the batches that ``backward`` gets.
        anchor_samples: samples of the first anchor, at least ``batch_size``.
        growth: at least 1.
        seed: of the parts and of the numbers of steps.

    Raises:
        TypeError: as ``SVRG``.
        ValueError: as ``SVRG``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        dataset: Any,
        batch_size: int,
        anchor_samples: int,
        growth: float = 1.0,
        seed: int = 0,
    ) -> None:
        raise_all(
            count("batch_size", batch_size),
            count("anchor_samples", anchor_samples),
            number("growth", growth, 1),
            count("seed", seed, 0),
        )
        self._begin(model, loss, dataset)
        if not batch_size <= anchor_samples <= len(dataset):
            raise ValueError(
                f"anchor_samples must be from batch_size, {batch_size}, to the number of samples, "
                f"{len(dataset)}, got {anchor_samples}"
            )
        self._batch_size, self._first = batch_size, anchor_samples
        self._growth, self._seed = growth, seed

    def _part(self) -> int:
        # The logarithm: a power of the growth may be beyond what a float holds.
        grown = math.log(self._first) + self.anchors * math.log(self._growth)
        return round(math.exp(min(grown, math.log(len(self.dataset)))))

    def _indices(self) -> Tensor:
        order = torch.randperm(len(self.dataset), generator=stream(self._seed, "p", self.anchors))
        return order[: self._part()]

    def _length(self) -> int:
        generator = stream(self._seed, "steps", self.anchors)
        ends = self._batch_size / self._part()
        point = float(torch.rand((), dtype=torch.float64, generator=generator))
        return 1 if ends >= 1 else 1 + int(math.log1p(-point) / math.log1p(-ends))


@dataclass(frozen=True)
class AnchoredBatches:
    """SVRG's estimate of B samples that are drawn uniformly, for ``measure_variance``.

    Its exact variance is that of ``g_i(w) - g_i(a)`` over B.

    Args:
        svrg: an ``SVRG`` that has an anchor: after its first step, or ``snapshot()``.
        batch_size: B.

    Raises:
        TypeError: ``svrg`` is none.
        ValueError: it has no anchor yet, or ``batch_size`` is not an integer of at least 1.
    """

    svrg: SVRG
    batch_size: int

    def __post_init__(self) -> None:
        raise_all(count("batch_size", self.batch_size))
        if not isinstance(self.svrg, SVRG):
            raise TypeError(f"svrg must be an SVRG, got {shown(self.svrg)}")
        if self.svrg.mean is None:
            raise ValueError("svrg must have an anchor: call its snapshot() first")

    def check(self, frozen: Frozen) -> None:
        """Raise a ValueError if the anchor is of another model."""
        if frozen.size != self.svrg.anchor.size:
            raise ValueError(
                f"svrg must be of this model with {frozen.size} trained parameters, got "
                f"{self.svrg.anchor.size}"
            )

    def estimate(self, frozen: Frozen, generator: torch.Generator) -> Tensor:
        """Return one estimate ``(P,)`` of the gradient."""
        batch = frozen.read(uniform(frozen.samples, self.batch_size, generator))
        anchor = self.svrg.anchor
        with evaluation_mode(anchor.model):  # as the model is measured
            return frozen.gradient_of(*batch) - anchor.gradient_of(*batch) + self._mean

    def moments(self, frozen: Frozen) -> Moments:
        """Return the exact moments, from the gradients of all samples."""
        every, anchor, indices = Running(), self.svrg.anchor, torch.arange(frozen.samples)
        with evaluation_mode(anchor.model):
            pairs = zip(frozen.rows(indices), anchor.rows(indices), strict=True)
            for (_, rows), (_, past) in pairs:
                every.add(rows - past)
        variance, mean = every.moments
        return Moments(variance / self.batch_size, mean + self._mean)

    @property
    def _mean(self) -> Tensor:
        assert self.svrg.mean is not None
        return self.svrg.mean
