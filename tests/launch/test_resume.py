"""Altered checkpoints, which --resume must refuse unless a run could have written them."""

import copy

import pytest
import torch
import torch.distributed as dist
from altered import REMOVED, check_door, is_dense
from drawn import fuzz_door

from gq_triton.commands.refusal import Refusal
from gq_triton.tasks import TASKS, batches
from gq_triton.training.parts import build
from gq_triton.training.place import Place
from gq_triton.training.saved import check_form
from gq_triton.training.trainer import Trainer

CPU, STEPS = torch.device("cpu"), 2
LR = 0.07


@pytest.fixture
def digits():
    """Yield the tasks by name, with digits loaded once, in a process group of one process."""
    random, task = torch.get_rng_state(), TASKS["digits"]()
    Place.find().connect()
    yield {"digits": lambda: task}
    dist.destroy_process_group()
    torch.set_rng_state(random)


def checkpoint(digits, optimizer):
    place = Place.find()
    given = {"optimizer": optimizer, "epochs": 1, "batch_size": 512}
    trainer = Trainer(build(given, None, 1, CPU, digits), place, CPU, batches)
    for indices in trainer.batches_left(0)[:STEPS]:
        trainer.train_step(indices)
    return copy.deepcopy(trainer.state_dict()) | {"seconds": 1.5, "launch": None}


def is_number(value, low, high=1e300):
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and low <= value <= high


def is_whole(value, low, high):
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


class Possible:
    """The test whether a run of the same model and optimizer could have written a checkpoint.

    Values that a checkpoint holds twice must agree: the step with the file's name, decay and
    momentum with the optimizer, the lengths and the number of processes with the queue.
    """

    def __init__(self, saved):
        self.saved = saved
        self.adamw = saved["settings"]["optimizer"] == "adamw"

    def __call__(self, path, value):
        match path:
            case ("skipped",):
                # AdamW's state counts its updates; SGD's state says that there was one or more.
                return is_whole(value, 0, 0 if self.adamw else STEPS - 1)
            case ("seconds",):
                return is_number(value, 0)
            case ("launch",):
                return value is None or isinstance(value, str)
            case ("settings", name):
                return self.is_setting(name, value)
            case ("model", name):
                return is_dense(value, self.saved["model"][name].shape, (torch.float32,))
            case ("random", *rest):
                own = self.saved["random"][0]["cpu"]
                right = rest == [0, "cpu"] and is_dense(value, own.shape, (torch.uint8,))
                return right and torch.equal(value, own)
            case ("optimizer", *rest):
                return self.is_optimizer(rest, value)
            case ("queue", *rest):
                return self.is_queue(rest, value)
        return False

    def is_optimizer(self, path, value):
        match path:
            case ["state", int() as at, name]:
                own = self.saved["optimizer"]["state"][at][name]
                right = is_dense(value, own.shape, (torch.float32,))
                if name == "step":
                    return right and float(value) == STEPS
                return right and (name != "exp_avg_sq" or not bool((value < 0).any()))
            case ["param_groups", 0, "lr"]:
                return is_number(value, 0, self.saved["settings"]["lr"])
            case ["param_groups", 0, name]:
                needed = "params", "momentum", "dampening", "weight_decay", "betas", "eps"
                own = self.saved["optimizer"]["param_groups"][0][name]
                if value is REMOVED:
                    return name not in needed
                return type(value) is type(own) and value == own
            case ["param_groups", 0, name, int() as at]:
                own = self.saved["optimizer"]["param_groups"][0][name][at]
                return name == "params" and type(value) is type(own) and value == own
        return False

    def is_queue(self, path, value):
        match path:
            case ["queue", name]:
                own = self.saved["queue"]["queue"][name]
                return is_dense(value, own.shape) and bool(value.isfinite().all())
            case ["queued", _]:
                return is_dense(value, (), (torch.int64,)) and 0 <= int(value) <= STEPS
            case ["losses"] | ["options", "loss_window"]:
                return value is None
            case ["buckets"]:
                return value is REMOVED or value == []
            case ["buckets", 0]:
                return value is REMOVED or value == self.saved["queue"]["buckets"][0][:-1]
            case ["buckets", 0, int()]:
                return value is REMOVED
        return False

    def is_setting(self, name, value):
        group = self.saved["optimizer"]["param_groups"][0]
        if name == "lr":
            return is_number(value, group["lr"])
        if name in ("epochs", "batch_size"):
            # The run took two steps of 512 of the 1437 samples, and must have as many steps.
            return is_whole(value, 1, 10**15 if name == "epochs" else 1436)
        if name == "seed":
            return is_whole(value, 0, 2**31 - 1)
        if name == "min_queue_length":
            return is_whole(value, 1, 5)
        if name == "rho":
            return is_number(value, 1, 1e30)
        if name == "match_norm":
            return isinstance(value, bool)
        return name in ("n_clusters", "features", "loss_window") and value is None


def resuming(digits, resumed=None):
    """Return what builds the parts of a run from a checkpoint, as --resume does."""

    def load(content):
        try:
            check_form(content, STEPS, [*digits])
            parts = build({}, content, 1, CPU, digits)
        except Refusal as reason:
            raise ValueError(f"checkpoint: {reason}") from reason
        if resumed is not None:
            resumed[:] = [parts]

    return load


@pytest.mark.rare
@pytest.mark.filterwarnings("ignore:queue_length=1:UserWarning")  # a length that a run may have
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_altered_leaf_of_a_checkpoint_is_refused_or_possible(digits, optimizer):
    saved = checkpoint(digits, optimizer)
    first = next(iter(saved["model"]))

    def where(path):
        """Return whether a leaf is altered here; of leaves that follow one rule only the first is.

        The plug-in's test alters the tensors of the other parameters.
        """
        return not (
            (path[0] == "model" and path[1:] not in ((), (first,)))
            or (path[:2] == ("optimizer", "state") and path[2:3] not in ((), (0,)))
            or (path[:2] in (("queue", "queue"), ("queue", "queued")) and path[2:] != (first,))
            or (path[0] == "queue" and path[1:3] == ("buckets", 0) and path[3:] not in ((), (0,)))
            or (path[-2:-1] == ("params",) and path[-1] > 0)
        )

    load = resuming(digits)
    check_door(saved, load, Possible(saved), lambda: None, lambda: None, where)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:queue_length=1:UserWarning")
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_checkpoint_with_drawn_alterations_is_refused_or_goes_on(digits, name):
    saved = checkpoint(digits, name)
    resumed = []
    load = resuming(digits, resumed)

    def go_on():
        parts = resumed.pop()
        # A copy: torch's optimizers count on in the tensor that was loaded.
        model, optimizer = copy.deepcopy((parts.model, parts.optimizer))
        inputs, labels = (tensor[:4] for tensor in parts.task.train)
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    fuzz_door(saved, load, lambda: None, go_on, examples=80)


def test_a_restart_with_clusters_of_other_ranks_checks_them_too(digits):
    """A run with clusters may go on with another number of processes; its state must be whole."""
    place = Place.find()
    given = {"n_clusters": 2, "epochs": 1, "batch_size": 512}
    trainer = Trainer(build(given, None, 1, CPU, digits), place, CPU, batches)
    trainer.train_step(trainer.batches_left(0)[0])
    saved = trainer.state_dict() | {"seconds": 0.0, "launch": None, "world_size": 2}
    saved["random"] *= 2
    saved["queue"]["clusters"] *= 2
    check_form(saved, 1, [*digits])
    build({}, saved, 1, CPU, digits)
    for settings, clusters, reason in (
        ({"n_clusters": None}, saved["queue"]["clusters"], "n_clusters of settings is None"),
        ({"n_clusters": 3}, saved["queue"]["clusters"], "must have 3 entries, got 2"),
        ({}, saved["queue"]["clusters"][:1], "clusters of queue must have 2 entries, got 1"),
        ({}, [saved["queue"]["clusters"][0], {"dtype": 3}], "lacks cluster_centers"),
    ):
        altered = {**saved, "settings": saved["settings"] | settings}
        altered["queue"] = saved["queue"] | {"clusters": clusters}
        with pytest.raises(Refusal, match=reason):
            build({}, altered, 1, CPU, digits)
