"""The operations of the law: gradients and cluster means are weighted, and gradients queued.

A ring is ``(L, P)`` of a floating type, or ``(L + 1, P)`` in bytes; see ``gq_triton.float8``.

Shape legend: L = queue slots, P = elements of one parameter, N = parameters of a call,
K = clusters, C = parts of the work.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gq_triton.law import Law

__all__ = ["LawOperations"]


class LawOperations(Protocol):
    """What an engine does with gradients, rings and parameters."""

    def all_finite(self, grads: Sequence[Tensor]) -> Tensor:
        """Return for each gradient whether all of its elements are finite.

        Args:
            grads: N gradients ``(P,)``.

        Returns:
            ``(N,)`` bool on their device; an empty gradient is finite.
        """
        ...

    def weigh_(
        self,
        grads: Sequence[Tensor],
        queues: Sequence[Tensor],
        queued: Sequence[Tensor],
        accepted: Tensor | None,
        law: Law,
    ) -> Tensor:
        """Weight gradients in place and queue the raw ones: equations 1 and 2 of Grad Queue.

        Args:
            grads: N gradients ``(P,)``; replaced by ``w * g``, which still carries the loss scale.
            queues: N rings ``(L, P)``; the oldest row is replaced by the raw, unscaled gradient.
            queued: N counters, 0-d int64: gradients queued so far, increased by ``accepted``. Below
                L every weight is 1.
            accepted: ``(N,)`` bool; where False the gradient passes untouched and is not queued.
                None accepts all.
            law: ``found_inf`` is not read: ``accepted`` is False where a step is skipped.

        Returns:
            ``(N, 5)``, float32 or float64: sums of g^2 and (w g)^2, both unscaled, and of w; the
            number of weights that are rho, and of those that are 1/rho. Both numbers are 0 where
            rho = 1 or the law does not act.
        """
        ...

    def push_(
        self,
        grads: Sequence[Tensor],
        queues: Sequence[Tensor],
        queued: Sequence[Tensor],
        accepted: Tensor | None,
        *,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Queue gradients that were weighted elsewhere: one slot is written, no other is read.

        Args:
            grads: N gradients ``(P,)``, with the loss scale if there is one; read only.
            queues: N rings ``(L, P)``; the oldest row is replaced by the unscaled gradient.
            queued: N counters, 0-d int64: gradients queued so far, increased by ``accepted``.
            accepted: ``(N,)`` bool; where False the gradient is not queued. None accepts all.
            grad_scale: the loss scale the gradients carry, 0-d float32, or None.
        """
        ...

    def gqsgd_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        queues: Sequence[Tensor],
        queued: Sequence[Tensor],
        momentum_buffers: Sequence[Tensor] | None,
        accepted: Tensor | None,
        law: Law,
        *,
        lr: float | Tensor,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool,
        first: bool,
        stochastic_rounding: bool = False,
        place: int = 0,
    ) -> None:
        """Take one step of SGD on weighted gradients, in the order of ``torch.optim.SGD``.

        The law acts on the unscaled loss gradient; the sign of ``maximize``, L2 decay, momentum and
        the update follow.

        Args:
            params: N parameters ``(P,)``, updated in place.
            grads: N gradients ``(P,)``, read only.
            queues: N rings ``(L, P)``; the oldest row is replaced by the raw gradient.
            queued: N counters, 0-d int64: gradients queued so far, increased by ``accepted``.
            momentum_buffers: N buffers ``(P,)``, or None without momentum.
            accepted: ``(N,)`` bool; where False the gradient is used with weight 1 and not queued.
                None accepts all: a loss scaler has looked at every gradient already.
            law: where ``law.found_inf`` is not 0 nothing is written or counted.
            lr: learning rate, a number or a 0-d tensor.
            momentum: decay of the momentum buffer.
            dampening: share of the gradient that does not enter the momentum.
            weight_decay: L2 penalty, added after the law.
            nesterov: look one momentum step ahead.
            maximize: ascend.
            first: whether the momentum buffers are written for the first time, as the gradient.
            stochastic_rounding: whether parameters of bfloat16 are rounded at random; see
                ``gq_triton.rounding``.
            place: tensors of the optimizer before the first of these, for the random bits.
        """
        ...

    def gqadamw_(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        queues: Sequence[Tensor],
        queued: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        accepted: Tensor | None,
        law: Law,
        *,
        lr: float | Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        maximize: bool,
        stochastic_rounding: bool = False,
        place: int = 0,
    ) -> None:
        """Take one step of AdamW on weighted gradients, in the order of ``torch.optim.AdamW``.

        The law acts on the unscaled loss gradient; the weighted gradient enters both moments.

        Args:
            params: N parameters ``(P,)``, updated in place.
            grads: N gradients ``(P,)``, read only.
            queues: N rings ``(L, P)``; the oldest row is replaced by the raw gradient.
            queued: N counters, 0-d int64: gradients queued so far, increased by ``accepted``.
            exp_avgs: N first moments ``(P,)``.
            exp_avg_sqs: N second moments ``(P,)``.
            steps: N counters of updates, 0-d float32, increased by one.
            accepted: ``(N,)`` bool; where False the gradient is used with weight 1 and not queued.
                None accepts all: a loss scaler has looked at every gradient already.
            law: where ``law.found_inf`` is not 0 nothing is written or counted.
            lr: learning rate, a number or a 0-d tensor.
            beta1: decay of the first moment.
            beta2: decay of the second moment.
            eps: added to the denominator.
            weight_decay: decoupled decay.
            maximize: ascend.
            stochastic_rounding: as in ``gqsgd_``.
            place: as in ``gqsgd_``.
        """
        ...

    def combine(
        self,
        sums: Tensor,
        queue: Tensor,
        queued: Tensor | None,
        law: Law,
        *,
        inverse_shares: Tensor,
        mixture: Tensor,
        sigma_scales: Tensor,
        into: tuple[Tensor, Tensor] | None = None,
        queue_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weight the cluster means of one parameter and add them up: ``sum_k p_k w(c_k) c_k``.

        This is Algorithm 1 of Grad Queue. Nothing is queued.

        Args:
            sums: ``(K, P)``, gradients summed over each cluster's samples; ``c_k = sums_k /
                share_k``. If any of them is not finite, every weight is 1.
            queue: the ring ``(L, P)``, or the statistics ``(2, P)`` that ``queue_statistics``
                wrote; read only.
            queued: gradients queued so far, 0-d int64; below L every weight is 1. None says that
                ``queue`` holds statistics.
            law: ``found_inf`` is not read: ``push_`` decides whether the raw gradient is queued.
                ``length`` is not read with statistics: ``queue_statistics`` has applied it.
            inverse_shares: ``(K,)`` float64, ``1 / share_k``; 0 for an empty cluster.
            mixture: ``(K,)`` float64, ``p_k``.
            sigma_scales: ``(K,)`` float64, the factor of sigma for cluster k.
            into: where to write the weighted and the raw gradient, ``(P,)`` each; None allocates.
            queue_dtype: type of the ring that the statistics were taken from.

        Returns:
            The weighted gradient ``(P,)`` and the raw one ``(P,)``, both with the loss scale and in
            the type of ``sums``; and ``(C, 5)`` float64, one row per part of the work. The sum of
            the rows has the columns of ``weigh_``, the last three averaged over the clusters,
            weighted by population.
        """
        ...

    def combine_all(
        self,
        sums: Sequence[Tensor],
        queues: Sequence[Tensor],
        queued: Sequence[Tensor],
        weighted: Sequence[Tensor],
        raw: Sequence[Tensor],
        law: Law,
        *,
        inverse_shares: Tensor,
        mixture: Tensor,
        sigma_scales: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """Do ``combine`` for many parameters of one batch, on one device, with few launches.

        Args:
            sums: N tensors ``(K, *)`` of one type, as in ``combine``; each cluster's may have the
                shape of the parameter, in its memory order and without holes. Or ``(K * P,)``.
            queues: N rings ``(L, P)`` of one type; read only.
            queued: N counters, 0-d int64.
            weighted: where to write the weighted gradients, N tensors of one type, likewise.
            raw: where to write the raw gradients, N tensors ``(P,)`` of the type of the sums.
            law: as in ``combine``.
            inverse_shares: ``(K,)`` float64, as in ``combine``.
            mixture: ``(K,)`` float64.
            sigma_scales: ``(K,)`` float64.

        Returns:
            For each parameter the rows of statistics that ``combine`` returns; and ``(N,)`` bool,
            whether all elements of the raw gradient are finite.
        """
        ...

    def combine_rows(
        self,
        grads: Tensor,
        where: Tensor,
        labels: Tensor,
        queue: Tensor,
        queued: Tensor,
        law: Law,
        *,
        inverse_shares: Tensor,
        mixture: Tensor,
        sigma_scales: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Do ``combine`` for a table of which lookups have touched some rows.

        A row that nobody looked up has gradient 0 in every cluster, so 0 whatever its weight, which
        the statistics count as 1.

        Args:
            grads: ``(n, d)`` gradients of the lookups, of any floating type.
            where: ``(n,)`` int64, the row of each lookup; V or more for one that does not count.
            labels: ``(n,)`` int64, the cluster of each lookup, below K.
            queue: the ring ``(L, V * d)``; read only.
            queued: gradients queued so far, 0-d int64; below L every weight is 1.
            law: as in ``combine``.
            inverse_shares: ``(K,)`` float64, as in ``combine``.
            mixture: ``(K,)`` float64.
            sigma_scales: ``(K,)`` float64.

        Returns:
            The weighted gradient ``(V, d)`` and the raw one, summed in float32 at least;
            statistics, as those of ``combine``; and whether the raw gradient is finite, 0-d bool.
        """
        ...

    def queue_statistics(
        self, queue: Tensor, queued: Tensor, out: Tensor, *, length: Tensor | None = None
    ) -> None:
        """Write the statistics of a ring that ``combine`` takes: its mean and 1 / sigma.

        The mean is rounded once, to the type of ``out``. For a constant queue it is exact, and
        1 / sigma is the largest number of that type: z is 0 where a gradient equals the mean.

        Args:
            queue: the ring ``(L, P)`` with contiguous rows at any distance, read only.
            queued: gradients queued so far, 0-d int64. Below L, NaN is written for 1 / sigma, which
                stands for weights of 1.
            out: ``(2, P)`` with contiguous rows, float32, or float64 where gradients or ring are.
            length: effective length, 0-d int64, or None for L.
        """
        ...
