"""Cluster gradients of any model, by one backward pass per cluster."""

import torch
from torch import Tensor

from gq_triton.cluster_grad.accumulate import Accumulator
from gq_triton.options import ClusterOptions
from gq_triton.replayed import refuse_replay

__all__ = ["backward"]


def backward(accumulator: Accumulator, losses: Tensor, options: ClusterOptions) -> None:
    """Run K backward passes through the last forward pass; add the sink's gradients to ``p.grad``.

    Args:
        accumulator: the accumulator of the model.
        losses: ``(B,)`` per-sample losses. Their mean is minimised, or with
            ``loss_reduction="sum"`` their sum.
        options: how the clusters are weighted.

    Raises:
        ValueError: there was no forward pass, or there is not one loss per sample.
    """
    step = accumulator.step
    if step is None or losses.dim() != 1:
        raise ValueError(f"backward needs the losses (B,) of a forward pass of the model, got "
                         f"{tuple(losses.shape)}")  # fmt: skip
    refuse_replay(
        'mode="microbatch" reads the sizes of clusters on the host', 'take mode="one_backward"'
    )
    accumulator.raw.begin_pass()
    params = [p for p in accumulator.params.values() if p.requires_grad]
    count = 1 if options.loss_reduction == "sum" else len(losses)
    scale = options.accumulation_steps
    whole = losses.sum() / (count * scale)
    if step.features is None:
        output = whole  # the backward pass from here calls the hook that keeps the features
        torch.autograd.grad(output, params, retain_graph=True, allow_unused=True)
    groups = step.groups
    if len(groups.labels) != len(losses):
        raise ValueError(
            f"backward got {len(losses)} losses for {len(groups.labels)} clustered samples"
        )
    sums: list[Tensor | None] = [None] * len(params)
    clusters = [k for k, size in enumerate(groups.sizes) if size]
    for number, k in enumerate(clusters):
        part = (losses * groups.members[k].to(losses)).sum() / (count * scale)
        more = number + 1 < len(clusters)
        grads = torch.autograd.grad(part, params, retain_graph=more, allow_unused=True)
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            total = sums[index]
            if total is None:
                shape = (groups.n_clusters, *grad.shape)
                total = sums[index] = torch.zeros(shape, dtype=grad.dtype, device=grad.device)
            total[k] = grad
    for param, total in zip(params, sums, strict=True):
        if total is not None:
            accumulator.add(step, param, total)
