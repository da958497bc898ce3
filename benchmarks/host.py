"""Count and time the host's part of a step, which bounds small models on a GPU. No GPU is needed.

    python benchmarks/host.py
    git worktree add --detach /tmp/before HEAD~20 && python benchmarks/host.py --against /tmp/before
    python benchmarks/host.py --instructions --against /tmp/before

Kernels are launched without effect. A clustered step runs on the meta device, where torch computes
nothing; an optimizer's step runs on tiny tensors in the memory of the CPU, whose addresses it
compares. The figures of each case are:

- *calls*: of the package's own functions, and of functions in C that these call. They do not depend
  on the machine or its load.
- *us*: the processor time of a step, the least of several; with clusters what it takes more than a
  plain step. What torch does on the meta device alone is left out. ``--rounds`` says how many
  processes measure it, of which the least counts.
- *instructions*, with ``--instructions``: those that the processor runs in the place of that time,
  in thousands. Valgrind counts them, which takes minutes for a case. No load changes them.

With ``--against`` the same is done with the package in another checkout, in turns, and the ratios
are printed.
"""

import argparse
import contextlib
import cProfile
import gc
import importlib.util
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve()
CASES = ("GQAdamW, 148 tensors", "GQSGD, 148 tensors", "tiny GPT", "GPT-2 small", "ResNet-18")
SAMPLES = {"tiny GPT": 128, "GPT-2 small": 16, "ResNet-18": 64}
CLUSTERS = 8
REPEATS = 7


def without_launches() -> None:
    """Have Triton's interpreter run no kernel."""
    from triton.runtime import interpreter

    interpreter.InterpretedFunction.__getitem__ = lambda self, grid: _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def of_bench(name: str) -> Any:
    """Return a module of ``gq_triton.bench``, whatever checkout is measured: models and shapes."""
    file = HERE.parents[1] / "gq_triton" / "bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def optimizer_step(name: str) -> Callable[[], Any]:
    """Return a step of an optimizer for the shapes of GPT-2 small, each dimension at most 4."""
    import torch

    import gq_triton

    params = []
    for shape in of_bench("shapes").MODELS["gpt2"]():
        params.append(torch.nn.Parameter(torch.zeros([min(size, 4) for size in shape])))
        params[-1].grad = torch.zeros_like(params[-1])
    options = {"momentum": 0.9} if name == "GQSGD" else {}
    return getattr(gq_triton, name)(params, lr=0.1, backend="triton", **options).step


def training_step(case: str, clusters: int) -> Callable[[], None]:
    """Return a training step on the meta device, with clusters unless their number is 0."""
    import torch
    from torch import nn

    from gq_triton import GradQueue
    from gq_triton.tasks.text import CausalTransformer

    sizes = {"tiny GPT": (2, 64, 2, 256, 32), "GPT-2 small": (12, 768, 12, 50304, 1024)}
    with torch.device("meta"):
        if case == "ResNet-18":
            model, features = of_bench("models").ResNet18(), "features"
            batch = torch.zeros(SAMPLES[case], 3, 32, 32)
            target = torch.zeros(SAMPLES[case], dtype=torch.int64)
        else:
            layers, width, heads, vocabulary, length = sizes[case]
            model = CausalTransformer(vocabulary, length, width=width, heads=heads, layers=layers)
            features, batch = "norm", torch.zeros(SAMPLES[case], length, dtype=torch.int64)
            target = batch.flatten()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    if clusters:
        queue = GradQueue(model, backend="triton", n_clusters=clusters, features=features)
        queue.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        out = model(batch)
        nn.functional.cross_entropy(out if out.dim() == 2 else out.flatten(0, 1), target).backward()
        optimizer.step()

    return step


def meta_device(size: int) -> Any:
    """Return a context for operations of the meta device, whose time it adds up in ``spent``.

    What torch does there in Python it does not do on a GPU. While its ``counts`` is set, Valgrind
    counts instructions, and not those of these operations.

    Args:
        size: what is read for each number; older code reads the clusters' sizes.
    """
    import torch
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode

    class Meta(TorchDispatchMode):
        spent, counts = 0.0, False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            start = time.process_time()
            if self.counts:
                torch._C._valgrind_toggle()
            try:
                answer = self.answer(func.__name__.partition(".")[0], args, kwargs or {})
                return func(*args, **(kwargs or {})) if answer is None else answer
            finally:
                if self.counts:
                    torch._C._valgrind_toggle()
                self.spent += time.process_time() - start

        def answer(self, name: str, args: Any, kwargs: Any) -> Any:
            """Return what the host reads; None where it reads nothing."""
            first = args[0] if args else None
            if not isinstance(first, Tensor) or first.device.type != "meta":
                return None
            if name == "_local_scalar_dense":
                return 0
            if name == "_to_copy" and str(kwargs.get("device")) == "cpu":
                return torch.full(first.shape, size, dtype=first.dtype)
            if name == "_unique2":
                found = first.new_empty(min(first.numel(), 128))
                return found, torch.empty_like(first), torch.empty_like(found)
            return None

    return Meta()


@contextlib.contextmanager
def without_autocast() -> Any:
    """Hide from ``torch.autocast`` the meta device, which it does not know."""
    import torch

    enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def is_enabled(device: str | None = None) -> bool:
        return False if device == "meta" else enabled(*([] if device is None else [device]))

    def entered(device_type: str, *args: Any, **kwargs: Any) -> Any:
        known = device_type != "meta"
        return autocast(device_type, *args, **kwargs) if known else contextlib.nullcontext()

    with (
        mock.patch.object(torch, "is_autocast_enabled", is_enabled),
        mock.patch.object(torch, "autocast", entered),
    ):
        yield


def own_calls(step: Callable[[], Any], package: str) -> int:
    """Return the calls of the package's functions, and of functions in C that these call."""
    profile = cProfile.Profile()
    profile.runcall(step)
    calls = 0
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # pyright: ignore[reportAttributeAccessIssue]
    for (file, _, _), (_, number, _, _, callers) in stats.items():
        if file == "~":
            number = sum(n for (caller, _, _), (n, *_) in callers.items() if own(caller, package))
        elif not own(file, package):
            number = 0
        calls += number
    return calls


def own(file: str, package: str) -> bool:
    return file.startswith(package) and "/tasks/" not in file


def least(step: Callable[[], Any], meta: Any, repeats: int) -> float:
    """Return the least processor seconds of a step, without those of the meta device."""
    gc.collect()
    gc.disable()
    times = []
    for _ in range(repeats):
        start, spent = time.process_time(), meta.spent if meta else 0.0
        step()
        elsewhere = meta.spent - spent if meta else 0.0
        times.append(time.process_time() - start - elsewhere)
    gc.enable()
    return min(times)


def measure(case: str) -> tuple[int, float]:
    """Return the calls and the least processor seconds of a case."""
    package = prepare()
    if "tensors" in case:
        step = settled(optimizer_step(case.partition(",")[0]))
        return own_calls(step, package), least(step, None, 200)
    meta = meta_device(SAMPLES[case] // CLUSTERS)
    with without_autocast(), meta:
        seconds = []
        for clusters in (0, CLUSTERS):
            step = settled(training_step(case, clusters), 2)
            seconds.append(least(step, meta, REPEATS))
        return own_calls(step, package), seconds[1] - seconds[0]


def count(case: str, clusters: int) -> None:
    """Have Valgrind count the instructions of a step, which began to watch this process."""
    import torch

    prepare()
    with contextlib.ExitStack() as stack:
        if "tensors" in case:
            step = settled(optimizer_step(case.partition(",")[0]))
        else:
            stack.enter_context(without_autocast())
            meta = stack.enter_context(meta_device(SAMPLES[case] // CLUSTERS))
            step = settled(training_step(case, clusters), 2)
            meta.counts = True
        gc.collect()
        gc.disable()
        # Until here Valgrind only runs the program, several times as fast as it counts.
        subprocess.run(["callgrind_control", "-i", "on", str(os.getpid())], check=True)
        torch._C._valgrind_toggle()
        step()
        torch._C._valgrind_toggle()


def prepare() -> str:
    """Have no kernel run; return where the measured package lies."""
    import gq_triton

    without_launches()
    return os.path.dirname(gq_triton.__file__) + os.sep


def settled(step: Callable[[], Any], steps: int = 7) -> Callable[[], Any]:
    """Return a step whose plans are made; that of an optimizer has a full queue besides."""
    for _ in range(steps):
        step()
    return step


def run(checkout: Path, *options: str, before: Sequence[str] = ()) -> str:
    """Return what this file prints with the package of a checkout, in a process of its own."""
    known = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "PYTHONHASHSEED": "0",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [*before, sys.executable, str(HERE), *options]
    return subprocess.run(command, env=known, check=True, capture_output=True, text=True).stdout


def measured(case: str, checkouts: Sequence[Path], rounds: int) -> list[tuple[int, float]]:
    """Return ``measure(case)`` of the package in each checkout, in turns; the least of rounds."""
    found: list[list[tuple[int, float]]] = [[] for _ in checkouts]
    for _ in range(rounds):
        for results, checkout in zip(found, checkouts, strict=True):
            calls, seconds = json.loads(run(checkout, "--case", case).splitlines()[-1])
            results.append((calls, seconds))
    return [min(results, key=lambda one: one[1]) for results in found]


def counted(case: str, checkouts: Sequence[Path]) -> list[int]:
    """Return the instructions of a step with the package in each checkout."""
    plain = 0 if "tensors" in case else _counted(case, checkouts[0], 0)
    return [_counted(case, checkout, CLUSTERS) - plain for checkout in checkouts]


def _counted(case: str, checkout: Path, clusters: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "counts")
        tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
        tool += ["--instr-atstart=no", "--collect-atstart=no"]
        run(checkout, "--count", case, str(clusters), before=tool)
        (line,) = [line for line in out.read_text().splitlines() if line.startswith("totals:")]
        return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--against", type=Path, help="another checkout, for instance an older one")
    parser.add_argument("--rounds", type=int, default=1, help="processes for each time")
    parser.add_argument("--instructions", action="store_true", help="count them with Valgrind")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--count", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        sys.stdout.write(json.dumps(measure(args.case)) + "\n")
        return
    if args.count:
        count(args.count[0], int(args.count[1]))
        return
    checkouts = [HERE.parents[1], *([args.against.resolve()] if args.against else [])]
    figures = ["calls", "us", *(["1000 instructions"] if args.instructions else [])]
    before = [f"{one} {what}" for one in figures for what in ("before", "ratio")]
    table = Table("step", *figures, *(before if args.against else []))
    for case in args.cases:
        lines = [[c, 1e6 * s] for c, s in measured(case, checkouts, args.rounds)]
        if args.instructions:
            for line, number in zip(lines, counted(case, checkouts), strict=True):
                line.append(number / 1000)
        now, *others = lines
        row = [f"{value:.0f}" for value in now]
        for other in others:
            for mine, its in zip(now, other, strict=True):
                row += [f"{its:.0f}", f"{mine / its:.2f}"]
        table.add_row(case, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
