"""Batches with one sample of each cluster in turn, and weights that make their gradient unbiased.

Faghri et al., "A Study of Gradient Variance in Deep Learning" (2020), section 3. Shapes: N samples
in M clusters that are not empty, B samples per batch, W processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from gq_triton.options import shown
from gq_triton.sampling.checks import count, raise_all, used
from gq_triton.sampling.ranks import place
from gq_triton.sampling.tape import Tape
from gq_triton.saved.rules import Exactly, Flag, Integer, Record, check

__all__ = ["StratifiedBatchSampler"]


class StratifiedBatchSampler(Sampler[list[int]]):
    r"""A batch sampler that goes through the clusters in turn.

    The clusters come in a random order, one sample of each, then in another order, across the ends
    of batches. Within a cluster every sample comes once before one comes again. A sample of a
    cluster with ``N_k`` members counts ``M N_k / N`` in the loss (``weights``): the gradient of the
    weighted losses' mean is then unbiased for any batch size, and for ``B = M`` it is the paper's
    estimator (equation 1), whose variance is ``sum_k N_k^2 V_k / N^2`` (proposition 3.1) with
    ``V_k`` the variance within a cluster. A batch comes in the order of its clusters, so a part of
    it is no random part: shuffle batches that you cut for a model with batch norm.

    *Several processes.* W ranks with batches of B draw what one process with batches of ``W * B``
    would: disjoint parts of one sequence. Give every rank a generator with the same seed.

    Args:
        labels: the cluster of every sample, ``(N,)`` integers, at least 0. A number that no sample
            has is no cluster.
        batch_size: B, at least 1; ``W * B`` may not exceed N.
        generator: where the seed comes from, which is drawn once, here; None is the same as
            ``torch.Generator().manual_seed(0)``.
        num_replicas: W; None asks ``torch.distributed``.
        rank: this process; None asks ``torch.distributed``.

    Raises:
        ValueError: the labels are not ``(N,)`` integers of at least 0, or an argument is out of its
            range.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import mse_loss
        >>> x = torch.randn(100, 3)
        >>> labels = (x[:, 0] > 1).long()
        >>> sampler = StratifiedBatchSampler(labels, 10, torch.Generator().manual_seed(0))
        >>> data = torch.utils.data.TensorDataset(torch.arange(100), x)
        >>> model = torch.nn.Linear(3, 1)
        >>> for indices, x in torch.utils.data.DataLoader(data, batch_sampler=sampler):
        ...     losses = mse_loss(model(x)[:, 0], x[:, 0], reduction="none")
        ...     (sampler.weights(indices) * losses).mean().backward()
        >>> labels[indices].bincount().tolist()  # 5 of each cluster, whatever their sizes
        [5, 5]
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        batch_size: int,
        generator: torch.Generator | None = None,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        found = checked_labels(labels)
        self.num_replicas, self.rank = place(num_replicas, rank)
        raise_all(count("batch_size", batch_size))
        self._samples, self.batch_size = len(found), batch_size
        if batch_size * self.num_replicas > self._samples:
            raise ValueError(
                f"the labels must be of at least the {batch_size * self.num_replicas} samples of a "
                f"batch of all ranks, got {self._samples}"
            )
        _, self._cluster, sizes = found.unique(return_inverse=True, return_counts=True)
        # Of every cluster; in float64, as N may be large.
        self._weight = len(sizes) * sizes.double() / self._samples
        generator = generator or torch.Generator().manual_seed(0)
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        self._tape = Tape(self._cluster, sizes, seed)
        # Batches before this epoch, and of it; whether it has begun, and whether a loop goes on.
        self._before, self._given, self._begun, self._resumes = 0, 0, False, False

    @property
    def n_clusters(self) -> int:
        """M, the number of clusters that are not empty."""
        return len(self._weight)

    def __len__(self) -> int:
        """Return the number of batches in an epoch, ``ceil(N / (W B))``; all of them are full."""
        return -(-self._samples // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of every batch of an epoch, or of what a loaded state left of one."""
        if not self._resumes:
            self._before, self._given = self._before + self._given, 0
        self._begun, self._resumes = True, False
        size = self.batch_size
        while self._given < len(self):
            first = ((self._before + self._given) * self.num_replicas + self.rank) * size
            batch = self._tape.read(first, first + size)
            self._given += 1
            # The loss is a sum over the batch, in any order; layers that add up by cluster need not
            # sort one that comes sorted.
            yield batch[self._cluster[batch].argsort(stable=True)].tolist()
        self._begun = False

    def weights(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the factors of some samples' losses, ``M N_k / N``.

        Args:
            indices: places of samples ``(b,)``, integers from 0 to N - 1, on any device.

        Returns:
            ``(b,)`` in torch's default type, on the device of the indices.

        Raises:
            ValueError: an index is not one of a sample.
        """
        places = torch.as_tensor(indices)
        wanted = places.to("cpu", torch.int64)
        if places.is_floating_point() and places.numel():
            raise ValueError(f"indices must be integers, got {places.dtype}")
        if wanted.numel() and (int(wanted.min()) < 0 or int(wanted.max()) >= self._samples):
            raise ValueError(
                f"indices must be from 0 to {self._samples - 1}, got {int(wanted.min())} to "
                f"{int(wanted.max())}"
            )
        return self._weight[self._cluster[wanted]].to(places.device, torch.get_default_dtype())

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Return the place in the sequence, the same on every rank.

        Args:
            batches: how many batches of this epoch were used, for a ``DataLoader`` with worker
                processes, which has asked for more of them; None takes all that were asked for.

        Raises:
            ValueError: ``batches`` is not from 0 to the number of batches that were asked for.
        """
        return {
            **self._fixed(),
            "seed": self._tape.seed,
            "before": self._before,
            "given": used(batches, self._given),
            "begun": self._begun or batches is not None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; the next loop continues there, with the saved seed.

        Raises:
            ValueError: the state is of other labels, another batch size or number of ranks, or was
                altered. Nothing is changed.
        """
        rules = {name: Exactly(value) for name, value in self._fixed().items()} | {
            "seed": Integer(0, 2**62),
            "before": Integer(0, 2**40),
            "given": Integer(0, len(self)),
            "begun": Flag(),
        }
        check(state, Record(rules), "the saved StratifiedBatchSampler")
        self._before, self._given = state["before"], state["given"]
        self._begun = self._resumes = state["begun"]
        self._tape.rewind(state["seed"])

    def _fixed(self) -> dict[str, int]:
        """Return what must be the same in a run that continues this one."""
        return {
            "samples": self._samples,
            "clusters": self.n_clusters,
            "batch_size": self.batch_size,
            "num_replicas": self.num_replicas,
        }


def checked_labels(labels: Any) -> Tensor:
    """Return labels as ``(N,)`` int64 on the CPU, or raise a ValueError in one sentence."""
    try:
        found = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0, 0)
    whole = not (found.dtype.is_floating_point or found.dtype.is_complex)
    if found.dim() != 1 or len(found) == 0 or not whole:
        got = found if isinstance(labels, Tensor) else labels
        raise ValueError(f"labels must be integers (N,) of at least one sample, got {shown(got)}")
    if int(found.min()) < 0:
        raise ValueError(
            f"labels must be at least 0, got {int(found.min())}: a sample without a cluster needs "
            "one of its own"
        )
    return found.to(torch.int64)
