"""The common base of GQSGD and GQAdamW: options, state, loss scaling, checkpoints."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from gq_triton.claims import OPTIMIZER, claim, release
from gq_triton.describe import memory
from gq_triton.divided import dtensor
from gq_triton.engines import Engine, engine, note_plain_torch
from gq_triton.keywords import read
from gq_triton.law import Law, accepted, match_norm_
from gq_triton.optim.batches import QUEUE, Batch, State
from gq_triton.optim.measured import Measured, figures, measure
from gq_triton.optim.plan import Found, Plan
from gq_triton.optim.referrers import Watched
from gq_triton.optim.saved import LOSSES, optimizer_rule
from gq_triton.optim.states import allocate_ring, check_length, reorder, saved_states, take_over
from gq_triton.options import LawOptions
from gq_triton.queues.losses import length_of, new_losses, record_loss
from gq_triton.ring import (
    least_over,
    local,
    mean_over_ranks,
    place_gradients,
    refuse_capture,
    shard_groups,
)
from gq_triton.saved.rules import Record, check
from gq_triton.saved.state import filled
from gq_triton.untraced import Untraced, untraced

__all__ = ["GradQueueOptimizer"]

_SAVED = "the saved optimizer"


class GradQueueOptimizer(Watched, Optimizer):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A torch optimizer that applies the scarcity law to the gradients before its update.

    Subclasses provide ``_problems``, ``_new_state``, ``_keys``, ``_batch_key`` and ``_update``.
    """

    # With this flag GradScaler leaves unscaling and skipping to step(), which does both on the
    # device. Both flags belong to the class, because torch copies and pickles no further attributes
    # of an optimizer.
    _step_supports_amp_scaling = True
    _warned_losses = False
    # Whether each step counts its weights; see metrics.
    _measures = False

    def __init__(self, params: ParamsT, own: dict[str, Any], options: Mapping[str, Any]) -> None:
        """Check and keep the subclass's own options and the given options of the law.

        Raises:
            TypeError: an option that does not exist.
            ValueError: names every invalid option.
        """
        (law,) = read(options, LawOptions, also=self._problems(own))
        Untraced.prepare()
        try:
            super().__init__(params, own | vars(law))
        except BaseException:
            # An exception that somebody keeps keeps this object: it must not hold its claims.
            for group in getattr(self, "param_groups", []):
                release(group["params"], self)
            raise
        self._plans: dict[int, Plan] = {}
        self._measured: list[Measured] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._measured = {}, []

    def _check(self, group: dict[str, Any]) -> None:
        problems = [*LawOptions.problems(group), *self._problems(group)]
        if problems:
            raise ValueError("; ".join(problems))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; every option of the constructor may be given for it. See torch."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._check(group)
            for param in group["params"]:
                if not param.is_floating_point():
                    raise ValueError(
                        f"{self._name(param)} must have a real floating type, got {param.dtype}: "
                        "give it to another optimizer (complex: as torch.view_as_real)"
                    )
            claim(group["params"], self, OPTIMIZER)
        except BaseException:
            self.param_groups.pop()
            raise

    def __repr__(self) -> str:
        """Return for every group its options that are not the defaults, its size and memory."""
        signature = inspect.signature(type(self)).parameters
        groups = []
        for group in self.param_groups:
            options = [
                f"{name}={group[name]!r}"
                for name, entry in signature.items()
                if name in group and name != "params"
                if name == "lr" or group[name] != entry.default
            ]
            states = (self.state.get(param, {}) for param in group["params"])
            rings = [state[QUEUE] for state in states if QUEUE in state]
            groups.append(f"{', '.join(options)}; {memory(group['params'], rings)}")
        if len(groups) == 1:
            return f"{type(self).__name__}({groups[0]})"
        listed = "".join(f"\n    group {number}: {one}" for number, one in enumerate(groups))
        return f"{type(self).__name__}({listed}\n)"

    def record_loss(self, loss: Tensor | float) -> None:
        """Record the unscaled loss of the coming step for the effective length.

        A call is needed only with ``loss_window``, and only where ``step`` gets no closure. The
        loss stays on its device; the host does not wait for it. Where parameters are sharded the
        mean over the ranks counts, and every rank must call.

        Args:
            loss: one number, 0-d or one element.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        if params and any(group["loss_window"] is not None for group in self.param_groups):
            loss = mean_over_ranks(loss, params[0])
        for group in self.param_groups:
            window = group["loss_window"]
            if window is None or not group["params"]:
                continue
            if LOSSES not in group:
                device = local(group["params"][0]).device
                refuse_capture("a history of losses", device)
                group[LOSSES] = new_losses(window, group["queue_length"], device)
            # In place: a replay of a CUDA graph finds the losses where they are now.
            group[LOSSES].copy_(record_loss(group[LOSSES], loss))

    @untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Weight the gradients, queue the raw ones, and update the parameters.

        Args:
            closure: reevaluates the model and returns the loss, which feeds the effective length.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            place_gradients(group["params"])
        known = [self._planned(number) for number in range(len(self.param_groups))]
        self._check_gradients(
            [g for g, f in zip(self.param_groups, known, strict=True) if f is None]
        )
        if loss is not None:
            self.record_loss(loss)
        probing = not vars(self)["state"] and self._is_probe()
        self._measured, place = [], 0
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for number, group in enumerate(self.param_groups):
            found, known[number] = known[number], None
            batches = self._plan(number) if found is None else self._plans[number].batches(found)
            length = self._length(group)
            for batch in batches:
                batch.place, place = place, place + len(batch.params)
                device = batch.shards[0].device
                law = Law(group["rho"], length, _on(grad_scale, device), _on(found_inf, device))
                ops = engine(device, group["backend"])
                note_plain_torch(device, group["backend"], batch.shards)
                if probing:
                    # The gradients pass through: weight 1, not queued.
                    nothing = torch.zeros(len(batch.params), dtype=torch.bool, device=device)
                    self._update(ops, batch, nothing, group, law)
                else:
                    if self._measures:
                        self._measured.append(measure(ops, batch, law, group))
                    self._step_batch(ops, batch, group, law)
                batch.params.write_back()
        return loss

    def _step_batch(self, ops: Engine, batch: Batch, group: dict[str, Any], law: Law) -> None:
        groups = shard_groups(batch.members[0])
        accept = None
        # Where a loss scaler has checked every gradient already, none is read a second time.
        if law.found_inf is None or group["match_norm"] or groups:
            finite = ops.all_finite(batch.grads)
            accept = accepted(finite, found_inf=law.found_inf, least=least_over(groups))
        if group["match_norm"]:
            assert accept is not None
            batch.grads = [grad.clone() for grad in batch.grads]
            statistics = ops.weigh_(batch.grads, batch.queues, batch.queued, accept, law)
            for process_group in groups:
                dist.all_reduce(statistics, group=process_group)
            match_norm_(batch.grads, statistics)
            # These gradients are weighted and queued already: the update takes them as they are.
            accept = torch.zeros_like(accept)
        self._update(ops, batch, accept, group, law)

    def metrics(self, per_layer: bool = False) -> dict[str, Any]:
        """Return figures of the last step's weights, in one transfer to the host.

        The first call switches the counting on: from then on each step reads gradients and queues
        once more. So call once before training, or before the steps to look at. With sharded
        parameters every rank must call.

        Args:
            per_layer: return the first four figures of each parameter by its name.

        Returns:
            ``mean_weight``; ``norm_ratio``, ``|g*| / |g|``; ``saturated_high`` and
            ``saturated_low``, the shares of weights at rho and at 1/rho; ``effective_length``, that
            of the first group. Empty before the first step that counts, and after a step that a
            loss scaler skipped.

        Warns:
            UserWarning: the first call came after a step, which was not counted.
        """
        if not self._measures:
            self._measures = True
            if self.state:
                warnings.warn(
                    "metrics() counts the weights of the steps after its first call, so there are "
                    "no figures yet: call it once before training",
                    stacklevel=2,
                )
        names = {
            param: name or f"group {number}, parameter {index}"
            for number, group in enumerate(self.param_groups)
            for index, (param, name) in enumerate(zip(group["params"], _names(group), strict=True))
        }
        return figures(self._measured, lambda param: names[param], per_layer)

    def _check_gradients(self, groups: Iterable[dict[str, Any]]) -> None:
        """Raise the error that any group's gradients would raise, before any group steps."""
        for group in groups:
            devices = set()
            for param in group["params"]:
                if param.grad is None:
                    continue
                devices.add(param.device)
                check_length(self._name, param, group, self.state.get(param, {}))
                if param.grad.layout != torch.strided:
                    raise ValueError(
                        f"{self._name(param)} has a gradient of layout {param.grad.layout}, which "
                        "a queue cannot hold: build the layer with sparse=False, or give the "
                        "parameter to torch.optim.SparseAdam"
                    )
            for device in devices:
                engine(device, group["backend"])

    def _planned(self, number: int) -> Found | None:
        """Return the tensors of this step if the group has a plan that still fits, else None."""
        plan, group = self._plans.get(number), self.param_groups[number]
        found = None if plan is None else plan.found(group, self, self._keys(group))
        for device in [] if plan is None or found is None else plan.devices:
            engine(device, group["backend"])  # raises where it cannot run
        return found

    def _plan(self, number: int) -> list[Batch]:
        """Make a new plan of a group; return the batches of its parameters with a gradient."""
        group = self.param_groups[number]

        def key_of(param: Tensor) -> Any:
            assert param.grad is not None
            state = self.state[param]
            mesh = (param.device_mesh, param.placements) if isinstance(param, dtensor()) else None
            types = param.dtype, param.grad.dtype, state[QUEUE].dtype
            return (param.device, mesh, *types, self._batch_key(group, state))

        for param in group["params"]:
            if param.grad is not None:
                self._init(param, group, self.state[param])
        plan = self._plans[number] = Plan(group, self.state, self._keys(group), key_of)
        found = plan.found(group, self, plan.keys)
        assert found is not None
        return plan.batches(found)

    def _init(self, param: Tensor, group: dict[str, Any], state: State) -> None:
        """Allocate missing parts of a parameter's state, and give it the parameter's order."""
        allocate_ring(param, group, state)
        self._new_state(param, group, state)
        reorder(param, state)

    def init_state(self) -> None:
        """Allocate the state of every parameter now instead of in its first step.

        A checkpoint library that needs the state's shapes before the first step then finds them.
        """
        for group in self.param_groups:
            self._full_state(group["params"], group)

    def _full_state(self, params: Iterable[Tensor], group: dict[str, Any]) -> None:
        """Allocate all entries that the state of these parameters has after later steps."""
        for param in params:
            self._init(param, group, self.state[param])

    def _is_probe(self) -> bool:
        """Return whether a checkpoint library takes this first step only to allocate the state.

        ``torch.distributed.checkpoint.state_dict`` takes such a step with all gradients zero and
        all learning rates 0. Queues must not remember those gradients. The update runs as in torch.
        """
        if any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        return not any(grad is not None and bool(local(grad).any()) for grad in grads)

    def _length(self, group: dict[str, Any]) -> Tensor | None:
        window = group["loss_window"]
        if window is None:
            return None
        if LOSSES not in group and not self._warned_losses:
            self._warned_losses = True
            warnings.warn(
                "loss_window is set but no loss was recorded, so the effective length stays at "
                "min_queue_length: call optimizer.record_loss(loss) before optimizer.step()",
                stacklevel=4,
            )
        device = local(group["params"][0]).device
        return length_of(group.get(LOSSES), LawOptions.of(group), device)

    def _name(self, param: Tensor) -> str:
        """Return a parameter's name for an error: torch's where it has one, else its place."""
        for number, group in enumerate(self.param_groups):
            for index, (member, name) in enumerate(
                zip(group["params"], _names(group), strict=True)
            ):
                if member is param:
                    shape = tuple(param.shape)
                    return name or f"parameter {index} of group {number}, of shape {shape},"
        return f"a parameter of shape {tuple(param.shape)}"

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; training continues bit for bit.

        Saved options replace those of the groups, as in torch; ``queue_length`` sets the length of
        the queues. Unlike in torch, queues keep the type they were saved in, and all values are
        copied into new memory: none is shared with ``state_dict``. To convert queues, set
        ``group["queue_dtype"]`` of the groups after loading. Moments take the type of their
        parameter, as in torch.

        A checkpoint of ``torch.optim.SGD`` or ``torch.optim.AdamW`` also loads into the optimizer
        that extends it: its moments go on, the queues start empty, and the options of the law stay
        as they are.

        Raises:
            ValueError: the state was altered or belongs to another model. Nothing is changed.
        """
        check(state_dict, Record({}), _SAVED)
        loaded: dict[str, Any] = {}

        def check_all(_: Optimizer, adapted: dict[str, Any]) -> None:
            # This hook runs last: it sees the state as all other hooks have left it.
            check(
                adapted,
                optimizer_rule(self.param_groups, adapted, self._name, self._check),
                _SAVED,
            )
            loaded.update(adapted)

        options = [dict(group) for group in self.param_groups]
        hook = self.register_load_state_dict_pre_hook(check_all)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for param, saved in saved_states(self.param_groups, loaded):
            for name, value in saved.items():
                take_over(param, self.state[param], name, value)
        for group, before in zip(self.param_groups, options, strict=True):
            # A checkpoint of torch.optim has no options of the law: the group's own ones stay.
            for name, value in before.items():
                if name != LOSSES:
                    group.setdefault(name, value)
            losses, window = group.pop(LOSSES, None), group["loss_window"]
            if losses is not None and window is not None and group["params"]:
                device = local(group["params"][0]).device
                group[LOSSES] = filled(new_losses(window, group["queue_length"], device), losses)

    def _problems(self, group: dict[str, Any]) -> Iterable[str]:
        """Yield a clause for each option of the subclass's own that cannot hold."""
        raise NotImplementedError

    def _new_state(self, param: Tensor, group: dict[str, Any], state: State) -> None:
        raise NotImplementedError

    def _keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _batch_key(self, group: dict[str, Any], state: State) -> Any:
        raise NotImplementedError

    def _update(
        self, ops: Engine, batch: Batch, accept: Tensor | None, group: dict[str, Any], law: Law
    ) -> None:
        raise NotImplementedError


def _names(group: dict[str, Any]) -> Iterable[str | None]:
    return group.get("param_names") or [None] * len(group["params"])


def _on(value: Tensor | None, device: torch.device) -> Tensor | None:
    """Return a loss scaler's number on ``device``."""
    if value is None:
        return None
    whole = value.full_tensor() if isinstance(value, dtensor()) else value
    return whole.to(device, non_blocking=True)
