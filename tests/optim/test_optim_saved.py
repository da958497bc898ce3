"""Altered checkpoints of GQSGD and GQAdamW: each is refused, or one that a run could write."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from altered import REAL, REMOVED, check_door, is_dense
from drawn import fuzz_door
from optim_cases import PAIR, both_optimizers, train

LENGTH, WINDOW = 2, 2
NUMBERS = "lr", "weight_decay", "momentum", "dampening", "eps"


def parameters():
    return [torch.linspace(-1, 1, 5).requires_grad_(), torch.ones(2, 3).requires_grad_()]


def trained(variant, params):
    options = {"queue_length": LENGTH, "min_queue_length": 1, "loss_window": WINDOW}
    optimizer = variant.build(params, **options, backend="torch")
    for step in range(4):
        optimizer.record_loss(float(step))
        train(optimizer, params, 1, start=step)
    return optimizer


def is_count(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        if not is_dense(value, (), (*REAL, torch.int32, torch.int64)):
            return False
        value = value.item()
    elif not isinstance(value, int) or isinstance(value, bool):
        return False
    return bool(0 <= value < 2**53 and value == int(value))


def is_number(name: str, value: Any) -> bool:
    if isinstance(value, torch.Tensor) and name in ("lr", "weight_decay"):
        return is_dense(value, tuple(value.shape)) and value.numel() == 1 and bool(value.isfinite())
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return -1e308 < value < 1e308


class Possible:
    """A predicate: whether some run with these parameters could have written a checkpoint.

    A parameter may have no state yet; its first step writes its momentum. Moments have the shape of
    their parameter, any real type and any value (a gradient that is not finite passes into them);
    second moments are not negative. A queue has taken at most as many gradients as there were
    steps. Any option may be missing, or have any value that the constructor takes, except the
    lengths, which must fit the rings and the losses. A parameter may have any key, once.
    """

    def __init__(self, variant, params, saved) -> None:
        self.variant, self.params = variant, params
        self.state, (self.group,) = saved["state"], saved["param_groups"]
        self.shapes = {key: tuple(p.shape) for key, p in enumerate(params)}

    def __call__(self, path, value) -> bool:
        match path:
            case ("state",):
                # Entries that belong to no parameter are kept, as in torch.
                return isinstance(value, dict) and self.shapes.keys().isdisjoint(value)
            case ("state", int() as at):
                foreign = isinstance(value, dict) and self.state[at].keys().isdisjoint(value)
                return value is REMOVED or foreign
            case ("state", int() as at, name):
                return self.is_state(at, name, value)
            case ("param_groups", 0, "params" | "betas" as name, int() as at):
                return self.is_group(
                    name, [*self.group[name][:at], value, *self.group[name][at + 1 :]]
                )
            case ("param_groups", 0, name):
                return self.is_group(name, value)
        return False

    def is_state(self, at: int, name: str, value: Any) -> bool:
        state, shape = self.state[at], self.shapes[at]
        if name == "momentum_buffer":
            return value is REMOVED or value is None or is_dense(value, shape)
        if name == "queue":
            return is_dense(value, (LENGTH, *shape)) and bool(value.isfinite().all())
        if name == "queued":
            right = is_dense(value, (), (torch.int64,)) and is_count(value)
            return right and int(value) <= int(state.get("step", 2**53))
        if name == "step":
            return is_count(value) and int(value) >= int(state["queued"])
        right = is_dense(value, shape)
        return right and (name == "exp_avg" or not bool((value < 0).any()))

    def is_group(self, name: str, value: Any) -> bool:
        if name == "params":
            return self.are_keys(value)
        if value is REMOVED:
            return True
        if name == "losses":
            types = torch.float32, torch.float64
            return value is None or is_dense(value, (LENGTH + WINDOW - 1,), types)
        if name == "loss_window":
            return value is None or (type(value) is int and value == WINDOW)
        return self.is_option(name, value) and (name != "queue_length" or value == LENGTH)

    def are_keys(self, keys: Any) -> bool:
        if not isinstance(keys, (list, tuple)) or len(keys) != len(self.params):
            return False
        if not all(type(k) is str or (type(k) is int and 0 <= k <= 2**63) for k in keys):
            return False
        fits = all(
            self.shapes.get(k, s) == s for k, s in zip(keys, self.shapes.values(), strict=True)
        )
        return fits and len(set(keys)) == len(keys)

    def is_option(self, name: str, value: Any) -> bool:
        """Return whether an option has the type that it must have and the constructor takes it."""
        if name in NUMBERS and not is_number(name, value):
            return False
        if name in ("maximize", "match_norm") and not (isinstance(value, int) and value in (0, 1)):
            return False
        if name == "betas" and not (
            isinstance(value, (list, tuple))
            and len(value) == 2
            and all(is_number(name, b) for b in value)
        ):
            return False
        options = {key: v for key, v in self.group.items() if key not in ("params", "losses")}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "queue_length=1: ", UserWarning)
            try:
                self.variant.build(self.params, **{**options, name: value})
            except (ValueError, TypeError):
                return False
        return True


def door(variant):
    """Return an optimizer's saved state, and what loads one, tells its state and takes a step."""
    params = parameters()
    optimizer = trained(variant, params)
    saved = copy.deepcopy(optimizer.state_dict())

    def fingerprint():
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        return buffer.getvalue()

    def go_on():
        optimizer.record_loss(1.0)
        train(optimizer, params, 1, start=4)
        for param in params:
            for name, value in optimizer.state[param].items():
                if name == "queue":
                    assert value.shape[1:] == param.shape
                    assert value[0].stride() == param.stride()
                elif name in ("queued", "step"):
                    assert value.shape == ()
                    assert value.dtype == (torch.int64 if name == "queued" else torch.float32)
                elif name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                    assert (value.shape, value.stride()) == (param.shape, param.stride())
                    assert value.dtype == param.dtype

    return params, saved, optimizer.load_state_dict, fingerprint, go_on


@pytest.mark.slow
@both_optimizers
def test_every_altered_leaf_of_a_checkpoint_is_refused_or_possible(variant):
    params, saved, load, fingerprint, go_on = door(variant)
    possible = Possible(variant, params, saved)
    taken, refused = check_door(saved, load, possible, fingerprint, go_on)
    assert taken > 100
    assert refused > 500


@pytest.mark.slow
@both_optimizers
def test_a_checkpoint_with_drawn_alterations_is_refused_or_goes_on(variant):
    _, saved, load, fingerprint, go_on = door(variant)
    fuzz_door(saved, load, fingerprint, go_on)


@pytest.mark.parametrize("steps", [4, 4.0, torch.tensor(4, dtype=torch.int64)])
def test_a_step_of_an_older_torch_is_taken(steps):
    params = parameters()
    optimizer = trained(PAIR["adamw"], params)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = steps
    if isinstance(steps, float):
        with pytest.raises(ValueError, match=r"step of parameter 0 .* must be a tensor, got 4\.0"):
            optimizer.load_state_dict(saved)
        return
    optimizer.load_state_dict(saved)
    step = optimizer.state[params[0]]["step"]
    assert isinstance(step, torch.Tensor)
    assert step == 4
    assert step.dtype == torch.float32


def test_a_step_that_float32_cannot_count_further_is_no_contradiction():
    params = parameters()
    optimizer = trained(PAIR["adamw"], params)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.tensor(2.0**24)
    saved["state"][0]["queued"] = torch.tensor(2**24 + 5)
    optimizer.load_state_dict(saved)
    assert optimizer.state[params[0]]["queued"] == 2**24 + 5


@both_optimizers
def test_moments_take_the_type_of_their_parameter_as_in_torch(variant):
    """Moments of another type than their parameter's would make a step raise half-way."""
    optimizer = trained(variant, parameters())
    narrow = [param.detach().bfloat16().requires_grad_() for param in parameters()]
    other = variant.build(narrow, backend="torch")
    other.load_state_dict(optimizer.state_dict())
    train(other, narrow, 2, start=4)
    kept = {name: value.dtype for name, value in other.state[narrow[0]].items()}
    for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        assert kept.get(name, torch.bfloat16) == torch.bfloat16
    assert kept["queue"] == torch.float32


@both_optimizers
def test_a_moment_altered_by_hand_does_not_reach_a_kernel(variant):
    params = parameters()
    optimizer = trained(variant, params)
    name = "exp_avg" if "exp_avg" in optimizer.state[params[0]] else "momentum_buffer"
    optimizer.state[params[0]][name] = torch.tensor(1.0)
    with pytest.raises(ValueError, match=rf"the state '{name}' .* it was altered"):
        train(optimizer, params, 1, start=4)
