"""Train with Grad Queue under DistributedDataParallel, in one process or in those of torchrun.

torchrun --nproc-per-node=2 launch/train.py --task digits --out runs/first
torchrun --nproc-per-node=2 launch/train.py --resume runs/first
"""

import gc
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gq_triton.commands.refusal import Refusal
from gq_triton.extras import how_to_install
from gq_triton.tasks import TASKS, batches
from gq_triton.training.folder import METRICS, load_own, load_saved, make_folder
from gq_triton.training.loop import fit, result, summarise
from gq_triton.training.metrics import continue_metrics
from gq_triton.training.options import parse_options
from gq_triton.training.parts import build
from gq_triton.training.place import Place
from gq_triton.training.trainer import Trainer

# Everything that can be refused is refused before anything is written.


def parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the options that were given, among them one folder."""
    given = parse_options(argv, TASKS)
    if ("out" in given) == ("resume" in given):
        raise Refusal("name one folder: --out DIR for a new run, or --resume DIR to continue one")
    return given


def run(place: Place, argv: Sequence[str] | None) -> int:
    """Train, and return the exit status; 1 if the ranks' queues differ at the end."""
    given = place.on_all(parse, argv)
    device = place.on_all(place.device, given.get("device", "auto"))
    out: Path = given["resume"] if "resume" in given else given["out"]
    load = load_saved if "resume" in given else load_own
    saved, damaged = place.from_first(load, out, [*TASKS])
    if device.type == "cpu":
        # More threads gain nothing on models this small, and results must not depend on the cores.
        torch.set_num_threads(1)
    else:
        # Two runs are the same only where no kernel adds in the order of arrival.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    parts = place.on_all(build, given, saved, place.world, device, TASKS)
    place.on_all(make_folder, out)

    from gq_triton.training.terminal import Terminal  # needs rich, which `parse` has looked for

    trainer = Trainer(parts, place, device, batches)
    first = place.rank == 0
    terminal = Terminal(parts.settings["epochs"], trainer.steps, quiet=not first)
    if saved is not None:
        trainer.load_state_dict(saved)
        if saved["world_size"] != place.world:
            terminal.note(
                f"continuing with {place.world} processes instead of {saved['world_size']}: the "
                "same up to rounding and dropout, not bit for bit"
            )
    if first:
        for path in damaged:
            path.rename(path.with_name(path.name + ".damaged"))
            terminal.note(f"{path} is damaged: continuing from step {trainer.step} instead")
        if saved is not None:
            continue_metrics(out / METRICS, trainer.step)
    every = given.get("checkpoint_every", trainer.epoch_steps)
    with terminal:
        seconds = fit(trainer, out, every, saved["seconds"] if saved else 0.0, terminal)
    summary = summarise(trainer, out, seconds)
    if first:
        terminal.finish(result(summary, out))
    return 0 if len(set(summary["queue_digest"])) == 1 else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script on this rank, and return its exit status."""
    place = Place.find()
    needed = "numpy", "rich", "matplotlib", "sklearn"
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:  # checked before the ranks connect, which needs numpy
        if place.rank == 0:
            reason = f"{', '.join(missing)} not installed: {how_to_install('train')}"
            print(f"train.py: {reason}", file=sys.stderr, flush=True)
        return 2
    place.connect()
    try:
        code = run(place, argv)
    except Refusal as reason:
        if place.rank == 0:
            print(f"train.py: {reason}", file=sys.stderr, flush=True)
        code = 2
    except SystemExit:  # --help
        code = 0
    except KeyboardInterrupt:
        if place.rank == 0:
            print("stopped; --resume continues from the last checkpoint", flush=True)
        os._exit(130)  # the other ranks may have stopped anywhere, so no barrier can be waited for
    # gloo's threads must be gone on all ranks before one exits, and DDP's reducer before gloo.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
