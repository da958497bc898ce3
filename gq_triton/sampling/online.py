"""Centres that follow a training batch by batch, as moving averages.

Shapes: B samples, K clusters; centres of rank 1 as in ``centres``.
"""

import torch
from torch import Tensor

from gq_triton.sampling.centres import Centre, Sums
from gq_triton.sampling.factors import Factors

__all__ = ["followed", "revived"]

# A cluster is given up once its moving average is below this part of an equal share of a batch.
LEAST_SHARE = 0.1


def followed(
    centres: dict[str, Centre],
    sizes: Tensor,
    found: dict[str, Factors],
    labels: Tensor,
    beta: float,
) -> tuple[dict[str, Centre], Tensor]:
    """Return centres and sizes ``(K,)`` after a batch.

    A size is ``beta * size + (1 - beta) * count``. A centre's factors are means that count the past
    by ``beta * size`` and the batch's samples by ``1 - beta``; without samples they stay.
    """
    clusters = len(sizes)
    counts = torch.bincount(labels, minlength=clusters).to(sizes)
    after = beta * sizes + (1 - beta) * counts
    share = torch.where(after > 0, (1 - beta) * counts / after.clamp(min=1e-300), 0.0)
    moved = {}
    for name, one in found.items():
        sums = Sums(1, clusters)
        sums.add(one, labels.to(one.inputs.device))
        old, new = centres[name], sums.centre()
        part = share.to(old.inputs).view(-1, 1, 1, 1)
        moved[name] = Centre(*(a + part * (b - a) for a, b in zip(old, new, strict=True)))
    return moved, after


def revived(
    centres: dict[str, Centre], sizes: Tensor, distortions: Tensor
) -> tuple[dict[str, Centre], Tensor]:
    """Give clusters that have almost no samples the centre of the one with the most distortion.

    Both then have half of its size. Arguments and result are as in ``followed``; ``distortions``
    ``(K,)`` are the sums of squared distances within the clusters.
    """
    sizes, distortions = sizes.clone(), distortions.clone()
    centres = {name: Centre(*(part.clone() for part in one)) for name, one in centres.items()}
    small = (sizes < LEAST_SHARE * sizes.mean()).nonzero().flatten().tolist()
    for place in small:
        large = int(distortions.argmax())
        if large == place:
            continue
        for one in centres.values():
            one.inputs[place], one.outputs[place] = one.inputs[large], one.outputs[large]
        sizes[place] = sizes[large] = sizes[large] / 2
        distortions[place] = distortions[large] = distortions[large] / 2
    return centres, sizes
