"""The place of a process in a run: its rank, its device, and its exchange with the others."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from gq_triton.commands.refusal import Refusal

__all__ = ["Place", "launch_id"]


def launch_id() -> str | None:
    """Return a name of this launch, which its restarts share; None without torchrun.

    It is the name of the job, ``--rdzv-id`` (``--standalone`` makes up a new one). A job without a
    name has the folder that torchrun's agent made for its logs.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is not None and name != "none":
        return name
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_0/LOCAL_RANK/error.json
    return str(Path(report).parents[2]) if report else None


@dataclass(frozen=True)
class Place:
    """The place of this process in a run.

    Args:
        rank: number of this process among all.
        world: number of all processes.
        local_rank: number of this process among those on its machine.
        local_world: number of processes on this machine.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def find(cls) -> "Place":
        """Return the place that torchrun's environment variables name; alone without them."""
        names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)
        return cls(*(int(os.environ.get(name, alone)) for name, alone in names))

    def connect(self) -> None:
        """Join the default process group: gloo for the host, NCCL for GPUs if there are any."""
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        store = self._store()
        if store is None:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)

    def _store(self) -> Store | None:
        """Return the store in which the ranks find each other's addresses; None: torch makes it.

        In torch 2.13 ranks that torchrun restarts share the store of the ranks that died, and would
        connect to the addresses of the dead. On one machine the number of the attempt keeps them
        apart. The agents of several machines count their attempts differently; there
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives restarted ranks a new store.
        """
        env = os.environ
        if "RANK" not in env:
            return HashStore()
        if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or self.world != self.local_world:
            return None
        store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), self.world, is_master=False)
        return PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store)

    def device(self, name: str) -> torch.device:
        """Return this rank's device.

        Args:
            name: ``"cpu"``, ``"cuda"``, or ``"auto"``: a GPU if this machine has one for each of
                its ranks, else the CPU.

        Raises:
            Refusal: there are too few GPUs.
        """
        gpus = torch.cuda.device_count()
        if name == "cuda" and gpus < self.local_world:
            raise Refusal(
                f"--device cuda needs a GPU per process, and this machine has {gpus} for "
                f"{self.local_world}: use --device cpu"
            )
        if name == "cpu" or gpus < self.local_world:
            return torch.device("cpu")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every rank, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return rank 0's ``function(*args)`` on every rank, or raise its Refusal on every rank."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = function(*args)
            except Refusal as reason:
                answer[1] = str(reason)
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
        if answer[1] is not None:
            raise Refusal(answer[1])
        return answer[0]

    def on_all(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``; if any rank refuses, all raise the first rank's Refusal."""
        result = refusal = None
        try:
            result = function(*args)
        except Refusal as reason:
            refusal = str(reason)
        for reason in self.gather(refusal):
            if reason is not None:
                raise Refusal(reason)
        return result
