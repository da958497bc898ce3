"""Count and time the host's part of a step, which bounds small models on a GPU. No GPU is needed.

    python benchmarks/host.py
    git worktree add --detach /tmp/before HEAD~20 && python benchmarks/host.py --against /tmp/before

Kernels are launched without effect. A clustered step runs on the meta device, where torch computes
nothing; an optimizer's step runs on tiny tensors in the memory of the CPU, whose addresses it
compares. Two figures of each case are printed:

- *calls*: of the package's own functions, and of functions in C that these call. They do not depend
  on the machine or its load.
- *us*: the processor time of a step, the least of several; with clusters what it takes more than a
  plain step. What torch does on the meta device alone is left out.

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
import time
from collections.abc import Callable
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

    What torch does there in Python it does not do on a GPU.

    Args:
        size: what is read for each number; older code reads the clusters' sizes.
    """
    import torch
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode

    class Meta(TorchDispatchMode):
        spent = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            start = time.process_time()
            try:
                answer = self.answer(func.__name__.partition(".")[0], args, kwargs or {})
                return func(*args, **(kwargs or {})) if answer is None else answer
            finally:
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
    import gq_triton

    without_launches()
    package = os.path.dirname(gq_triton.__file__) + os.sep
    if "tensors" in case:
        step = optimizer_step(case.partition(",")[0])
        for _ in range(7):  # the queue is full, and the plan is made
            step()
        return own_calls(step, package), least(step, None, 200)
    meta = meta_device(SAMPLES[case] // CLUSTERS)
    with without_autocast(), meta:
        seconds = []
        for clusters in (0, CLUSTERS):
            step = training_step(case, clusters)
            step()
            step()
            seconds.append(least(step, meta, REPEATS))
        return own_calls(step, package), seconds[1] - seconds[0]


def measured(case: str, checkout: Path) -> tuple[int, float]:
    """Return ``measure(case)`` of the package in a checkout, in a process of its own."""
    known = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE), "--case", case]
    done = subprocess.run(command, env=known, check=True, capture_output=True, text=True)
    calls, seconds = json.loads(done.stdout.splitlines()[-1])
    return calls, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--against", type=Path, help="another checkout, for instance an older one")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        sys.stdout.write(json.dumps(measure(args.case)) + "\n")
        return
    before = ["calls before", "us before", "ratio of calls", "of us"] if args.against else []
    table = Table(*["step", "calls", "us", *before])
    for case in args.cases:
        calls, seconds = measured(case, HERE.parents[1])
        row = [case, str(calls), f"{1e6 * seconds:.0f}"]
        if args.against:
            others, took = measured(case, args.against.resolve())
            row += [str(others), f"{1e6 * took:.0f}"]
            row += [f"{calls / others:.2f}", f"{seconds / took:.2f}"]
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
