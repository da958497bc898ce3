"""The parts of a run, built from its settings or from a checkpoint."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gq_triton.commands.refusal import Refusal
from gq_triton.dist import GradQueueState
from gq_triton.training.options import choose_settings
from gq_triton.training.saved import check_content

__all__ = ["Parts", "Task", "build"]

QUEUE_OPTIONS = (
    "n_clusters",
    "features",
    "queue_length",
    "min_queue_length",
    "rho",
    "loss_window",
    "match_norm",
)


class Task(Protocol):
    """A task: data in memory, and a model that fits the data."""

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels to learn from."""
        ...

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels held out."""
        ...

    @property
    def model(self) -> Callable[[], nn.Module]:
        """Function that builds the model, with random numbers of torch's global generator."""
        ...

    @property
    def features(self) -> str:
        """Name of the submodule whose output describes a sample."""
        ...


@dataclass
class Parts:
    """The parts of a run on one rank, before DDP wraps the model."""

    settings: dict[str, Any]
    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    queue_options: dict[str, Any]


def build(
    given: dict[str, Any],
    saved: dict[str, Any] | None,
    world: int,
    device: torch.device,
    tasks: Mapping[str, Callable[[], Task]],
) -> Parts:
    """Return the parts of a run; those of a checkpoint hold what it saved.

    Args:
        given: options of the command line.
        saved: a checkpoint of the right form, or None for a new run.
        world: number of processes that share a batch.
        device: device of this process.
        tasks: functions that load a task, by its name.

    Raises:
        Refusal: an option is not allowed, or the checkpoint does not fit the parts.
    """
    settings = choose_settings(given, None if saved is None else saved["settings"])
    task = tasks[settings["task"]]()
    samples = len(task.train[1])
    if not world <= settings["batch_size"] <= samples:
        raise Refusal(
            f"--batch-size must be at least 1 for each of the {world} processes and at most the "
            f"{samples} training samples, got {settings['batch_size']}"
        )
    torch.manual_seed(settings["seed"])
    model = task.model().to(device)
    options: dict[str, Any] = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
    if settings["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), momentum=settings["momentum"], **options)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    queue_options = {name: settings[name] for name in QUEUE_OPTIONS}
    if settings["n_clusters"] is not None and settings["features"] is None:
        queue_options["features"] = task.features
    try:
        # This state checks the options and the saved queue; ``Trainer`` makes the one that trains.
        # With clusters a state changes the layers of its model, so this one gets a copy.
        state = GradQueueState(copy.deepcopy(model), **queue_options)
    except (ValueError, NotImplementedError) as error:
        raise Refusal(error) from error
    if saved is not None:
        steps = math.ceil(samples / settings["batch_size"]) * settings["epochs"]
        try:
            check_content(saved, steps, model, optimizer, state, device)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            state.load_state_dict(saved["queue"])
        except (ValueError, RuntimeError, KeyError) as error:
            raise Refusal(f"the checkpoint cannot be continued: {error}") from error
    return Parts(settings, task, model, optimizer, queue_options)
