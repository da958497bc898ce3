"""The rules that an optimizer's saved state must meet before any of it is used."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

from gq_triton.optim.batches import QUEUE, QUEUED
from gq_triton.options import LONGEST
from gq_triton.saved.rules import (
    Also,
    Either,
    Flag,
    Integer,
    ListOf,
    Maybe,
    OneOf,
    Record,
    Rule,
    Text,
    must,
)
from gq_triton.saved.state import counter_rule, losses_rule, ring_rule, twin_rule
from gq_triton.saved.tensors import REAL_TYPES, TensorLike

__all__ = ["EXP_AVG", "EXP_AVG_SQ", "LOSSES", "MOMENTUM_BUFFER", "STEP", "optimizer_rule"]

# Key of a parameter group: the losses that the effective length follows.
LOSSES = "losses"
# Keys of a parameter's state, as torch names them.
STEP, EXP_AVG, EXP_AVG_SQ, MOMENTUM_BUFFER = "step", "exp_avg", "exp_avg_sq", "momentum_buffer"

# torch keeps a step in float32, which counts no further than this.
_FLOAT32_COUNTS_TO = 2**24
# A step that torch saved: a tensor, in its older versions an integer.
_STEP_TYPES = *REAL_TYPES, torch.int64, torch.int32
_STEP = Either(TensorLike((), _STEP_TYPES, low=0, high=2**53, whole=True, finite=True), Integer())
_SWITCH = OneOf((False, True, 0, 1))


@dataclass(frozen=True)
class _Number:
    """The rule of a finite real number; with ``tensor``, also of a tensor with one element."""

    tensor: bool = False

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield a problem unless the value is a number that is not NaN or infinite."""
        of_one = isinstance(value, Tensor) and not value.is_nested and value.numel() == 1
        if self.tensor and of_one:
            yield from TensorLike(tuple(value.shape), finite=True).problems(value, path)
        elif isinstance(value, bool) or not isinstance(value, Real) or not _is_finite(value):
            yield must(path, "a finite number", value)


_OPTIONS: dict[str, Rule] = {
    "lr": _Number(tensor=True),
    "weight_decay": _Number(tensor=True),
    "momentum": _Number(),
    "dampening": _Number(),
    "eps": _Number(),
    "betas": ListOf(_Number(), length=2),
    "maximize": _SWITCH,
    "match_norm": _SWITCH,
    "nesterov": Flag(),
    "stochastic_rounding": Flag(),
}
_KEY = Either(Integer(high=2**63), Text())


def optimizer_rule(
    groups: Sequence[dict[str, Any]],
    saved: Any,
    name_of: Callable[[Tensor], str],
    check_options: Callable[[dict[str, Any]], None],
) -> Rule:
    """Return the rule that a saved optimizer must meet to be loaded.

    Unknown keys pass unread, as in torch: they are options and states of the optimizer that saved
    them.

    Args:
        groups: the parameter groups of the optimizer that loads.
        saved: the saved state; its options decide the shapes of the rings.
        name_of: returns the name of a parameter for a message.
        check_options: raises a ValueError if options of a group are invalid.
    """
    members = ListOf(_KEY)
    form = Also(
        Record({"state": Record({}), "param_groups": ListOf(Record({"params": members}))}),
        _repeated,
    )
    if any(form.problems(saved, "")):
        return form
    entries: dict[Any, Rule] = {}
    rules: list[Rule] = []
    # Where the numbers of groups or parameters differ, torch raises its own error.
    for own, group in zip(groups, saved["param_groups"], strict=False):
        merged = {**own, **group}
        rules.append(_group_rule(own, merged, check_options))
        length = merged.get("queue_length")
        if _is_length(length):
            for param, key in zip(own["params"], group["params"], strict=False):
                entries[key] = _state_rule(param, length, name_of(param))
    return Record({"state": Record({}, entries), "param_groups": _Each(rules)})


@dataclass(frozen=True)
class _Each:
    """The rule of a list: one rule per member; members beyond the last rule pass."""

    rules: Sequence[Rule]

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield the problems of the members."""
        for number, (rule, member) in enumerate(zip(self.rules, value, strict=False)):
            yield from rule.problems(member, f"group {number}")


def _repeated(saved: Mapping[str, Any]) -> str | None:
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    return None if len(set(keys)) == len(keys) else "params of param_groups names a parameter twice"


def _group_rule(
    own: Mapping[str, Any], merged: dict[str, Any], check_options: Callable[[dict[str, Any]], None]
) -> Rule:
    """Return the rule of one saved group; options that it lacks stay as they are."""

    def refused(_: Any) -> str | None:
        try:
            check_options(merged)
        except ValueError as error:
            return " ".join(str(error).split())
        return None

    known = {name: rule for name, rule in _OPTIONS.items() if name in own}
    window, longest = merged.get("loss_window"), merged.get("queue_length")
    if _is_length(window) and _is_length(longest):
        known[LOSSES] = Maybe(losses_rule(window, longest))
    return Also(Record({}, known), refused)


def _is_finite(number: Any) -> bool:
    """Return whether a number, such as an integer of any size, is within float64's range."""
    return -sys.float_info.max <= number <= sys.float_info.max


def _is_length(value: Any) -> TypeGuard[int]:
    """Return whether an option is a valid length; the option's own rule refuses any other."""
    return not any(Integer(1, LONGEST).problems(value, ""))


def _state_rule(param: Tensor, length: int, name: str) -> Rule:
    """Return the rule of the saved state of one parameter."""
    known: dict[str, Rule] = {
        QUEUE: ring_rule(param, length),
        QUEUED: counter_rule(),
        STEP: _STEP,
        EXP_AVG: twin_rule(param),
        EXP_AVG_SQ: twin_rule(param, low=0.0),
        # torch.optim.SGD without momentum may save None.
        MOMENTUM_BUFFER: Maybe(twin_rule(param)),
    }

    def contradicts(state: Mapping[str, Any]) -> str | None:
        for together in ((QUEUE, QUEUED), (STEP, EXP_AVG, EXP_AVG_SQ)):
            missing = [key for key in together if key not in state]
            if missing and len(missing) < len(together):
                return f"the state of {name} lacks {', '.join(missing)}"
        if QUEUED in state and STEP in state:
            queued, step = int(state[QUEUED]), int(state[STEP])
            if queued > step and step < _FLOAT32_COUNTS_TO:
                return f"{QUEUED} of {name} must be at most {STEP}, got {queued} and {step}"
        return None

    return Also(Record({}, known, label=name), contradicts)
