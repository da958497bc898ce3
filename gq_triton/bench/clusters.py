"""The theme ``clusters``: a training step with K cluster gradients against the plain step.

A step is forward pass, clustering, backward pass and optimizer; the queue is full. The plain step
and the step with clusters in one backward pass are timed in turns, the others after them: their K
or B copies of the gradients would push what the first two use out of the cache. "K passes" is
``mode="microbatch"``. ``vmap(grad)`` takes 16 samples at a time; it and Opacus stop at the K sums
of gradients, without the law and the update; they take no batch norm and no recurrent layers. Peak
memory is that of one step above what is held between steps, so without the queue. K passes are
timed once, and no memory is measured of a step that takes over five seconds.
"""

import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gq_triton import GradQueue
from gq_triton.bench.harness import ENOUGH, Step, in_turns
from gq_triton.bench.models import GPT, MLP, Recurrent, ResNet18
from gq_triton.bench.peak import of_step, peak
from gq_triton.bench.run import Line, Run
from gq_triton.bench.shapes import memory

__all__ = ["measure"]

PLAIN, OURS, PASSES, VMAP, OPACUS = "plain", "clusters", "K passes", "vmap(grad)", "Opacus"
CHUNK = 16
PEAK = "peak MiB"


class Case(NamedTuple):
    """A model and its batch; ``of_text`` says that each position has a class."""

    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    classes: int
    of_text: bool = False
    others: tuple[str, ...] = (PASSES,)

    @property
    def words(self) -> str:
        """Return the batch in words."""
        count = self.inputs[0]
        return f"{count} x {self.inputs[1]} tokens" if self.of_text else f"{count} samples"

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return random inputs and classes."""
        if self.of_text:
            tokens = torch.randint(self.classes, (2, *self.inputs), device=device)
            return tokens[0], tokens[1]
        x = torch.randn(self.inputs, device=device)
        return x, torch.randint(self.classes, self.inputs[:1], device=device)


USUAL = 8  # K; the other numbers are for one model
EVERY = PASSES, VMAP, OPACUS
WIDE = Case(MLP, (2048, 1024), 10, others=EVERY)
_RECURRENT = [
    (kind.__name__, Case(partial(Recurrent, kind), (512, 16, 32), 10), USUAL)
    for kind in (nn.GRU, nn.LSTM, nn.GRUCell, nn.LSTMCell)
]


def _ladder(clusters: int) -> tuple[str, Case, int]:
    return "MLP, 1024 wide", WIDE._replace(others=(PASSES,)), clusters


# What tells most comes first. In small batches the costs of each cluster show.
CASES: list[tuple[str, Case, int]] = [
    ("MLP, 1024 wide", WIDE, USUAL),
    ("GPT of 3.3 M", Case(GPT, (64, 128), 256, True, EVERY), USUAL),
    ("ResNet-18", Case(ResNet18, (64, 3, 32, 32), 10), USUAL),
    *_RECURRENT,
    ("MLP, 1024 wide", WIDE._replace(others=()), 1),
    _ladder(64),
    ("MLP, 1024 wide", Case(MLP, (128, 1024), 10, others=EVERY), USUAL),
    ("GPT of 3.3 M", Case(GPT, (16, 128), 256, True, ()), USUAL),
    ("ResNet-18", Case(ResNet18, (16, 3, 32, 32), 10, others=()), USUAL),
    _ladder(16),
    _ladder(4),
]
TINY = Case(partial(GPT, 16, 8, 16, 2, 1), (16, 8), 16, True, EVERY)


def loss_of(output: Tensor, classes: Tensor) -> Tensor:
    """Return the loss of each sample; that of a text is the mean over its positions."""
    if output.ndim == 3:
        losses = nn.functional.cross_entropy(output.transpose(1, 2), classes, reduction="none")
        return losses.mean(dim=1)
    return nn.functional.cross_entropy(output, classes, reduction="none")


def step_of(case: Case, way: str, clusters: int, device: torch.device, length: int = 5) -> Step:
    """Return a function that takes one step in a way.

    The queue was filled on few samples; then a step was taken. K passes take one on few samples,
    since beside them a queue that is full or not makes no difference.
    """
    torch.manual_seed(0)
    model, batch = case.build().to(device), case.batch(device)
    if way == VMAP:
        labels = _labels(batch, clusters)
        _vmap(model, batch[0][:CHUNK], batch[1][:CHUNK], labels[:CHUNK], clusters)
        return partial(_vmap, model, *batch, labels, clusters)
    if way == OPACUS:
        from opacus import GradSampleModule  # pyright: ignore[reportMissingImports]

        return partial(_opacus, GradSampleModule(model), *batch, _labels(batch, clusters), clusters)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    queue = None
    if way != PLAIN:
        mode = "microbatch" if way == PASSES else "one_backward"
        queue = GradQueue(model, n_clusters=clusters, features="features", mode=mode,
                          queue_length=length)  # fmt: skip
        queue.attach(optimizer)

    def step(count: int | None = None) -> None:
        optimizer.zero_grad()
        losses = loss_of(model(batch[0][:count]), batch[1][:count])
        if way == PASSES:
            assert queue is not None
            queue.backward(losses)
        else:
            losses.mean().backward()
        optimizer.step()

    for _ in range(length + 1 if way == OURS else 1):
        step(max(8, clusters))
    if way != PASSES:
        step()
    return step


def _labels(batch: tuple[Tensor, Tensor], clusters: int) -> Tensor:
    return torch.arange(len(batch[0]), device=batch[0].device) % clusters


def _vmap(model: nn.Module, x: Tensor, y: Tensor, labels: Tensor, clusters: int) -> dict:
    """Return the sums of the samples' gradients by cluster."""
    params = {name: param.detach() for name, param in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_of(functional_call(model, params, (x[None],)), y[None])[0]

    sums = {name: param.new_zeros(clusters, *param.shape) for name, param in params.items()}
    single = vmap(grad(loss), in_dims=(None, 0, 0))
    with warnings.catch_warnings():  # torch says that a loop stands in for attention on the CPU
        warnings.filterwarnings("ignore", "There is a performance drop")
        for at in range(0, len(x), CHUNK):
            part = slice(at, at + CHUNK)
            for name, found in single(params, x[part], y[part]).items():
                sums[name].index_add_(0, labels[part], found)
    return sums


def _opacus(model: Any, x: Tensor, y: Tensor, labels: Tensor, clusters: int) -> dict:
    """Return the sums of the samples' gradients by cluster."""
    model.zero_grad()
    with warnings.catch_warnings():  # tokens need no gradient, which torch finds worth a warning
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        loss_of(model(x), y).mean().backward()
    sums = {}
    for name, param in model.named_parameters():
        sums[name] = param.new_zeros(clusters, *param.shape)
        sums[name].index_add_(0, labels, param.grad_sample)
        param.grad_sample = None
    return sums


def measure(run: Run) -> None:
    """Time every model and K."""
    for name, case, clusters in [("tiny GPT", TINY, 4)] if run.small else CASES:
        label = f"{name}, {case.words}, K = {clusters}"
        with run.case("clusters", label) as begins:
            if begins:
                _case(run, label, case, clusters)


def _case(run: Run, label: str, case: Case, clusters: int) -> None:
    """Time one model with one K; keep a line for each way."""
    both = {way: step_of(case, way, clusters, run.device) for way in (PLAIN, OURS)}
    plain, ours = in_turns(list(both.values()), run.turns, run.device, least=3)
    lines = _note(run, label, {PLAIN: plain, OURS: ours}, plain)
    for way in case.others:
        if way == OPACUS and find_spec("opacus") is None:
            continue
        if left_out := _too_large(case, way):
            run.lines.append(Line("clusters", label, way, note=left_out))
            continue
        step = step_of(case, way, clusters, run.device)
        (taken,) = in_turns([step], 1 if way == PASSES else 2, run.device, least=1)
        lines += _note(run, label, {way: taken}, plain)
        del step
    del both
    _peaks(run, case, clusters, lines)


def _note(run: Run, label: str, times: dict[str, list[float]], plain: list[float]) -> list[Line]:
    found = {way: [1000 * value for value in taken] for way, taken in times.items()}
    return run.note("clusters", label, "ms", found, base=[1000 * value for value in plain])


def _too_large(case: Case, way: str) -> str:
    """Return why a way that makes a gradient of every sample is left out."""
    size = 4 * case.inputs[0] * sum(param.numel() for param in case.build().parameters())
    # Opacus holds all at once; the other takes a second or so for each 2 GiB.
    most = {OPACUS: memory() / 3, VMAP: 2**33}
    if size <= most.get(way, size):
        return ""
    return f"left out: a gradient of every sample takes {size / 2**30:.1f} GiB"


def _peaks(run: Run, case: Case, clusters: int, lines: list[Line]) -> None:
    """Add the peak memory of each way to its line, unless a step takes too long."""
    for line in lines:
        if float(line.median) > 1000 * ENOUGH:
            continue
        if run.on_gpu:
            size = peak(step_of(case, line.step, clusters, run.device), run.device)
        else:
            # Rows of the queue are held between steps: with two the law does all it does with five.
            job = case, line.step, clusters, run.device, 2
            size = of_step(step_of, job, torch.get_num_threads())
        if size is not None:
            line.more[PEAK] = size / 2**20
