"""The theme ``kmeans``: clustering one batch's features, as a step with clusters does.

All run Lloyd iterations from the same centres, ten unless no label changes before. scikit-learn
computes on the CPU, with the copy from the GPU and back where the features are there. "plain torch"
is a loop that does no more than as many iterations: no standardisation, no empty clusters, no test
for convergence.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.bench.run import Run
from gq_triton.grouping import KMeans

__all__ = ["measure"]

SIZES = (128, 64, 8), (64, 512, 8), (2048, 768, 8), (2048, 768, 64)  # samples, features, K
ITERATIONS = 10


def measure(run: Run) -> None:
    """Time ten iterations on batches of several sizes."""
    for samples, features, clusters in ((64, 8, 4),) if run.small else SIZES:
        case = f"{samples} samples x {features}, K = {clusters}"
        with run.case("kmeans", case) as begins:
            if begins:
                _case(run, case, torch.randn(samples, features, device=run.device), clusters)


def _case(run: Run, case: str, x: Tensor, clusters: int) -> None:
    from sklearn.cluster import KMeans as Scikit

    first = x[:clusters].cpu()
    same: dict[str, Any] = {"max_iter": ITERATIONS, "tol": 0.0}
    ours = KMeans(clusters, init=first, warm_start=False, **same)
    iterations = int(ours.fit(x).n_iter_)
    once: dict[str, Any] = {"init": first.numpy(), "n_init": 1}
    theirs = Scikit(clusters, **once, **same)

    def scikit() -> Tensor:
        with warnings.catch_warnings():  # ten iterations do not converge
            warnings.simplefilter("ignore")
            return torch.from_numpy(theirs.fit(x.cpu().numpy()).labels_).to(x.device)

    def plain() -> None:
        centers = x[:clusters]
        for _ in range(iterations):
            labels = torch.cdist(x, centers).argmin(dim=1)
            members = nn.functional.one_hot(labels, clusters).to(x)
            centers = members.T @ x / members.sum(dim=0).clamp(min=1)[:, None]

    steps = {"scikit-learn": scikit, "KMeans": lambda: ours.fit(x), "plain torch": plain}
    for step in steps.values():
        step()
    run.compare("kmeans", case, steps, calls=5)
