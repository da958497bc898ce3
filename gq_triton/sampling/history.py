"""Batches drawn by the score that each sample had when it was seen last, without a scoring pass.

Shapes: N samples, n of them in this process's part, b samples per batch, W processes.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from gq_triton.options import shown
from gq_triton.sampling.checks import count, number, raise_all, used
from gq_triton.sampling.presample import draw
from gq_triton.sampling.ranks import place, stream
from gq_triton.sampling.scores import check_scores
from gq_triton.saved.rules import Exactly, Flag, Integer, Record, check

__all__ = ["HistoryBatchSampler"]

# Samples whose scores are added up together: a draw looks at all blocks, then into those it met.
BLOCK = 128


class HistoryBatchSampler(Sampler[list[int]]):
    r"""A batch sampler that draws hard samples more often, by scores that training itself gives.

    The first epoch is a random order of all samples. From then on a batch is drawn with
    replacement: sample i with the probability ``p_i = (1 - u) s_i / sum(s) + u / N``, where ``s_i``
    is the last score that ``update`` was told of it (the mean of all others if none was), and u is
    ``uniform``. Its loss counts ``1 / (N p_i)`` (``weights``), at most ``1 / u``, so the batch's
    gradient stays unbiased whatever the scores are. Nothing is scored apart from training; but
    scores are as old as a sample's last draw. ``ImportanceLoader`` scores afresh.

    *Several processes.* Every rank draws from its own part of the samples, the same in all epochs,
    and is told its own scores.

    Args:
        samples: N.
        batch_size: b, at least 1; ``W * b`` may not exceed N.
        generator: where the seed comes from, which is drawn once, here; None is the same as
            ``torch.Generator().manual_seed(0)``. Give every rank one with the same seed.
        uniform: u, above 0.
        num_replicas: W; None asks ``torch.distributed``.
        rank: this process; None asks ``torch.distributed``.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> x, y = torch.randn(200, 4), torch.randint(2, (200,))
        >>> model, places = torch.nn.Linear(4, 2), torch.arange(200)
        >>> data = torch.utils.data.TensorDataset(places, x, y)
        >>> sampler = HistoryBatchSampler(200, 20)
        >>> for epoch in range(2):
        ...     for indices, inputs, targets in torch.utils.data.DataLoader(
        ...         data, batch_sampler=sampler
        ...     ):
        ...         losses = cross_entropy(model(inputs), targets, reduction="none")
        ...         (sampler.weights(indices) * losses).mean().backward()
        ...         sampler.update(indices, losses)
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        generator: torch.Generator | None = None,
        *,
        uniform: float = 0.2,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        self.num_replicas, self.rank = place(num_replicas, rank)
        raise_all(
            count("samples", samples),
            count("batch_size", batch_size),
            number("uniform", uniform, 1e-6, 1),
        )
        if batch_size * self.num_replicas > samples:
            raise ValueError(
                f"samples must be at least the {batch_size * self.num_replicas} of a batch of all "
                f"ranks, got {samples}"
            )
        self._samples, self.batch_size, self.uniform = samples, batch_size, uniform
        generator = generator or torch.Generator().manual_seed(0)
        self._seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        own = len(range(self.rank, samples, self.num_replicas))
        # -1: no score yet. Whole blocks, the last one filled up with zeros.
        self._scores = torch.zeros(-(-own // BLOCK) * BLOCK, dtype=torch.float64)
        self._scores[:own] = -1.0
        self._own, self._sums = own, torch.zeros(len(self._scores) // BLOCK, dtype=torch.float64)
        self._epoch, self._given, self._begun, self._resumes = 0, 0, False, False
        # Batches that were drawn and have not asked for their weights yet.
        self._drawn: deque[tuple[list[int], Tensor]] = deque()

    def __len__(self) -> int:
        """Return the number of batches in an epoch, ``ceil(N / (W b))``; all of them are full."""
        return -(-self._samples // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of every batch of an epoch, or of what a loaded state left of one."""
        if not self._resumes:
            self._epoch += self._begun  # a loop was left before its end
            self._given = 0
        self._begun, self._resumes = True, False
        self._drawn.clear()
        if self._epoch:
            self._settle()
        while self._given < len(self):
            places, chances = self._batch(self._given)
            self._given += 1
            batch = (places * self.num_replicas + self.rank).tolist()
            # A rank's part may be larger than another's: its samples then count more.
            correction = self._own * self.num_replicas / self._samples
            self._drawn.append((batch, correction / (self._own * chances)))
            yield batch
        self._epoch, self._given, self._begun = self._epoch + 1, 0, False

    def weights(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the factors of a batch's losses, which belong to the moment of its draw.

        Args:
            indices: the batch as it was yielded, in its order; batches in theirs. On any device.

        Returns:
            ``(b,)`` in torch's default type, on the device of the indices.

        Raises:
            ValueError: they are no batch whose weights have not been asked for yet.
        """
        places = torch.as_tensor(indices)
        wanted = places.tolist()
        for number_, (batch, weights) in enumerate(self._drawn):
            if batch == wanted:
                for _ in range(number_ + 1):  # batches before it were left out
                    self._drawn.popleft()
                return weights.to(places.device, torch.get_default_dtype())
        raise ValueError(
            "indices must be those of a batch that this sampler has drawn, in their order, asked "
            f"for once, got {shown(indices)}"
        )

    def update(self, indices: Tensor | Sequence[int], scores: Tensor) -> None:
        """Take new scores of some samples, such as their losses.

        Args:
            indices: places of samples of this process's part, ``(m,)``.
            scores: ``(m,)``, finite, at least 0.

        Raises:
            ValueError: an index is not one of a sample of this process, or a score cannot be drawn
                by. Nothing is changed.
        """
        places = torch.as_tensor(indices).to("cpu", torch.int64)
        found = check_scores(scores).detach().to("cpu", torch.float64)
        own = (places - self.rank) % self.num_replicas == 0
        if places.shape != found.shape or not bool(
            (own & (places >= 0) & (places < self._samples)).all()
        ):
            raise ValueError(
                f"indices must be from 0 to {self._samples - 1}, of this process's samples, one "
                f"for each of the {len(found)} scores, got {shown(indices)}"
            )
        places = (places - self.rank) // self.num_replicas
        self._scores[places] = found
        self._add_up(places)

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Return the scores and the place in the epoch, of this process.

        Args:
            batches: how many batches of this epoch were used, for a ``DataLoader`` with worker
                processes, which has asked for more of them; None takes all that were asked for.

        Raises:
            ValueError: ``batches`` is not from 0 to the number of batches that were asked for.
        """
        return {
            **self._fixed(),
            "seed": self._seed,
            "epoch": self._epoch,
            "given": used(batches, self._given),
            "begun": self._begun or batches is not None,
            "scores": self._scores[: self._own].clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; the next loop continues there, with the saved seed.

        Raises:
            ValueError: the state is of other samples, another batch size or another process, or was
                altered. Nothing is changed.
        """
        rules = {name: Exactly(value) for name, value in self._fixed().items()} | {
            "seed": Integer(0, 2**62),
            "epoch": Integer(0, 2**40),
            "given": Integer(0, len(self)),
            "begun": Flag(),
        }
        check(state, Record(rules), "the saved HistoryBatchSampler")
        scores = state.get("scores")
        like = self._scores[: self._own]
        if (
            not isinstance(scores, Tensor)
            or (scores.shape, scores.dtype) != (like.shape, like.dtype)
            or not bool((((scores >= 0) & scores.isfinite()) | (scores == -1)).all())
        ):
            raise ValueError(
                "the saved HistoryBatchSampler's scores must be a float64 tensor of "
                f"{self._own} scores >= 0, or -1 where there is none, got {shown(scores)}"
            )
        like.copy_(scores)
        self._add_up(torch.arange(self._own))
        self._seed, self._epoch, self._given = state["seed"], state["epoch"], state["given"]
        self._begun = self._resumes = state["begun"]
        self._drawn.clear()

    # --- draws

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return places ``(b,)`` in this process's part, and the chances with which they came."""
        first = step * self.batch_size
        if not self._epoch:
            order = torch.randperm(self._own, generator=stream(self._seed, self.rank))
            # The last batch is filled up from the beginning.
            chosen = torch.arange(first, first + self.batch_size) % self._own
            return order[chosen], torch.full((self.batch_size,), 1 / self._own)
        generator = stream(self._seed, self.rank, self._epoch, step)
        drawn = torch.rand(self.batch_size, generator=generator) < self.uniform
        places = torch.randint(self._own, (self.batch_size,), generator=generator)
        total = float(self._sums.sum())
        if total == 0:
            return places, torch.full((self.batch_size,), 1 / self._own)
        blocks = draw(self._sums, self.batch_size, generator)
        ends = self._scores.view(-1, BLOCK)[blocks].cumsum(1)
        points = torch.rand(self.batch_size, 1, dtype=ends.dtype, generator=generator)
        # Below the sum, so that no sample without a score is met.
        points = points * ends[:, -1:] * (1 - 2**-50)
        within = torch.searchsorted(ends, points, right=True)[:, 0]
        places = torch.where(drawn, places, blocks * BLOCK + within)
        share = self._scores[places] / total
        return places, (1 - self.uniform) * share + self.uniform / self._own

    def _settle(self) -> None:
        """Give samples without a score the mean of the others, or 1 where there is none."""
        own = self._scores[: self._own]
        unknown = own < 0
        if bool(unknown.any()):
            known = own[~unknown]
            own[unknown] = float(known.mean()) if len(known) else 1.0
        self._add_up(torch.arange(self._own))

    def _add_up(self, places: Tensor) -> None:
        """Bring the sums of the blocks of some places up to date."""
        blocks = (places // BLOCK).unique()
        self._sums[blocks] = self._scores.view(-1, BLOCK)[blocks].clamp(min=0).sum(1)

    def _fixed(self) -> dict[str, Any]:
        """Return what must be the same in a run that continues this one."""
        return {
            "samples": self._samples,
            "batch_size": self.batch_size,
            "num_replicas": self.num_replicas,
            "rank": self.rank,
            "uniform": self.uniform,
        }
