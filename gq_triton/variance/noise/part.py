"""A process's part of a measurement, and what all parts together say.

Shapes: N parameters, W ranks. A rank r has n_r samples, and g_r is its mean gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Part"]


@dataclass(frozen=True)
class Part:
    """The figures of one process.

    Attributes:
        samples: n_r.
        degrees: degrees of freedom of ``spread``.
        figures: ``(N, 4)`` float64: spread, square, between and within of every parameter; NaN
            where it is not known by group.
        crossed: whether between and within are known.
    """

    samples: int
    degrees: int
    figures: Tensor
    crossed: bool

    def alone(self) -> tuple[int, Tensor]:
        """Return B and ``(N, 4)``: ``tr S``, ``|G|**2``, between and within."""
        spread, square, between, within = self.figures.unbind(dim=1)
        variance = _divided(spread, self.degrees)
        columns = [variance, square - variance / self.samples, between, within]
        return self.samples, torch.stack(columns, dim=1)

    def with_ranks(
        self,
        add_up: Callable[[Tensor], object],
        squares: Tensor | None,
        *,
        divided: bool = False,
    ) -> tuple[int, Tensor]:
        """Return what ``alone`` does, of all ranks, which must call together.

        With ``v = tr S``: the spreads within the ranks are ``sum_r degrees_r v`` on average,
        ``sum_r n_r |g_r|**2`` is ``B |G|**2 + W v``, and the square of the mean over ranks is
        ``|G|**2 + h v`` with ``h = sum_r 1 / (n_r W**2)``.

        Args:
            add_up: adds a tensor up over the ranks, in place.
            squares: the squared norm of the mean of the ranks' gradients ``(N,)``; None where that
                is not known. If it is not on some rank, the ranks are no groups of one batch, and
                the figures noisier.
            divided: whether ``squares`` are this rank's part, to be added up, too.
        """
        spread, square = self.figures[:, 0], self.figures[:, 1]
        known = float(squares is not None)
        head = square.new_tensor([self.samples, 1 / self.samples, self.degrees, 1.0, known])
        message = [head, spread, square * self.samples]
        if self.crossed:
            message += [self.figures[:, 2], self.figures[:, 3]]
        if divided:
            message.append(torch.zeros_like(square) if squares is None else squares)
        sent = torch.cat(message)
        add_up(sent)
        total, inverse, degrees, world, known = sent[:5].tolist()
        sums = sent[5:].view(-1, len(spread))
        squares = sums[-1] if divided else squares
        if squares is None or known < world:
            variance = _divided(sums[0], degrees)
            signal = (sums[1] - world * variance) / total
        else:
            share = inverse / world**2
            apart = sums[1] - total * squares
            variance = _divided(sums[0] + apart, degrees + world - total * share)
            signal = squares - share * variance
        none = torch.full_like(variance, torch.nan)
        between, within = (sums[2], sums[3]) if self.crossed else (none, none)
        return round(total), torch.stack([variance, signal, between, within], dim=1)


def _divided(spread: Tensor, degrees: float) -> Tensor:
    """Return a mean square; NaN without a degree of freedom."""
    return spread / degrees if degrees > 1e-9 else torch.full_like(spread, torch.nan)
