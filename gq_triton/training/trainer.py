"""The steps of a run under DistributedDataParallel."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gq_triton.dist import register
from gq_triton.training.parts import Parts
from gq_triton.training.place import Place
from gq_triton.training.saved import FORMAT

__all__ = ["Trainer"]

Batches = Callable[[int, int, int, int], list[Tensor]]
MEASURES = "mean_weight", "norm_ratio", "saturated_high", "saturated_low", "effective_length"


class Trainer:
    """One rank of a run: model, optimizer and queue, and the steps they take.

    Args:
        parts: what the run is made of; DDP wraps the model here.
        place: this process among all.
        device: device of this process.
        batches: function of ``(samples, batch_size, seed, epoch)`` that returns the indices of
            every global batch.
    """

    def __init__(self, parts: Parts, place: Place, device: torch.device, batches: Batches) -> None:
        self._batches = batches
        self.settings, self.place, self.device = parts.settings, place, device
        self.optimizer, self.model = parts.optimizer, parts.model
        self.train_set = tuple(tensor.to(device) for tensor in parts.task.train)
        self.test_set = tuple(tensor.to(device) for tensor in parts.task.test)
        self.epoch_steps = math.ceil(len(self.train_set[1]) / self.settings["batch_size"])
        self.steps = self.epoch_steps * self.settings["epochs"]
        self.step = self.skipped = 0
        self.ddp = DistributedDataParallel(
            self.model, device_ids=[device] if device.type == "cuda" else None
        )
        self.state = register(self.ddp, **parts.queue_options)
        self._settle_buckets()
        # Each rank draws its own dropout.
        torch.manual_seed((self.settings["seed"] << 32) + (1 << 31) + place.rank)

    def _settle_buckets(self) -> None:
        """Run one backward pass that leaves no trace, so that DDP has its final buckets.

        DDP's first pass orders the parameters differently from all later passes. With three ranks
        or more, a gradient's place in its bucket decides in which order the ranks are summed. The
        first step of a resumed run is reduced in the buckets of the saved run's last step. This
        pass comes before the first step, so that the first step, too, has the final buckets and
        its checkpoint resumes exactly.
        """
        empty = copy.deepcopy(self.state.state_dict())
        # With clusters a sample for each: fewer are warned of.
        inputs, labels = (tensor[: self.settings["n_clusters"] or 1] for tensor in self.train_set)
        loss = F.cross_entropy(self.ddp(inputs), labels)
        self.state.record_loss(loss.detach())
        loss.backward()
        self.optimizer.zero_grad()
        self.state.load_state_dict(empty)

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint; every rank must call this."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "format": FORMAT,
            "settings": self.settings,
            "world_size": self.place.world,
            "step": self.step,
            "skipped": self.skipped,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "queue": self.state.state_dict(),
            "random": self.place.gather({"cpu": torch.get_rng_state(), "cuda": cuda}),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint, of which ``build`` has loaded the model and the optimizer."""
        self.step, self.skipped = saved["step"], saved["skipped"]
        self.state.load_state_dict(saved["queue"])
        if saved["world_size"] != self.place.world:
            return
        random = saved["random"][self.place.rank]
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda" and random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"], self.device)

    def train_step(self, indices: Tensor) -> dict[str, Any]:
        """Take one step and return its row.

        Args:
            indices: of the global batch ``(B,)``; each of W ranks takes every W-th sample.
        """
        lr = self.settings["lr"] * (1 + math.cos(math.pi * self.step / self.steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs, labels = (t[indices[self.place.rank :: self.place.world]] for t in self.train_set)
        total = F.cross_entropy(self.ddp(inputs), labels, reduction="sum")
        # DDP averages over ranks, whose shares may differ by a sample: with this factor the
        # average is the mean over the global batch. With clusters the state counts the samples.
        share = total.detach() * (self.place.world / len(indices))
        clustered = self.settings["n_clusters"] is not None
        factor = 1 / len(labels) if clustered else self.place.world / len(indices)
        self.state.record_loss(share)
        self.optimizer.zero_grad()
        (total * factor).backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        # The reduced gradient is the same everywhere: all ranks skip or none.
        skipped = not bool(torch.isfinite(norm))
        if not skipped:
            self.optimizer.step()
        mean_loss = share / self.place.world
        dist.all_reduce(mean_loss)
        measured = self.state.metrics()
        self.step += 1
        self.skipped += skipped
        return {
            "kind": "step",
            "step": self.step,
            "epoch": (self.step - 1) // self.epoch_steps + 1,
            "loss": mean_loss.item(),
            "lr": lr,
            "grad_norm": norm.item(),
            **{name: measured[name] for name in MEASURES},
            **({"cluster_sizes": measured["cluster_sizes"]} if clustered else {}),
            "skipped": skipped,
        }

    def batches_left(self, epoch: int) -> list[Tensor]:
        """Return the indices of the global batches that an epoch, counted from 0, has left."""
        samples, settings = len(self.train_set[1]), self.settings
        order = self._batches(samples, settings["batch_size"], settings["seed"], epoch)
        return order[self.step - epoch * self.epoch_steps :]

    def evaluate(self) -> dict[str, Any]:
        """Return an epoch's row: loss and accuracy over both whole sets."""
        row = {"kind": "epoch", "step": self.step, "epoch": self.step // self.epoch_steps}
        for name, data in (("train", self.train_set), ("test", self.test_set)):
            row[f"{name}_loss"], row[f"{name}_accuracy"] = self._score(*data)
        return row | {"skipped": self.skipped}

    @torch.no_grad()
    def _score(self, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        mine = slice(self.place.rank, None, self.place.world)
        self.model.eval()
        logits = self.model(inputs[mine])
        self.model.train()
        loss = F.cross_entropy(logits, labels[mine], reduction="sum")
        right = (logits.argmax(dim=1) == labels[mine]).sum()
        totals = torch.stack([loss.double(), right.double()])
        dist.all_reduce(totals)
        loss_mean, accuracy = (totals / len(labels)).tolist()
        return loss_mean, accuracy
