"""The device of a study's trials: whether it is there, and how a process prepares for it."""

import os

import torch
from torch.utils import deterministic

from gq_triton.commands.refusal import Refusal

__all__ = ["check_device", "take_device"]


def check_device(device: str, processes: int) -> None:
    """Refuse a device that this machine does not have.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        processes: number of processes that share a trial; each needs a GPU of its own.

    Raises:
        Refusal: this machine has too few GPUs.
    """
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus < processes:
        needed = "a GPU" if processes == 1 else f"a GPU for each of {processes} processes"
        raise Refusal(f"--device cuda needs {needed}, and this machine has {gpus}")


def take_device(device: str, number: int) -> None:
    """Prepare this process, once: one thread, and on a GPU the same bits in every run.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        number: number of this process; processes take the GPUs in turn.
    """
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS sums in any order
        torch.use_deterministic_algorithms(True)
        # Deterministic mode also fills every new tensor, which only takes time here.
        deterministic.fill_uninitialized_memory = False  # pyright: ignore  (torch has no stub)
