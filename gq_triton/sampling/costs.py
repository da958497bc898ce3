"""What the steps of an epoch cost, counted in samples."""

from dataclasses import dataclass

from gq_triton.sampling.presample import BACKWARD

__all__ = ["EpochCost"]


@dataclass
class EpochCost:
    """What one epoch of an ``ImportanceLoader`` has cost so far, on this process.

    Attributes:
        epoch: the number of the epoch.
        steps: batches.
        steps_by_score: those of them that were drawn by score.
        scored: samples that the model ran on only to be scored.
        trained: samples in the batches.
        price: forward passes that it takes to score a sample: 1, or 3 with ``score="norm"``.
    """

    epoch: int
    steps: int = 0
    steps_by_score: int = 0
    scored: int = 0
    trained: int = 0
    price: float = 1.0

    @property
    def equivalent(self) -> float:
        """The cost in trained samples, where a backward pass takes as long as two forward ones."""
        return self.trained + self.scored * self.price / (1 + BACKWARD)
