# pyright: basic
"""Training steps on the meta device: what they launch, and what the host reads of the device.

A tensor of the meta device has no values, so nothing is computed, and a step of GPT-2 takes a
second. All that matters to the host is as on a GPU: each operation on a meta tensor stands for a
launch, each value that Python asks for stands for a wait.
"""

import contextlib
import os
import sys
from collections import Counter
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gq_triton
from gq_triton import GradQueue
from gq_triton.grouping import Groups

PACKAGE = os.path.dirname(gq_triton.__file__) + os.sep
# Operations that only make views or allocate memory.
FREE = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach",
    "diagonal", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "new_empty_strided", "permute", "promote_types", "resize_", "select", "set_", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip
# Operations of torch that launch a kernel for each gradient that is asked for, with the place of
# the list that says which: those of a convolution's input, weight and bias; those of a LayerNorm's
# input, and of scale and shift together.
EACH_GRADIENT = {"convolution_backward": 10, "native_layer_norm_backward": 7}
# Operations whose result has a shape that depends on values: the host waits for it.
SHAPED_BY_VALUES = {"masked_select", "nonzero", "repeat_interleave", "unique_consecutive"}


def product_frame() -> str:
    """Return the innermost function of the package that runs: file and name."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE) and "/tasks/" not in file:
            return f"{file.removeprefix(PACKAGE)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "the model"


def on_meta(*values) -> bool:
    """Return whether a tensor of the meta device is among arguments or results."""
    for value in values:
        if isinstance(value, list | tuple):
            if on_meta(*value):
                return True
        elif isinstance(value, Tensor) and value.device.type == "meta":
            return True
    return False


class Watch(TorchDispatchMode):
    """A mode that counts launches, reads by the host, and copies between host and device.

    A read is answered, so that one step shows all reads.

    Attributes:
        launches: by function of the package, the operations and kernels that it launched.
        reads: by function and operation, how often the host read the device.
        copies: by function, how often the host sent numbers to the device.
        kernels: the number of launches, with several for an operation of torch that has several
            (``EACH_GRADIENT``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.reads, self.copies = Counter(), Counter(), Counter()
        self.kernels = 0

    @property
    def total(self) -> int:
        """The number of launches, one for each operation."""
        return self.launches.total()

    def sizes(self, groups: Groups) -> list[int]:
        """Note that the host reads the sizes of clusters; return even ones."""
        self.reads[f"{product_frame()} sizes"] += 1
        return [groups.labels.numel() // groups.n_clusters] * groups.n_clusters

    def kernel(self, *args, **kwargs) -> None:
        """Count a Triton kernel without running it."""
        self.launches[product_frame()] += 1
        self.kernels += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        if on_meta(*args):
            answer = self._answer(name, args, kwargs)
            if answer is not None:
                self.reads[f"{product_frame()} {name}"] += 1
                return answer
        result = func(*args, **kwargs)
        if on_meta(*args, *kwargs.values(), result):
            if name in ("_to_copy", "copy_") and any(_on_cpu(each) for each in args):
                self.copies[product_frame()] += 1
            if name not in FREE:
                self.launches[product_frame()] += 1
                self.kernels += _kernels(name, args)
        return result

    def _answer(self, name, args, kwargs):
        """Return what the host gets where it reads values; None where it reads nothing."""
        first = args[0]
        if name == "_local_scalar_dense":
            return 0
        if name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type == "cpu":
            dtype = kwargs.get("dtype") or first.dtype
            return torch.zeros(first.shape, dtype=dtype, device="cpu")
        if name == "copy_" and first.device.type == "cpu":
            return first.zero_()
        if name in ("_unique2", "_unique"):
            shape = min(first.numel(), 128)
            counts = first.new_empty(shape, dtype=torch.int64)
            return first.new_empty(shape), torch.empty_like(first, dtype=torch.int64), counts
        if name in SHAPED_BY_VALUES or name == "equal":
            raise AssertionError(f"{product_frame()} has the host wait for the result of {name}")
        return None


def _kernels(name: str, args) -> int:
    """Return how many kernels an operation of torch launches, as far as this is known."""
    if name not in EACH_GRADIENT:
        return 1
    first, *others = args[EACH_GRADIENT[name]]
    rest = sum(others) if name == "convolution_backward" else any(others)
    return first + rest


def _on_cpu(value) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() > 0


@contextlib.contextmanager
def watching():
    """Return a context that yields a ``Watch`` of all that runs inside it.

    ``torch.autocast`` does not know the meta device, and launches nothing there.
    """
    from triton.runtime import interpreter

    watch, enabled, autocast = Watch(), torch.is_autocast_enabled, torch.autocast

    def is_enabled(device=None):
        return False if device == "meta" else enabled(*([] if device is None else [device]))

    def entered(device_type, *args, **kwargs):
        known = device_type != "meta"
        return autocast(device_type, *args, **kwargs) if known else contextlib.nullcontext()

    def launch(grid, *args, **kwargs):
        watch.kernel()

    with (
        mock.patch.object(torch, "is_autocast_enabled", is_enabled),
        mock.patch.object(torch, "autocast", entered),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
        mock.patch.object(Groups, "sizes", property(watch.sizes)),
        watch,
    ):
        yield watch


def step_of(model: nn.Module, batch, loss, *, optimizer=None, **options):
    """Return a function that takes one training step, with the plug-in where it has options."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    if options:
        queue = GradQueue(model, backend="triton", **options)
        queue.attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def watched(step, settle: int = 2) -> Watch:
    """Return what a step does after ``settle`` steps, in which buffers and tables are made."""
    with watching():
        for _ in range(settle):
            step()
    with watching() as watch:
        step()
    return watch


def next_symbol(logits: Tensor, symbols: Tensor) -> Tensor:
    """Return the loss of logits ``(B, T, V)``."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), symbols.flatten())


def text_case(layers: int, width: int, heads: int, vocabulary: int, batch: int, length: int):
    """Return a decoder on the meta device, a batch, the loss and the feature layer."""
    from gq_triton.tasks.text import CausalTransformer

    with torch.device("meta"):
        model = CausalTransformer(vocabulary, length, width=width, heads=heads, layers=layers)
        symbols = torch.zeros(batch, length, dtype=torch.int64)
    return model, (symbols, symbols), next_symbol, "norm"


def image_case(batch: int):
    """Return the benchmarks' ResNet-18 on the meta device, a batch, the loss, the feature layer."""
    from gq_triton.bench.models import ResNet18

    with torch.device("meta"):
        model, x = ResNet18(), torch.zeros(batch, 3, 32, 32)
        classes = torch.zeros(batch, dtype=torch.int64)
    return model, (x, classes), nn.functional.cross_entropy, "features"


CASES = {
    "tiny GPT": lambda: text_case(2, 64, 2, 256, 128, 32),
    "GPT-2 small": lambda: text_case(12, 768, 12, 50304, 16, 1024),
    "ResNet-18": lambda: image_case(64),
}


def budget(case: str, clusters: int = 8) -> tuple[Watch, Watch]:
    """Return what a plain and what a clustered step of a case do."""
    model, batch, loss, features = CASES[case]()
    plain = watched(step_of(model, batch, loss), settle=1)
    model, batch, loss, features = CASES[case]()
    step = step_of(model, batch, loss, n_clusters=clusters, features=features)
    return plain, watched(step, settle=1)


def report(case: str) -> str:
    """Return the launches of both steps of a case, and where those with clusters come from."""
    plain, ours = budget(case)
    lines = [
        f"{case}: {plain.total} operations and {plain.kernels} kernels, with clusters {ours.total} "
        f"and {ours.kernels}"
    ]
    lines += [f"  {count:5d} {place}" for place, count in ours.launches.most_common()]
    lines.append(f"  reads {dict(ours.reads)}, copies to the device {dict(ours.copies)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in CASES:
        sys.stdout.write(report(name))
