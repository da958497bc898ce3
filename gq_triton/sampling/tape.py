"""The endless sequence of samples from which stratified batches are cut.

Shapes: N samples, M clusters, R rounds per block, S short clusters, E entries.
"""

import itertools

import torch
from torch import Tensor

from gq_triton.sampling.ranks import stream

__all__ = ["Tape"]

# Entries of the sequence that are made at a time: enough that one costs less than a microsecond.
BLOCK = 4096


class Tape:
    """A sequence of rounds; each holds one sample of every cluster, in a random order.

    Round n takes member ``n % N_k`` of cluster k, whose members are shuffled anew whenever that is
    0: a pass begins. Every random number depends on the seed and the number of its round or block
    alone, so a place in the sequence is one number.

    Args:
        cluster: the cluster of every sample ``(N,)``, from 0 to M - 1.
        sizes: the samples of every cluster ``(M,)``, at least 1.
        seed: the seed.
    """

    def __init__(self, cluster: Tensor, sizes: Tensor, seed: int) -> None:
        self._starts = sizes.cumsum(0) - sizes
        self._members = cluster.argsort(stable=True)  # by cluster, in the order of the samples
        self._sizes, self._rounds = sizes, max(1, BLOCK // len(sizes))
        # The passes of a short cluster are made with their block, several at a time. A long cluster
        # begins at most one pass in a block, and is shuffled in the round where that begins.
        short = sizes <= self._rounds
        self._short, self._long = short.nonzero().flatten(), (~short).nonzero().flatten()
        self.rewind(seed)

    def rewind(self, seed: int) -> None:
        """Take another seed."""
        self.seed = seed
        self._shuffled = self._members.clone()
        self._number, self._block = -1, torch.empty(0, dtype=torch.int64)

    def read(self, first: int, end: int) -> Tensor:
        """Return the samples at places ``first`` to ``end - 1`` of the sequence."""
        length = self._rounds * len(self._sizes)
        found: list[Tensor] = []
        while first < end:
            number, begin = divmod(first, length)
            found.append(self._of(number)[begin : begin + end - first])
            first += len(found[-1])
        return torch.cat(found)

    def _of(self, number: int) -> Tensor:
        """Return a block, ``(R * M,)``."""
        if number == self._number:
            return self._block
        if number != self._number + 1:
            self._catch_up(number)
        self._number, self._block = number, self._made(number)
        return self._block

    def _made(self, number: int) -> Tensor:
        first, clusters = number * self._rounds, len(self._sizes)
        rounds = torch.arange(first, first + self._rounds)
        found = torch.empty(self._rounds, clusters, dtype=torch.int64)
        if len(self._long):
            found[:, self._long] = self._long_part(rounds)
        if len(self._short):
            found[:, self._short] = self._short_part(number, rounds)
        generator = stream(self.seed, "order", number)
        if self._rounds == 1:
            return found[0, torch.randperm(clusters, generator=generator)]
        keys = torch.rand(self._rounds, clusters, dtype=torch.float64, generator=generator)
        return found.gather(1, keys.argsort(1)).flatten()

    # --- long clusters

    def _long_part(self, rounds: Tensor) -> Tensor:
        """Return the samples of the long clusters in some rounds, ``(R, M - S)``."""
        places = rounds[:, None] % self._sizes[self._long]
        found = places + self._starts[self._long]
        begins = (places == 0).any(1).nonzero().flatten().tolist()
        cuts = sorted({0, *begins, len(rounds)})
        for begin, end in itertools.pairwise(cuts):
            self._shuffle(int(rounds[begin]))
            found[begin:end] = self._shuffled[found[begin:end]]
        return found

    def _shuffle(self, number: int) -> None:
        """Shuffle the members of the long clusters that begin a pass in a round."""
        due = self._long[number % self._sizes[self._long] == 0]
        if not len(due):
            return
        generator = stream(self.seed, "members", number)
        if len(due) == 1:
            start, size = int(self._starts[due]), int(self._sizes[due])
            members = self._members[start : start + size]
            order = torch.randperm(size, generator=generator)
            self._shuffled[start : start + size] = members[order]
            return
        owner, local = _ragged(self._sizes[due])
        places = self._starts[due][owner] + local
        self._shuffled[places] = self._members[places[_order(owner, generator)]]

    # --- short clusters

    def _short_part(self, number: int, rounds: Tensor) -> Tensor:
        """Return the samples of the short clusters in a block's rounds, ``(R, S)``."""
        sizes, starts = self._sizes[self._short], self._starts[self._short]
        found = self._shuffled[starts + rounds[:, None] % sizes]  # of passes that began before
        begins, entries, tape = self._passes(number)
        places = rounds[:, None] - begins + (entries.cumsum(0) - entries)
        return torch.where(rounds[:, None] < begins, found, tape[places.clamp_(0, len(tape) - 1)])

    def _passes(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make the passes of the short clusters that begin in a block, and keep the last of each.

        Returns:
            The round in which the first of them begins ``(S,)``; how many entries they have
            ``(S,)``; and the samples, one cluster and pass after the other, ``(E,)``.
        """
        first, sizes = number * self._rounds, self._sizes[self._short]
        begins = (first + sizes - 1) // sizes * sizes
        passes = (first + self._rounds - 1 - begins) // sizes + 1
        entries = passes * sizes
        owner, local = _ragged(entries)
        turn, place = local // sizes[owner], local % sizes[owner]
        one = (passes.cumsum(0) - passes)[owner] + turn  # the number of an entry's pass
        order = _order(one, stream(self.seed, "passes", number))
        starts = self._starts[self._short][owner]
        tape = self._members[starts + place[order]]
        last = turn == passes[owner] - 1
        self._shuffled[(starts + place)[last]] = tape[last]
        return begins, entries, tape

    def _catch_up(self, number: int) -> None:
        """Bring the members to the order that they have before a block."""
        self._shuffled = self._members.clone()
        if number and len(self._short):
            self._passes(number - 1)
        before = number * self._rounds
        if before and len(self._long):
            last = (before - 1) // self._sizes[self._long] * self._sizes[self._long]
            for begin in last.unique().tolist():  # later ones come later
                self._shuffle(begin)


def _ragged(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the owner of each of ``sum(lengths)`` entries, and its place among the owner's."""
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    return owner, torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]


def _order(owner: Tensor, generator: torch.Generator) -> Tensor:
    """Return an order of entries ``(E,)`` that is random within each owner's."""
    keys = torch.rand(len(owner), dtype=torch.float64, generator=generator)
    return keys.add_(owner).argsort()
