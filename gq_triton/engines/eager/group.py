"""The samples of a batch in the order of their clusters, and the numbers of the clusters."""

import torch
from torch import Tensor

__all__ = ["group"]


def group(
    labels: Tensor,
    clusters: int,
    *,
    sample_weights: Tensor | None,
    whole_batch: int | Tensor,
    steps: int,
    power: float,
    unit: float,
    standard_error: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Order the samples by cluster and compute the clusters' numbers; see ``engines.protocol``."""
    device, wide = labels.device, torch.float64
    members = labels == torch.arange(clusters, device=device)[:, None]
    counts = members.sum(dim=1)
    sizes = counts.to(wide)
    population = sizes
    if sample_weights is not None:
        population = members.to(wide) @ sample_weights.to(sizes)
    # Of all samples as one cluster: numbers of the host where it need not wait for them.
    whole, total = whole_batch, population.sum()
    if device.type == "cpu":
        whole, total = float(whole), float(total)
    share = population / (total * steps)
    powers = torch.where(sizes > 0, population**power, 0.0)
    mass = powers.sum()
    # Rows of even length start at multiples of 16 bytes, so kernels are compiled only once.
    table = torch.zeros(8, max(2, clusters + clusters % 2), dtype=wide, device=device)
    inverse = torch.where((sizes > 0) & (share > 0), 1.0 / (share * unit), 0.0)
    scales, spread = torch.ones_like(share), 1.0
    if standard_error:
        scales = (whole * steps / sizes.clamp(min=1)).sqrt()
        spread = (whole * steps / labels.numel()) ** 0.5
    mixture = powers / mass / steps * unit
    for row, vector in enumerate((inverse, mixture, scales)):
        table[row, :clusters] = vector
    table[3, 0], table[3, 1] = mass, total
    one = steps / unit, unit / steps, spread, total**power
    if device.type == "cpu":
        table[4:, 0] = torch.tensor(one, dtype=wide, device=device)
    else:
        for row, number in enumerate(one, 4):
            table[row, 0] = number
    offsets = torch.nn.functional.pad(counts.cumsum(dim=0), (1, 0))
    return torch.argsort(labels, stable=True), offsets, table
