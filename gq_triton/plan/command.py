"""The command ``gq-triton plan``: what Grad Queue costs a model on 1 to 16 384 GPUs."""

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from gq_triton.commands.files import check_folder, whole_file
from gq_triton.commands.refusal import Parser, Refusal
from gq_triton.extras import how_to_install
from gq_triton.plan.machine import Machine, calibrate
from gq_triton.plan.picture import draw
from gq_triton.plan.report import recommendation, rows, table
from gq_triton.plan.shapes import Shapes, load
from gq_triton.plan.ways import WAYS, Cost, Setup, cost

__all__ = ["main"]

_LARGEST = 16384
_ABOUT = """\
Predict what Grad Queue costs a model on 1 to 16 384 GPUs: memory per GPU, bytes sent,
communication that nothing hides, and time of a step. MODEL is package.module:function, which
returns the model, or a configuration of Transformers: a file, its folder, a model type such as
gpt2, or a name on the hub. It is built on the meta device: nothing is downloaded but a
configuration. Speeds are those of 8 H100s per node from data sheets, not measured, unless you give
yours or --calibrate measures them here. Written to --out: plan.txt, plan.csv (every number of GPUs)
and plan.png.
"""
_TOKENS = 8192
# Data sheets of an H100 SXM: memory 3350 GB/s, NVLink 450 GB/s and 8 x 50 GB/s of network per node
# in each direction, less about a tenth.
_SPEEDS = {
    "--memory": (3000, "GB/s that a copy on one GPU reads and writes"),
    "--link": (400, "GB/s: bus bandwidth of an all-reduce in a node, as nccl-tests prints it"),
    "--network": (360, "GB/s: the same over several nodes"),
    "--latency": (10, "microseconds of a message between two GPUs"),
    "--capacity": (56, "GiB per GPU for parameters, gradients, optimizer state and queue"),
    "--tflops": (400, "TFLOP/s of forward and backward pass on one GPU"),
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Args:
        argv: the words after ``gq-triton plan``.
    """
    try:
        given = _read(argv)
        shapes = load(given.model)
        machine, source = _machine(given, shapes)
    except Refusal as reason:
        sys.stderr.write(f"gq-triton plan: {reason}\n")
        return 2
    setup = Setup(shapes, given.optimizer, given.queue_length, given.clusters)
    asked = given.world_size
    worlds = sorted({2**n for n in range(int(math.log2(_LARGEST)) + 1)} | {asked})
    costs = [c for world in worlds for c in _costs(setup, machine, world)]
    here = [c for c in costs if c.world == asked]
    title = (
        f"{shapes.name}: {shapes.numel / 1e6:.4g} M parameters, {given.optimizer}, "
        f"L = {setup.length}" + (f", {setup.clusters} clusters per rank" if setup.clusters else "")
    )
    lines = [title, source, "", f"{asked} GPUs, per GPU and step:", table(here, machine), ""]
    lines.append(recommendation(here, setup, machine))
    if setup.clusters:
        lines.append("Times leave out the grouping of samples and of their gradients.")
    return _write(given.out, "\n".join(lines) + "\n", title, costs, machine)


def _costs(setup: Setup, machine: Machine, world: int) -> list[Cost]:
    found = [cost(way, setup, machine, world, queue) for way in WAYS for queue in setup.queues]
    return [c for c in found if c is not None]


def _parser() -> Parser:
    parser = Parser(
        prog="gq-triton plan",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="the model")
    counts = {
        "--world-size": (8, 1, 2**20, "GPUs that the table and the recommendation are for"),
        "--gpus-per-node": (8, 1, 1024, "GPUs of a node"),
        "--queue-length": (5, 1, 4096, "L, gradients kept per element"),
        "--clusters": (0, 0, 10**6, "clusters of a rank's samples, 0 for none"),
    }
    for name, (default, low, high, text) in counts.items():
        parser.add_argument(name, type=_count(low, high), default=default, metavar="N",
                            help=f"{text} (default: {default})")  # fmt: skip
    parser.add_argument(
        "--tokens", type=_count(1, 10**9), metavar="N",
        help="tokens per GPU and step, for 6 FLOP per parameter and token "
        f"(default: {_TOKENS})",
    )  # fmt: skip
    for name, (default, text) in _SPEEDS.items():
        parser.add_argument(name, type=_positive, metavar="X", help=f"{text} (default: {default})")
    parser.add_argument(
        "--compute-ms", type=_positive, metavar="X",
        help="milliseconds of forward and backward pass on one GPU, as you measured them, in place "
        "of --tokens and --tflops",
    )  # fmt: skip
    parser.add_argument(
        "--optimizer", choices=["adamw", "sgd"], default="adamw",
        help="AdamW, or SGD with momentum (default: adamw)",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate", action="store_true",
        help="measure --memory, --link and --latency on this machine's GPUs, or on two ranks of "
        "its CPU",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("plan"), metavar="DIR", help="folder (default: plan)"
    )
    return parser


def _count(low: int, high: int):
    def read(text: str) -> int:
        value = int(text) if text.isdecimal() and len(text) < 12 else -1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"must be an integer from {low} to {high}, got {text!r}"
            )
        return value

    return read


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e12:
        raise argparse.ArgumentTypeError(f"must be a number > 0 and < 1e12, got {text!r}")
    return value


def _read(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options, of which each was checked before any work."""
    given = _parser().parse_args(argv)
    _exclude(given, "--calibrate", "--memory", "--link", "--latency")
    _exclude(given, "--compute-ms", "--tokens", "--tflops")
    given.tokens = given.tokens or _TOKENS
    for name, (default, _) in _SPEEDS.items():
        key = name.removeprefix("--")
        setattr(given, key, getattr(given, key) or default)
    if find_spec("matplotlib") is None:
        raise Refusal(f"the picture needs matplotlib: {how_to_install('train')}")
    check_folder(given.out)
    if given.world_size > given.gpus_per_node and given.world_size % given.gpus_per_node:
        raise Refusal(
            f"--world-size must be whole nodes of --gpus-per-node {given.gpus_per_node}, got "
            f"{given.world_size}"
        )
    return given


def _exclude(given: argparse.Namespace, option: str, *others: str) -> None:
    """Refuse options that another one makes meaningless."""
    if not getattr(given, option.removeprefix("--").replace("-", "_")):
        return
    both = [name for name in others if getattr(given, name.removeprefix("--")) is not None]
    if both:
        raise Refusal(f"{option} takes the place of {' and '.join(both)}: leave one of them out")


def _machine(given: argparse.Namespace, shapes: Shapes) -> tuple[Machine, str]:
    """Return the speeds, and a line that says where they come from."""
    compute = 6 * shapes.numel * given.tokens / (1e12 * given.tflops)
    work = f"{given.tokens} tokens at {given.tflops:g} TFLOP/s"
    if given.compute_ms is not None:
        compute, work = given.compute_ms / 1000, "as given"
    memory, link, network = 1e9 * given.memory, 1e9 * given.link, 1e9 * given.network
    latency, measured = given.latency / 1e6, ""
    if given.calibrate:
        cuda = torch.cuda.is_available()
        found = calibrate(torch.cuda.device_count() if cuda else 2, cuda)
        memory, measured = found.memory, f", memory measured ({found.device})"
        if not math.isnan(found.link):
            link, latency = found.link, found.latency
            measured = f", memory, link and latency measured ({found.device})"
    machine = Machine(
        memory, link, network, latency, given.gpus_per_node, compute, given.capacity * 2**30
    )
    return machine, (
        f"memory {memory / 1e9:.4g} GB/s, link {link / 1e9:.4g}, network {network / 1e9:.4g}, "
        f"latency {1e6 * latency:.3g} us{measured}\n"
        f"forward and backward pass {1000 * compute:.4g} ms ({work})"
    )


def _write(out: Path, text: str, title: str, costs: Sequence[Cost], machine: Machine) -> int:
    """Print the plan, write the files, and return the exit status."""
    sys.stdout.write(text)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "plan.txt": text.encode(),
        "plan.csv": rows(costs).encode(),
        "plan.png": draw(title, costs, machine),
    }
    for name, content in files.items():
        with whole_file(out / name) as file:
            file.write(content)
    sys.stdout.write(f"written to {out}: {', '.join(files)}\n")
    return 0
