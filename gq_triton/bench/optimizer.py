"""The theme ``optimizer``: steps of the optimizers over the shapes of real models.

Each optimizer is timed in turns with torch's fused one, to which the ratio is taken. Both have the
same parameters and gradients in memory; states and queues are their own. The queue is full, and
every weight is computed. "bucket" is the law alone, on flat buckets of 25 MiB as DDP has them, with
the copy that brings the next gradient.

GB/s are those of the bytes that the update must move, whatever an implementation moves. On a GPU
steps are launched without waiting, as in training; the host's time is until a step returns.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from gq_triton import GQSGD, GQAdamW
from gq_triton.bench.harness import (
    Step,
    copy_rate,
    host_seconds,
    in_turns,
    launches,
    matmul_rate,
)
from gq_triton.bench.run import Line, Run
from gq_triton.bench.shapes import gpt, reduced, resnet50, tiny
from gq_triton.options import LawOptions
from gq_triton.queues import Queues

__all__ = ["COPY", "OPERATIONS_PER_BYTE", "OWN_BYTES", "PAIRS", "PRODUCT", "measure",
           "new_gradients", "parameters"]  # fmt: skip

PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "AdamW": (GQAdamW, lambda params: torch.optim.AdamW(params, fused=True)),
    "SGD momentum": (
        lambda params, **options: GQSGD(params, lr=0.1, momentum=0.9, **options),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    ),
}
# Bytes per float32 element beside the queue: what torch reads and writes.
OWN_BYTES = {"AdamW": 28, "SGD momentum": 20}
LENGTH = 5
FILL = LENGTH + 1  # from the next step on the queue is full
QUEUE_BYTES = 4 * (LENGTH + 1)  # L rows are read, one is written
BUCKET_BYTES = QUEUE_BYTES + 8 + 8  # the gradient is weighted in place, after a copy
# Arithmetic per element, counted from the equations: additions, products, quotients and roots. The
# law: mean and variance of L rows and the gradient's deviation from them, clipped, times itself.
LAW_OPERATIONS = 4 * LENGTH + 12
OPERATIONS = {"AdamW": 16, "SGD momentum": 4}
COPY, PRODUCT, RATE = "copy", "product of float32 matrices", "GB/s"
OPERATIONS_PER_BYTE = "FLOP per byte"
BUCKET = 25 * 2**18  # elements of 25 MiB
RESNET, GPT2, LARGE = "ResNet-50", "GPT-2 small", "GPT of 1.3 B"
MANY, FEWER = "10 000 tensors of 64", "1 000 tensors of 64"  # seconds a step without Numba
EQUAL = "8 tensors of 1024 x 2048"  # what compiles once for each shape does so once


def parameters(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[nn.Parameter]:
    """Return random parameters with random gradients."""
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def new_gradients(params: Sequence[nn.Parameter]) -> None:
    """Give every parameter another random gradient, in place."""
    for param in params:
        assert param.grad is not None
        param.grad.normal_()


def again(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return further parameters in the memory of some, with the same gradients."""
    others = [nn.Parameter(param.detach()) for param in params]
    for other, param in zip(others, params, strict=True):
        other.grad = param.grad
    return others


def models(run: Run) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes by the model's name, which says what was left out of it."""
    if run.small:
        return {"two tensors": [(64, 64), (64,)]}
    layers, words = reduced(run.device)
    return {
        RESNET: resnet50(),
        MANY: tiny(),
        **({} if run.on_gpu else {FEWER: tiny(1000)}),
        GPT2: gpt(768, 12, 1024),
        EQUAL: [(1024, 2048)] * 8,
        f"{LARGE}{words}": gpt(2048, layers, 2048),
    }


def _compiled(build: Callable[..., Any], params: list[nn.Parameter]) -> Step:
    return torch.compile(build(params).step)


def _torchao(params: list[nn.Parameter]) -> Step:
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return AdamW8bit(params).step


def _heavyball(params: list[nn.Parameter]) -> Step:
    import heavyball  # pyright: ignore[reportMissingImports]

    optimizer = heavyball.AdamW(params, lr=1e-3)
    optimizer.consume_grad = False  # else it drops the gradients, and later steps do nothing
    return optimizer.step


def _bucket(params: list[nn.Parameter]) -> Step:
    """Return a step of the law alone on flat buckets."""
    grads = torch.cat([param.grad.flatten() for param in params if param.grad is not None])
    named = {str(n): torch.empty_like(part) for n, part in enumerate(grads.split(BUCKET))}
    queues = Queues(named, LawOptions(queue_length=LENGTH))

    def step() -> None:
        for (name, buffer), part in zip(named.items(), grads.split(BUCKET), strict=True):
            buffer.copy_(part)
            queues.weigh_([name], [buffer])
        grads.mul_(-0.9)  # the queue is not constant

    for _ in range(FILL):
        step()

    def timed() -> None:
        for (name, buffer), part in zip(named.items(), grads.split(BUCKET), strict=True):
            buffer.copy_(part)
            queues.weigh_([name], [buffer])

    return timed


class Rival(NamedTuple):
    """How a step is made, and what it moves and computes per element; 0 where not known."""

    make: Callable[[list[nn.Parameter]], Step]
    moved: int
    operations: int
    fill: int = 2  # steps before it is timed


class Job(NamedTuple):
    """One optimizer over one model's shapes; the late ones come last."""

    late: bool
    model: str
    name: str
    label: str
    rival: Rival
    first: bool  # whether the line of torch's fused step is kept


def rivals(name: str, model: str, run: Run) -> dict[str, Rival]:
    """Return what is timed over a model's shapes in turns with torch's fused optimizer."""
    ours, _ = PAIRS[name]
    kind: Any = torch.optim.AdamW if name == "AdamW" else torch.optim.SGD
    options: dict[str, Any] = {} if name == "AdamW" else {"lr": 0.1, "momentum": 0.9}
    own, its = OWN_BYTES[name], OPERATIONS[name]
    title = "GQAdamW" if name == "AdamW" else "GQSGD"
    full = own + QUEUE_BYTES, its + LAW_OPERATIONS, FILL + 1
    found = {title: Rival(lambda params: ours(params).step, *full)}
    if not run.on_gpu and model in (RESNET, FEWER):
        eager = Rival(lambda params: ours(params, backend="torch").step, *full)
        found[f"{title}, without Numba"] = eager
    if model == FEWER:
        return found
    if run.on_gpu or not model.startswith(LARGE):
        make = functools.partial(kind, foreach=True, **options)
        found["torch foreach"] = Rival(lambda params: make(params).step, own, its)
    if name != "AdamW" and model != MANY:
        found["bucket"] = Rival(_bucket, BUCKET_BYTES, LAW_OPERATIONS, 1)
    # On a CPU real shapes take minutes to compile.
    if model == EQUAL or (run.on_gpu and model != MANY):
        build = functools.partial(kind, foreach=True, **options)
        found["torch compiled"] = Rival(functools.partial(_compiled, build), own, its)
        if name == "AdamW" and find_spec("torchao") is not None:
            found["torchao AdamW8bit"] = Rival(_torchao, 0, 0)
        if name == "AdamW" and find_spec("heavyball") is not None:
            found["HeavyBall AdamW"] = Rival(_heavyball, own, 0)
    return found


def jobs(run: Run, names: Sequence[str]) -> list[Job]:
    """Return all jobs, those first that take little time for what they tell."""
    found = []
    for model in names:
        for name in PAIRS:
            for label, rival in rivals(name, model, run).items():
                compiles = label.startswith(("torch compiled", "torchao", "HeavyBall"))
                first = label.startswith("GQ") and "without" not in label
                found.append(Job(compiles, model, name, label, rival, first))
    return sorted(found, key=lambda job: job.late)


def measure(run: Run) -> None:
    """Time every optimizer over every model's shapes."""
    rate = copy_rate(run.device) if not run.small else 1e10
    peak = matmul_rate(run.device) if not run.small else 1e11
    run.lines.append(Line("optimizer", "machine", COPY, RATE, rate / 1e9))
    run.lines.append(Line("optimizer", "machine", PRODUCT, "GFLOP/s", peak / 1e9))
    shapes, made, params = models(run), "", []
    for job in jobs(run, list(shapes)):
        case = f"{job.model}, {job.name}"
        with run.case("optimizer", f"{case}: {job.label}") as begins:
            if begins:
                if job.model != made:
                    params.clear()
                    params, made = parameters(shapes[job.model], run.device), job.model
                _pair(run, case, job, params, rate)


def _pair(run: Run, case: str, job: Job, params: list[nn.Parameter], rate: float) -> None:
    """Time one optimizer in turns with torch's fused one."""
    fused, step = PAIRS[job.name][1](again(params)).step, job.rival.make(again(params))
    for count in range(max(2, job.rival.fill)):
        for param in params:
            assert param.grad is not None
            param.grad.mul_(-0.9)  # the queue is not constant
        if count < 2:
            fused()
        if count < job.rival.fill:
            step()
    calls = 20 if run.on_gpu else 1
    base, taken = in_turns([fused, step], run.turns, run.device, calls, least=3)
    elements = sum(param.numel() for param in params)
    plain = Rival(lambda params: fused, OWN_BYTES[job.name], OPERATIONS[job.name])
    every = [(job.label, step, taken, job.rival)]
    if job.first:
        every.insert(0, ("torch fused", fused, base, plain))
    for label, call, found, rival in every:
        times = [1000 * value for value in found]
        (line,) = run.note("optimizer", case, "ms", {label: times},
                           base=[1000 * value for value in base])  # fmt: skip
        if rival.moved:
            speed = elements * rival.moved / statistics.median(found)
            line.more |= {RATE: speed / 1e9, "of a copy": speed / rate}
        if rival.moved and rival.operations:
            line.more[OPERATIONS_PER_BYTE] = rival.operations / rival.moved
        if run.on_gpu:
            host = statistics.median(host_seconds(call, run.device) for _ in range(run.turns))
            line.more |= {"host ms": 1000 * host, "launches": launches(call)}
