"""The rules of a run's checkpoint, which are checked before anything in it is used."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gq_triton.dist import GradQueueState
from gq_triton.saved.rules import (
    Also,
    Exactly,
    Integer,
    ListOf,
    Maybe,
    Number,
    Record,
    Rule,
    Text,
    check,
)
from gq_triton.saved.tensors import GeneratorState, TensorLike
from gq_triton.training.options import settings_rule

__all__ = ["FORMAT", "check_content", "check_form"]

FORMAT = 1  # of the checkpoints
_WHAT = "the checkpoint"
# Options that torch's optimizers need for a step; the other options have defaults.
_NEEDED = "lr", "momentum", "dampening", "weight_decay", "betas", "eps"


def check_form(saved: Any, step: int, tasks: Collection[str]) -> None:
    """Raise a ValueError that says why a file does not hold the checkpoint of a run.

    Args:
        saved: content of the file.
        step: number of steps done, from the file's name.
        tasks: names of the tasks.
    """
    random = Record({"cpu": GeneratorState(), "cuda": Maybe(_CudaState())})
    rules: dict[str, Rule] = {
        "format": Exactly(FORMAT),
        "settings": settings_rule(tasks),
        "world_size": Integer(1),
        "step": Exactly(step),
        "skipped": Integer(0, step),
        "model": Record({}),
        "optimizer": Record({}),
        "queue": Record({}),
        "random": ListOf(random),
        "seconds": Number(0),
        "launch": Maybe(Text()),
    }

    def contradicts(content: Mapping[str, Any]) -> str | None:
        ranks, world = len(content["random"]), content["world_size"]
        if ranks != world:
            return f"random must have an entry for each of the {world} of world_size, got {ranks}"
        return None

    check(saved, Also(Record(rules), contradicts), _WHAT)


class _CudaState:
    """The saved state of a GPU's generator; ``check_content`` checks its bytes, on a GPU."""

    def problems(self, value: Any, path: str) -> Any:
        """Yield a problem unless the value is a vector of bytes."""
        return TensorLike((None,), (torch.uint8,)).problems(value, path)


def check_content(
    saved: Mapping[str, Any],
    steps: int,
    model: nn.Module,
    optimizer: Optimizer,
    state: GradQueueState,
    device: torch.device,
) -> None:
    """Raise a ValueError that says why a run with these parts cannot continue a checkpoint.

    Args:
        saved: a checkpoint of the right form.
        steps: number of steps of the whole run.
        model: the model that the settings build.
        optimizer: the optimizer, which has not taken a step.
        state: a state of the DDP hook with the settings' options.
        device: device of this process.
    """
    updates = saved["step"] - saved["skipped"]
    random = Record({"cuda": Maybe(GeneratorState(device))} if device.type == "cuda" else {})
    tensors: dict[str, Rule] = {
        name: TensorLike(tuple(value.shape), (value.dtype,))
        for name, value in model.state_dict().items()
    }
    clustered = saved["settings"]["n_clusters"] is not None
    queue = {"clusters": ListOf(Record({}), length=saved["world_size"])} if clustered else {}
    rules: dict[str, Rule] = {
        "step": Integer(0, steps),
        "model": Record(tensors, unknown="that this model lacks", named=False),
        "optimizer": _optimizer_rule(optimizer, saved["settings"]["lr"], updates),
        "queue": Also(Record(queue), lambda found: _foreign_clusters(found, clustered)),
        "random": ListOf(random),
    }
    check(saved, Record(rules), _WHAT)
    state.check_saved(saved["queue"], saved["step"], every_rank=True)


def _foreign_clusters(queue: Mapping[str, Any], clustered: bool) -> str | None:
    if "clusters" in queue and not clustered:
        return "queue has clusters, and n_clusters of settings is None"
    return None


def _optimizer_rule(optimizer: Optimizer, lr: float, updates: int) -> Rule:
    """Return the rule of the saved state of torch's SGD or AdamW after a number of updates.

    Every update has moved every parameter.
    """
    (fresh,) = optimizer.state_dict()["param_groups"]
    (group,) = optimizer.param_groups
    options: dict[str, Rule] = {
        name: Exactly(value) for name, value in fresh.items() if not isinstance(value, torch.Tensor)
    }
    options["lr"] = Number(0, lr)
    needed = {name: rule for name, rule in options.items() if name in (*_NEEDED, "params")}
    states: dict[int, Rule] = {}
    for number, param in enumerate(group["params"]):
        twin = TensorLike(tuple(param.shape), (param.dtype,))
        positive = TensorLike(tuple(param.shape), (param.dtype,), low=0)
        count = TensorLike((), (torch.float32,), low=updates, high=updates, finite=True)
        if "betas" in group:
            rules: dict[str, Rule] = {"step": count, "exp_avg": twin, "exp_avg_sq": positive}
            states[number] = Record(rules)
        elif group["momentum"] != 0:
            states[number] = Record({"momentum_buffer": twin})
    # SGD without momentum has no state; whatever some versions of torch save for it is not read.
    unknown = "that has no place after this many updates" if states else None
    state = Record(states if updates else {}, unknown=unknown)
    return Record({"state": state, "param_groups": ListOf(Record(needed, options), length=1)})
