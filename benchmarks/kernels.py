"""Time the kernels of the clustered backward pass against the torch operations that they replace.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --cases LayerNorm --repeats 50

This needs a CUDA device. Each line compares two functions over the same tensors, which are timed in
turns in one run. Times are medians of ``--repeats`` measurements of ``--calls`` calls each. A ratio
is that to the torch operations; below 1 the kernel is faster.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from gq_triton.bench.hardware import where
from gq_triton.bench.record import as_table
from gq_triton.bench.run import Run
from gq_triton.grouping import Groups
from gq_triton.options import ClusterOptions


@dataclass
class Case:
    """Functions that compute the same, and the pairs of them that are compared.

    Attributes:
        shape: the tensors, in words.
        steps: the functions by name; each returns what it computed.
        pairs: names of a kernel and of its rival.
    """

    shape: str
    steps: dict[str, Callable[[], Any]]
    pairs: list[tuple[str, str]]


def grouped(device: torch.device, batch: int, clusters: int) -> tuple[Groups, Tensor]:
    """Return groups of about the same size, and the ends of the clusters on the device."""
    groups = Groups.of(
        torch.randint(clusters, (batch,), device=device), clusters, ClusterOptions(), None
    )
    return groups, torch.tensor([0, *groups.sizes], device=device).cumsum(0)


def layer_norm(
    device: torch.device, batch: int = 64, positions: int = 1024, width: int = 1024,
    clusters: int = 8,
) -> Case:  # fmt: skip
    """Return the case of a LayerNorm's scale and shift: bfloat16 rows."""
    from gq_triton.kernels import position_sums

    groups, ends = grouped(device, batch, clusters)
    size = batch, positions, width
    dy, x = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2))
    mean, rstd = x.float().mean(dim=2), x.float().std(dim=2).reciprocal()

    def in_torch() -> tuple[Tensor, Tensor]:
        wide, normalised = dy.float(), (x - mean[..., None]) * rstd[..., None]
        return groups.sums(wide.sum(dim=1)), groups.sums((wide * normalised).sum(dim=1))

    steps = {
        "position_sums": lambda: position_sums(dy, groups.order, ends, x=x, mean=mean, rstd=rstd),
        "torch": in_torch,
    }
    shape = f"LayerNorm, bfloat16, {batch} x {positions} x {width}, K = {clusters}"
    return Case(shape, steps, [("position_sums", "torch")])


def bias(device: torch.device, rows: int = 16384, width: int = 4096, clusters: int = 8) -> Case:
    """Return the case of a linear layer's bias: bfloat16 rows, one per sample."""
    from gq_triton.kernels import position_sums

    groups, ends = grouped(device, rows, clusters)
    dy = torch.randn(rows, 1, width, device=device, dtype=torch.bfloat16)
    steps = {
        "position_sums": lambda: position_sums(dy, groups.order, ends)[:1],
        "torch": lambda: (groups.sums(dy.sum(dim=1, dtype=torch.float32)),),
    }
    shape = f"bias, bfloat16, {rows} x {width}, K = {clusters}"
    return Case(shape, steps, [("position_sums", "torch")])


def group_norm(
    device: torch.device, batch: int = 256, channels: int = 256, side: int = 28, clusters: int = 8
) -> Case:
    """Return the case of the scale and shift of a GroupNorm with 32 groups: float32 images."""
    from gq_triton.kernels import channel_sums

    groups, ends = grouped(device, batch, clusters)
    size = batch, channels, side * side
    dy, x = (torch.randn(size, device=device) for _ in range(2))
    mean, rstd = (torch.rand(batch, 32, device=device) for _ in range(2))

    def in_torch() -> tuple[Tensor, Tensor]:
        by_group = x.view(batch, 32, -1)
        normalised = ((by_group - mean[..., None]) * rstd[..., None]).view(size)
        return groups.sums(dy.sum(dim=2)), groups.sums((dy * normalised).sum(dim=2))

    steps = {
        "channel_sums": lambda: channel_sums(dy, groups.order, ends, x=x, mean=mean, rstd=rstd),
        "torch": in_torch,
    }
    shape = f"GroupNorm, float32, {batch} x {channels} x {side}^2, K = {clusters}"
    return Case(shape, steps, [("channel_sums", "torch")])


def linear(
    device: torch.device, batch: int = 16, positions: int = 1024, outputs: int = 4096,
    inputs: int = 4096, clusters: int = 8, dtype: torch.dtype = torch.bfloat16,
) -> Case:  # fmt: skip
    """Return the case of a linear layer's weight: all clusters at once against one product.

    The first rival forms the sum over all samples, which is less than what is asked for. The second
    sorts both factors and forms a product for each cluster.
    """
    from gq_triton.engines import eager
    from gq_triton.kernels import product_sums

    groups, ends = grouped(device, batch, clusters)
    dy, x = (
        torch.randn(batch, positions, n, device=device, dtype=dtype) for n in (outputs, inputs)
    )
    out, plain = (torch.empty(clusters, outputs, inputs, device=device) for _ in range(2))

    def by(sums: Callable[..., None], target: Tensor) -> tuple[Tensor]:
        sums(dy, x, groups.order, ends, target)
        return (target,)

    steps = {
        "product_sums": lambda: by(product_sums, out),
        "sum of all": lambda: (dy.flatten(0, 1).T @ x.flatten(0, 1),),
        "sorted": lambda: by(eager.product_sums, plain),
        "total": lambda: (by(product_sums, out)[0].sum(dim=0).to(dtype),),
    }
    shape = f"linear, {str(dtype)[6:]}, {batch} x {positions}, {outputs} x {inputs}, K = {clusters}"
    return Case(shape, steps, [("product_sums", "sum of all"), ("product_sums", "sorted")])


def convolution(
    device: torch.device, batch: int = 64, channels: int = 256, side: int = 28, clusters: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:  # fmt: skip
    """Return the case of a 3 x 3 convolution's kernel in channels_last; rivals as ``linear`` has.

    Each rival is torch's own gradient of the kernel, of all samples or of each cluster.
    """
    from gq_triton.engines import eager
    from gq_triton.kernels import convolution_sums

    groups, ends = grouped(device, batch, clusters)
    size = batch, channels, side, side
    dy, x = (
        torch.randn(size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight = torch.empty(channels, channels, 3, 3, device=device)
    weight = weight.to(memory_format=torch.channels_last)
    shape = (clusters, channels, 3, 3, channels)
    out, plain = (torch.empty(shape, device=device).movedim(-1, 2) for _ in range(2))
    sides: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}

    def by(sums: Callable[..., None], target: Tensor) -> tuple[Tensor]:
        sums(dy, x, groups.order, ends, target, **sides)
        return (target,)

    def of_all() -> tuple[Tensor]:
        return (
            torch.ops.aten.convolution_backward(
                dy, x, weight.to(dtype), None, *sides.values(), False, [0, 0], 1,
                [False, True, False],
            )[1],
        )  # fmt: skip

    steps = {
        "convolution_sums": lambda: by(convolution_sums, out),
        "sum of all": of_all,
        "sorted": lambda: by(eager.convolution_sums, plain),
        "total": lambda: (by(convolution_sums, out)[0].sum(dim=0).to(dtype),),
    }
    text = f"convolution, {str(dtype)[6:]}, {batch} x {channels} x {side}^2, K = {clusters}"
    return Case(text, steps, [("convolution_sums", "sum of all"), ("convolution_sums", "sorted")])


CASES: dict[str, Callable[[torch.device], Case]] = {
    "bias": bias,
    "LayerNorm": layer_norm,
    "GroupNorm": group_norm,
    "linear": linear,
    "convolution": convolution,
}


def compare(run: Run, name: str, case: Case, calls: int) -> None:
    """Time the pairs of a case."""
    for ours, rival in case.pairs:
        both = {step: case.steps[step] for step in (rival, ours)}
        for step in both.values():
            run.taken(step, 3)  # compiles and warms up
        run.compare(name, case.shape, both, calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--calls", type=int, default=10)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA device: none was found.", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda")
    console = Console()
    run = Run(device, float("inf"), args.repeats)
    for name in args.cases:
        with console.status(name), run.case(name, "") as begins:
            if begins:
                compare(run, name, CASES[name](device), args.calls)
    console.print(as_table(", ".join(where(device).values()), run.lines))
    if run.failures:
        sys.exit("\n".join(["these cases failed:", *run.failures]))


if __name__ == "__main__":
    main()
