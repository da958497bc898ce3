"""The settings that tuning tries: the first points of one Sobol sequence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Settings", "Space", "at_edge", "candidates"]

Settings = dict[str, float]

# The columns of the sequence. One that is added at the end leaves the others as they are.
_COLUMNS = "lr", "rho", "queue_length", "beta1", "warmup"
_CONTINUOUS = "lr", "rho"
# Where the best value is the first or the last tried, a better one may lie beyond.
_OPEN = "lr", "rho", "beta1"


@dataclass(frozen=True)
class Space:
    """The settings that a study tunes over, the same for all arms of a family.

    Args:
        lr: lowest and highest learning rate, tried on a logarithmic scale.
        beta1: the values tried; with SGD of the momentum.
        warmup: the shares of the steps tried.
        rho: lowest and highest rho, tried on a logarithmic scale.
        queue_length: the lengths tried.
    """

    lr: tuple[float, float]
    beta1: tuple[float, ...]
    warmup: tuple[float, ...]
    rho: tuple[float, float]
    queue_length: tuple[int, ...]


def candidates(names: Sequence[str], space: Space, trials: int) -> list[Settings]:
    """Return the settings of every tuning trial.

    All arms draw from one sequence. The arms of a family therefore try the same learning rates,
    with the same beta1 and warm-up, and an arm with more settings gets no more trials.

    Args:
        names: the settings that are tuned: ``lr``, ``beta1``, ``warmup``, ``rho``,
            ``queue_length``.
        space: the values that are tried.
        trials: number of trials.
    """
    # Points in the middle of their cells: 2^k trials try 2^k evenly spread learning rates. A
    # scrambled sequence leaves gaps, in which the best learning rate of one arm may lie.
    engine = torch.quasirandom.SobolEngine(len(_COLUMNS))
    points = (engine.draw(trials, dtype=torch.float64) + 0.5 / trials).remainder(1).tolist()
    return [
        {name: _at(name, point[_COLUMNS.index(name)], space) for name in names} for point in points
    ]


def _at(name: str, share: float, space: Space) -> float:
    if name not in _CONTINUOUS:
        values = getattr(space, name)
        return values[min(int(share * len(values)), len(values) - 1)]
    low, high = space.lr if name == "lr" else space.rho
    value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return float(f"{value:.4g}")


def at_edge(best: Mapping[str, float], tried: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the settings of the best trial beyond which no trial went, as ``"lr low"``.

    A better value may lie beyond them. The queue's length has no edge, since its values are those
    of the paper or the question of the study, and neither has the warm-up.
    """
    found = []
    for name in best:
        values = [settings[name] for settings in tried]
        if name not in _OPEN or min(values) == max(values):
            continue
        if best[name] == min(values):
            found.append(f"{name} low")
        elif best[name] == max(values):
            found.append(f"{name} high")
    return found
