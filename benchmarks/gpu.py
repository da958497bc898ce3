"""Check the results on a GPU, then time all that README.md and docs/ claim of GPUs, in one run.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --parts check clusters --csv result.csv

The run takes under six minutes: what would end after ``--seconds``, or has not begun by then, is
left out by name, and ``--parts check compiled`` then measures it alone. A wrong result ends the run
before anything is timed. Two steps that are compared are timed in turns over the same shapes, so
that drift affects both alike. A step of ours comes with its ratio to the step before it, turn by
turn; below 1 ours is faster. "captured" means replayed by this package's ``cuda_graph``, "by block"
that the blocks of the model are compiled, which share one graph. "host" is the time until a step
returns. Peak memory is that of one step, the model and its optimizer included.

The table and the CSV name the hardware, the driver and the versions; the CSV is written after each
part. Without a GPU everything runs on the CPU in a reduced form: it shows that the script works,
and its figures say nothing.
"""

import argparse
import copy
import faulthandler
import functools
import gc
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from gq_triton import GradQueue, cuda_graph
from gq_triton.bench.checks import CHECKS
from gq_triton.bench.clusters import loss_of
from gq_triton.bench.hardware import where
from gq_triton.bench.harness import Step, copy_rate, host_seconds, launches, rounds
from gq_triton.bench.models import GPT, ResNet18, ResNet50
from gq_triton.bench.optimizer import OWN_BYTES, PAIRS, new_gradients, parameters
from gq_triton.bench.ranks import in_turns, make_step
from gq_triton.bench.record import as_csv, as_table
from gq_triton.bench.run import Line, Run
from gq_triton.bench.shapes import MODELS
from gq_triton.grouping import KMeans
from gq_triton.testing import spawn

FILL = 7  # steps that fill the queue: from the sixth on every weight is computed
CLUSTERS = 8
OURS = "Grad Queue"


def check(run: Run) -> None:
    """Compare results with the oracle; a wrong one ends the run."""
    for name, function in CHECKS.items():
        with run.case("check", name):
            for what, error, bound in function(run.device):
                line = Line("check", what, "error", median=error, more={"at most": bound})
                run.lines.append(line)
                if not error <= bound:
                    found = f"{what}: error {error:.3g}, at most {bound:.3g} is allowed"
                    run.failures.append(found)
    if run.failures:
        raise SystemExit("wrong results, nothing was timed:\n" + "\n".join(run.failures))


def optimizers(run: Run) -> None:
    """Time a step of our optimizers against torch's fused ones; the queue is full."""
    models = {"two tensors": lambda: [(64, 64), (64,)]} if run.small else MODELS
    copied = 0.0 if run.small else copy_rate(run.device, run.turns)
    for model, shapes in models.items():
        for name, (build, build_rival) in PAIRS.items():
            with run.case("optimizers", f"{model}, {name}") as begins:
                if not begins:
                    continue
                params, rivals = (parameters(shapes(), run.device) for _ in range(2))
                ours, rival = build(params), build_rival(rivals)
                for _ in range(FILL):
                    new_gradients(params)
                    ours.step()
                    rival.step()
                compare = functools.partial(run.compare, "optimizers")
                both = {"torch fused": rival.step, OURS: ours.step}
                compare(f"{model}, {name}, alone", both)
                flowing = compare(f"{model}, {name}, back to back", both, 20)[1]
                waits = [functools.partial(host_seconds, one, run.device) for one in both.values()]
                times = [[1000 * t for t in taken] for taken in rounds(waits, run.turns)]
                named = dict(zip(both, times, strict=True))
                run.note("optimizers", f"{model}, {name}, host", "ms", named)
                if copied:
                    elements = sum(param.numel() for param in params)
                    moved = elements * (OWN_BYTES[name] + 6 * 4)  # five rows read, one written
                    share = moved / (float(flowing.median) / 1000) / copied
                    flowing.note = f"{share:.0%} of a copy's bytes per second"
            if run.small:
                continue
            with run.case("optimizers", f"{model}, {name}, captured") as begins:
                if begins:
                    for group in rival.param_groups:
                        if "capturable" in group:  # torch's SGD does not ask
                            group["capturable"] = True
                    pairs = ("torch fused", rival), (OURS, ours)
                    both = {name: cuda_graph(each.step, each) for name, each in pairs}
                    for step in both.values():
                        run.taken(step, FILL)
                    compare(f"{model}, {name}, captured", both, 20)


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def of_text(*sizes: int, batch: int) -> Callable[[torch.device], tuple]:
    """Return a maker of a GPT, a batch of its longest sequences, and the loss."""

    def make(device: torch.device) -> tuple[nn.Module, Tensor, Tensor, Callable]:
        tokens = torch.randint(sizes[0], (2, batch, sizes[1]), device=device)
        with device:
            return GPT(*sizes), tokens[0], tokens[1], next_token

    return make


def of_images(build: Step, batch: int, side: int) -> Callable[[torch.device], tuple]:
    """Return a maker of a model in ``channels_last``, a batch, and the loss."""

    def make(device: torch.device) -> tuple[nn.Module, Tensor, Tensor, Callable]:
        with device:
            model = build().to(memory_format=torch.channels_last)
            images = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
            return model, images, torch.randint(10, (batch,)), nn.functional.cross_entropy

    return make


class Case(NamedTuple):
    """A model and how its steps run.

    Attributes:
        make: returns the model, a batch and the loss.
        ways: how a step runs, with an estimate in seconds: to compile two steps takes most of it.
        autocast: whether forward passes run in bfloat16.
        passes: whether K backward passes are timed too.
    """

    make: Callable[[torch.device], tuple]
    ways: dict[str, float]
    autocast: bool = False
    passes: bool = False


EAGER, CAPTURED, COMPILED, BY_BLOCK = "eager", "captured", "compiled", "compiled by block"
QUICK = {EAGER: 0.0, CAPTURED: 0.0}
CASES = {
    "tiny GPT, 64 x 128": Case(
        of_text(256, 128, 256, 4, 4, batch=64), QUICK | {COMPILED: 30.0}, passes=True
    ),
    "GPT-2 small, 8 x 1024": Case(
        of_text(50304, 1024, 768, 12, 12, batch=8), QUICK | {BY_BLOCK: 30.0}, autocast=True
    ),
    "ResNet-18, 64 x 32^2": Case(
        of_images(ResNet18, 64, 32), QUICK | {COMPILED: 50.0}, passes=True
    ),
    "GPT-2 small, 16 x 1024": Case(
        of_text(50304, 1024, 768, 12, 12, batch=16), QUICK | {BY_BLOCK: 30.0}, autocast=True
    ),
    "ResNet-50, 64 x 224^2": Case(
        of_images(ResNet50, 64, 224), QUICK | {COMPILED: 100.0}, autocast=True
    ),
}
SMALL = {
    "GPT": Case(of_text(16, 8, 16, 2, 1, batch=16), {EAGER: 0.0, BY_BLOCK: 0.0}, passes=True),
    "convolutions": Case(of_images(lambda: ResNet50((1,), 4, 10), 16, 16), {EAGER: 0.0}),
}
CLUSTERED, PASSES = "one_backward", "microbatch"  # modes of GradQueue; None: the plain step
Made = tuple[nn.Module, Tensor, Tensor, Callable]


def training_step(made: Made, autocast: bool, way: str, mode: str | None) -> Step:
    """Return a training step with SGD, which zeroes gradients, computes them and updates."""
    model, inputs, targets, loss = made
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    holders: list[Any] = [optimizer]
    backward: Callable[[Tensor], None] = Tensor.backward
    if mode is not None:
        queue = GradQueue(model, n_clusters=CLUSTERS, features="features", mode=mode)
        queue.attach(optimizer)
        holders.append(queue)
        if mode == PASSES:
            loss, backward = loss_of, queue.backward
    device = inputs.device.type
    backend = "inductor" if device == "cuda" else "aot_eager"  # the other takes a minute on a CPU
    run = torch.compile(model, backend=backend) if way == COMPILED else model
    if way == BY_BLOCK:
        blocks: Any = model.blocks
        for block in blocks:
            block.compile(backend=backend)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            value = loss(run(inputs), targets)
        backward(value)
        optimizer.step()

    taken = cuda_graph(step, *holders) if way == CAPTURED else step
    for _ in range(FILL):
        taken()
    return taken


def clusters(run: Run) -> None:
    """Time a step with clusters against the plain one, eager and captured, and its memory."""
    for way in (EAGER, CAPTURED):  # all eager steps come first
        for name, case in cases(run):
            if way in case.ways:
                _clusters(run, name, case, way)


def compiled(run: Run) -> None:
    """Time compiled steps: they come late, for to compile them takes minutes."""
    for name, case in cases(run):
        for way in (COMPILED, BY_BLOCK):
            if way in case.ways:
                torch.compiler.reset()  # or torch compiles for any batch, after one of another size
                _clusters(run, name, case, way)


def cases(run: Run) -> list[tuple[str, Case]]:
    """Return the models of a run by name."""
    return list((SMALL if run.small else CASES).items())


def _clusters(run: Run, name: str, case: Case, way: str) -> None:
    label = f"{name}, K = {CLUSTERS}, {way}"
    modes = {"plain": None, OURS: CLUSTERED}
    with run.case("clusters", label, case.ways[way]) as begins:
        if begins:
            timed = modes | ({"K passes": PASSES} if way == EAGER and case.passes else {})
            torch.manual_seed(0)
            model, *rest = case.make(run.device)
            twins = {step: copy.deepcopy(model) for step in timed}
            steps = {
                step: training_step((twins[step], *rest), case.autocast, way, mode)
                for step, mode in timed.items()
            }
            run.compare("clusters", label, steps)
            del steps, model, twins
    if way == EAGER and not run.small:
        with run.case("memory", label) as begins:
            if begins:
                sizes = {step: [peak(case, run.device, mode)] for step, mode in modes.items()}
                run.note("memory", label, "MiB", sizes)


def peak(case: Case, device: torch.device, mode: str | None) -> float:
    """Return the peak memory of a step in MiB, with nothing else on the device."""
    step = training_step(case.make(device), case.autocast, EAGER, mode)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**20


def launched(run: Run) -> None:
    """Count what a step launches. This part is the last: a profiler may slow what follows."""
    if run.small:
        return  # on a CPU nothing is launched
    for name, case in cases(run)[:3]:
        with run.case("launches", name) as begins:
            if begins:
                for step, mode in {"plain": None, OURS: CLUSTERED}.items():
                    taken = training_step(case.make(run.device), case.autocast, EAGER, mode)
                    line = Line("launches", name, step, "launches", median=launches(taken))
                    run.lines.append(line)


def kmeans(run: Run) -> None:
    """Time ten iterations of k-means against a loop of plain torch that does no more than that."""
    for batch, width in ((64, 8),) if run.small else ((128, 64), (64, 512), (2048, 768)):
        case = f"{batch} x {width}, K = {CLUSTERS}"
        with run.case("k-means", case) as begins:
            if not begins:
                continue
            x = torch.randn(batch, width, device=run.device)
            ours = KMeans(CLUSTERS, max_iter=10, tol=0.0)
            ours.fit(x)

            def rival(x: Tensor = x) -> None:
                centers = x[:CLUSTERS]
                for _ in range(10):
                    labels = torch.cdist(x, centers).argmin(dim=1)
                    members = nn.functional.one_hot(labels, CLUSTERS).to(x)
                    centers = members.T @ x / members.sum(dim=0).clamp(min=1)[:, None]

            steps = {"plain torch": rival, OURS: lambda ours=ours, x=x: ours.fit(x)}
            run.compare("k-means", case, steps)


def kernels(run: Run) -> None:
    """Time the kernels of ``benchmarks/kernels.py``: a weight's gradient, biases, norms."""
    if run.small:
        return  # the interpreter takes minutes
    # The module of that name is the package's folder of kernels, where that is on the path.
    spec = importlib.util.spec_from_file_location(
        "benchmark_kernels", Path(__file__).with_name("kernels.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, build in module.CASES.items():
        with run.case("kernels", name) as begins:
            if not begins:
                continue
            made = build(run.device)
            for ours, rival in made.pairs:
                both = {name: made.steps[name] for name in (rival, ours)}
                for step in both.values():
                    run.taken(step, 3)
                run.compare("kernels", made.shape, both, calls=10)


def hook(run: Run) -> None:
    """Time a step with the DDP hook: one NCCL rank, and two gloo ranks that share the GPU."""
    for backend, ranks in (("gloo", 1),) if run.small else (("nccl", 1), ("gloo", 2)):
        case = f"ResNet-50, 64 images, {backend}, {ranks} rank{'s' * (ranks > 1)}"
        with run.case("hook", case) as begins, tempfile.TemporaryDirectory() as folder:
            if not begins:
                continue
            file = Path(folder, "times.json")
            spawn(ranks, hook_times, backend, str(run.device), str(file), run.turns, timeout=180.0)
            rival, ours = json.loads(file.read_text())
            run.note("hook", case, "ms", {"plain DDP": rival, OURS: ours})


def hook_times(rank: int, backend: str, device: str, file: str, turns: int) -> None:
    """Write the milliseconds of steps with and without the hook, from one rank of some."""
    group = dist.new_group(backend=backend)
    assert isinstance(group, dist.ProcessGroup)
    torch.manual_seed(0)
    small = device == "cpu"
    model = (ResNet50((1,), 4, 10) if small else ResNet50()).to(device)
    side = 16 if small else 224
    batch = torch.randn(64, 3, side, side, device=device), torch.randint(10, (64,), device=device)
    steps = [make_step(copy.deepcopy(model), options, batch, group)[0] for options in (None, {})]
    for step in steps:
        for _ in range(FILL):
            step()
    times = 1000 * in_turns(steps, turns)
    if rank == 0:
        Path(file).write_text(json.dumps(times.T.tolist()))


PARTS = {
    "check": check, "optimizers": optimizers, "clusters": clusters, "k-means": kmeans,
    "kernels": kernels, "hook": hook, "compiled": compiled, "launches": launched,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=340.0, help="nothing begins after them")
    parser.add_argument("--turns", type=int, help="turns of each comparison: 9, without a GPU 2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", default="gpu.csv", help="the file of the results")
    args = parser.parse_args()
    device = torch.device(args.device)
    small = device.type == "cpu"
    turns = args.turns or (2 if small else 9)
    begin = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - begin:4.0f} s  {text}", file=sys.stderr, flush=True)

    run = Run(device, args.seconds, turns, small, tell)
    if run.small:
        torch.set_num_threads(1)
    # A kernel that never ends: the parts before it are in the file.
    faulthandler.dump_traceback_later(args.seconds + 120, exit=True)
    try:
        for part in args.parts:
            PARTS[part](run)
            Path(args.csv).write_text(as_csv(run.lines, where(device)))
    finally:
        facts = where(device)
        title = ", ".join(facts.values()) + (", reduced form" if small else "")
        console = Console()
        if not console.is_terminal:
            console.width = 200
        console.print(as_table(title, run.lines))
        Path(args.csv).write_text(as_csv(run.lines, facts))
    if run.failures:
        sys.exit("\n".join(["these cases failed:", *run.failures]))


if __name__ == "__main__":
    main()
