"""NoiseScale: the noise meter of a model in any loop."""

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gq_triton.cluster_grad import Clusters, Step
from gq_triton.cluster_grad.clusters import INSTALLED
from gq_triton.cluster_grad.copies import recorded
from gq_triton.cluster_grad.passes import in_backward
from gq_triton.names import bare, is_divided, parameter_names
from gq_triton.options import shown
from gq_triton.replayed import refuse_replay
from gq_triton.saved.rules import check
from gq_triton.variance.noise.groups import MeterClusters
from gq_triton.variance.noise.lag import Momentum
from gq_triton.variance.noise.part import Part
from gq_triton.variance.noise.report import LayerNoise, NoiseReport, layers, report
from gq_triton.variance.noise.saved import saved_rule
from gq_triton.variance.noise.sink import Squares
from gq_triton.variance.noise.tap import Tap
from gq_triton.variance.noise.window import Estimate, History, Measured, Window, ratio

__all__ = ["NoiseScale"]


class NoiseScale:
    """A meter of the gradient's noise, which a training loop carries along.

    Every ``every``-th forward pass and its backward pass sum the gradients by random groups of
    samples. From the groups' mean gradients ``c_k`` and the batch's g follow, without bias for
    independent samples, the trace of the covariance of a sample's gradient and the square of the
    true gradient: ``tr S = sum_k n_k |c_k - g|**2 / (K - 1)``, ``|G|**2 = |g|**2 - tr S / B``. The
    noise scale is ``sum tr S / sum |G|**2`` over the steps of a window (McCandlish et al., arXiv
    1812.06162): batches far below it are mostly noise, and larger ones save steps; batches far
    above it are not worth their samples.

    The gradients are those of the loop without a meter: bit for bit in all other passes, and up to
    the order of summation in those that are measured. All other passes run the model as it is.

    *Ranks.* Under DDP every rank groups its own samples, and the ranks are groups as well: one
    message per measured step, of two numbers per parameter. All ranks have the same figures. A rank
    that runs out of batches before others (``join``) is refused. A model that ``fully_shard`` has
    divided is measured in the same way, with three numbers per parameter.

    *Counting.* ``every`` counts forward passes with gradients. With several backward passes per
    step (accumulation) the measured batch is that of one pass. Under a loss scaler ``variance`` and
    ``signal`` carry the square of the scale; their ratio does not. Samples must be independent, and
    the loss a mean or a sum over them.

    Args:
        model: the model: bare, compiled, in DDP, or divided by ``fully_shard``.
        every: one of so many forward passes is measured.
        clusters: K, groups per batch and process; at least 2 in a single process.
        features: name of the submodule whose output describes a sample. The groups are then random
            halves of K clusters of features, and the report has F: whether clusters of features
            tell more than random groups, which have F = 1.
        window: how many measurements the figures are of.
        optimizer: a torch optimizer with a momentum, for the lag share: how much of the distance
            from momentum to gradient is noise. Near 1, all; far below, momentum lags behind. Not
            with a loss scaler, whose scale momentum does not have.
        batch_dim: the dimension of the samples in the model's inputs.
        seed: of the random groups. Torch's own generators are left alone.

    Attributes:
        step: the number of forward passes so far.
        history: a row per measurement: ``step``, ``samples``, ``variance``, ``signal``.

    Raises:
        TypeError: ``model`` is no module, or ``optimizer`` no optimizer.
        ValueError: an option that cannot hold, or a model that cannot be measured.

    Examples:
        >>> model = torch.nn.Linear(4, 2)
        >>> meter = NoiseScale(model, every=1)
        >>> model(torch.randn(32, 4)).square().mean().backward()
        >>> meter.noise_scale > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 10,
        *,
        clusters: int = 4,
        features: str | None = None,
        window: int = 50,
        optimizer: Optimizer | None = None,
        batch_dim: int = 0,
        seed: int = 0,
    ) -> None:
        params = parameter_names(model)
        _check(every=every, clusters=clusters, window=window, seed=seed)
        trained = {name: param for name, param in params.items() if param.requires_grad}
        if not trained:
            raise ValueError("the model must have a parameter that needs a gradient, and has none")
        wrapped = bare(model)
        inner = bare(wrapped.module) if isinstance(wrapped, DistributedDataParallel) else wrapped
        self._tapped = vars(inner).get(INSTALLED)
        if self._tapped is not None:
            _check_tapped(self._tapped, features, optimizer, is_divided(model, params))
        self._model, self._every, self._wanted = inner, every, clusters
        self._halves = features is not None or self._tapped is not None
        options: dict[str, Any] = {
            "clusters": clusters,
            "features": features,
            "batch_dim": batch_dim,
            "generator": torch.Generator().manual_seed(seed),
            "heard": weakref.WeakMethod(self._ended),
        }
        leaves: dict[str, Tensor] = dict(params)
        kind: Any = MeterClusters
        self._layout: Any = None
        if is_divided(model, params):
            # Imported here: few models are divided, and FSDP is slow to import.
            from gq_triton.variance.noise.sharded import ShardedMeterClusters, shards_of

            if optimizer is not None:
                raise ValueError(
                    "NoiseScale has no lag share of a model that fully_shard has divided: leave "
                    "optimizer out"
                )
            params, self._layout = shards_of(model)
            trained = {name: param for name, param in params.items() if param.requires_grad}
            leaves, kind = {}, ShardedMeterClusters
            options |= {"layout": self._layout, "leaves": leaves}
        self._params, self._generator = trained, options["generator"]
        self._sink = Squares(params, leaves, "auto", halves=self._halves)
        names: dict[Tensor, str] = {param: name for name, param in params.items()}
        self._clusters: MeterClusters | Tap
        if self._tapped is not None:
            self._clusters = Tap(self._tapped, self._sink, self._generator, options["heard"])
        else:
            self._clusters = kind(inner, names, self._sink, **options)
        self._momentum = None if optimizer is None else Momentum(optimizer, trained)
        elements = [param.numel() for param in trained.values()]
        self._window = Window(list(trained), elements, window)
        self.step = 0
        self._history = History()
        self._depth = 0
        self._ddp: DistributedDataParallel | None = None
        alive = weakref.ref(self)

        def enter(module: nn.Module, args: Any) -> None:
            meter = alive()
            if meter is not None and module is meter._model and torch.is_grad_enabled():
                meter._enter()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            meter = alive()
            if meter is not None and module is meter._model and torch.is_grad_enabled():
                meter._depth = max(0, meter._depth - 1)  # it may have begun before the meter

        # Before the hooks of the clusters. A graph of torch.compile would count while it is traced.
        reason = "NoiseScale counts forward passes: compile without fullgraph=True"
        untraced: Any = partial(torch.compiler.disable, reason=reason)
        handles = [
            inner.register_forward_pre_hook(untraced(enter)),
            inner.register_forward_hook(untraced(leave), always_call=True),
        ]
        undo = self._clusters.install()

        def end() -> None:
            for handle in handles:
                handle.remove()
            undo()

        self._end = weakref.finalize(self, end)
        self._end.atexit = False

    def remove(self) -> None:
        """End the measuring; what was measured stays. A second call does nothing."""
        self._end()

    def _enter(self) -> None:
        """Count a forward pass that begins, and wake the clusters if it is to be measured."""
        self._depth += 1
        if self._depth > 1 or in_backward() or recorded():
            return
        refuse_replay("NoiseScale counts forward passes in Python", "call remove() on the meter")
        self.step += 1
        measured = self.step % self._every == 0
        if measured and not self._clusters.installed:
            raise RuntimeError(
                "a GradQueue was attached to the meter's model, or removed from it: build the "
                "NoiseScale after attach(), and call remove() on this one"
            )
        self._clusters.wake(measured)
        if not measured:
            return
        self._sink.clear()
        self._ddp = DistributedDataParallel._get_active_ddp_module()
        if self._ddp is not None and self._ddp._join_config.enable:
            raise RuntimeError(
                "NoiseScale cannot measure under join(), where a rank without a batch sends no "
                "figures: call remove() on the meter, or give all ranks as many batches"
            )
        if self._ddp is None and self._layout is None and self._wanted == 1:
            raise RuntimeError(
                "one process has no noise to see with clusters=1: give clusters=2 or more"
            )

    def _ended(self, steps: list[Step]) -> None:
        """Take the figures of a backward pass that has just ended."""
        self._clusters.wake(False)
        if len(steps) != 1 or not self._sink.known:
            return
        # Behind the callbacks with which DDP finishes its gradients.
        engine = torch.autograd.Variable._execution_engine  # pyright: ignore[reportAttributeAccessIssue]
        engine.queue_callback(partial(self._measure, len(steps[0].groups.labels)))

    @torch.no_grad()
    def _measure(self, samples: int) -> None:
        sink = self._sink
        found, norms = sink.figures(list(self._params))
        degrees = samples - 1 if self._halves else min(self._wanted, samples) - 1
        part = Part(samples, degrees, found, self._halves)
        if self._layout is not None:
            squares = self._squares_of_shards(norms) if sink.fresh else None
            batch, figures = part.with_ranks(self._layout.place.add_up_, squares, divided=True)
        elif self._ddp is not None:
            # The mean of the ranks' gradients is in p.grad, if this pass alone has put it there.
            plain = (
                not (self._ddp._comm_hooks or self._tapped) and self._ddp.require_backward_grad_sync
            )
            squares = self._squares(norms) if plain and sink.fresh else None
            add_up = partial(dist.all_reduce, group=self._ddp.process_group)
            batch, figures = part.with_ranks(add_up, squares)
        else:
            batch, figures = part.alone()
        lag = torch.full_like(figures[:, :2], torch.nan)
        if self._momentum is not None and sink.fresh:
            self._momentum.compare(lag, figures[:, 0] / batch)
        table = torch.cat([figures, lag], dim=1)
        self._window.add(Measured(self.step, batch, table, norms))
        known = [name in sink.known - sink.unknown for name in self._params]
        self._history.add(self.step, batch, table[known, :2].sum(dim=0))
        sink.clear()

    def _squares_of_shards(self, like: Tensor) -> Tensor | None:
        from gq_triton.variance.noise.sharded import squares_of_shards

        return squares_of_shards(self._params, self._layout, self._sink.known, like)

    def _squares(self, like: Tensor) -> Tensor:
        """Return ``|p.grad|**2`` of every parameter, ``(N,)``; NaN where there is none."""
        none = torch.full_like(like[0], torch.nan)
        return torch.stack(
            [
                none if p.grad is None else torch.linalg.vector_norm(p.grad).to(like) ** 2
                for p in self._params.values()
            ]
        )

    @property
    def noise_scale(self) -> float:
        """``tr S / |G|**2`` over the window, in samples; NaN before anything was measured."""
        return self.interval.value

    @property
    def interval(self) -> Estimate:
        """The noise scale with its jackknife interval of 95 %."""
        totals = self._window.totals()
        return ratio(totals[:, 0], totals[:, 1])

    @property
    def per_layer(self) -> dict[str, LayerNoise]:
        """The noise of every measured parameter, by name."""
        return layers(self._window)

    @property
    def history(self) -> list[dict[str, float]]:
        """A row per measurement since the start: ``step``, ``samples``, ``variance``, ``signal``.

        ``variance`` is ``tr S`` and ``signal`` ``|G|**2`` of that step alone, both noisy. Steps
        whose gradients were not finite have no row.
        """
        return self._history.rows()

    def report(self) -> NoiseReport:
        """Return all figures of the window, to be printed, with what they predict."""
        return report(self._window)

    def reset(self) -> None:
        """Forget what was measured, for figures of what follows; the count goes on."""
        self._window.clear()
        self._history = History()

    def __repr__(self) -> str:
        """Return how often is measured, and what was found."""
        found = f"{len(self._window.measured)} measurements in the window"
        return f"NoiseScale(every={self._every}, clusters={self._wanted}; {found})"

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, the count and the generator's state.

        Under DDP every rank saves its own.
        """
        return {
            "names": self._window.names,
            "step": self.step,
            "measured": self._window.state_dict(),
            "rows": [list(row.values()) for row in self._history.rows()],
            "generator": self._generator.get_state(),
            "clusters": self._clusters.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned: the same forward passes are measured as without.

        Raises:
            ValueError: the state is of another model, or was altered. Nothing is changed.
        """
        check(state, saved_rule(self._window.names), "the saved meter")
        self._clusters.check_saved(state["clusters"])
        self.step = state["step"]
        self._window.load_state_dict(state["measured"])
        self._history = History(state["rows"])
        self._generator.set_state(state["generator"])
        self._clusters.load_state_dict(state["clusters"])


def _check(*, seed: Any, **counts: Any) -> None:
    """Raise one ValueError that names every number that cannot hold."""
    problems = [
        f"{name} must be an integer >= 1, got {shown(value)}"
        for name, value in counts.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        problems.append(f"seed must be an integer >= 0, got {shown(seed)}")
    if problems:
        raise ValueError("; ".join(problems))


def _check_tapped(clusters: Clusters, features: Any, optimizer: Any, divided: bool) -> None:
    """Raise a ValueError unless a meter can listen to what groups the model already."""
    if isinstance(clusters, MeterClusters):
        raise ValueError("another NoiseScale measures this model: call remove() on it first")
    for wrong, words in (
        (features is not None, "leave features out: its groups are those of the GradQueue"),
        (optimizer is not None, "leave optimizer out: p.grad holds weighted gradients"),
        (divided, "on a model that fully_shard has divided a meter needs groups of its own"),
    ):
        if wrong:
            raise ValueError(f"a GradQueue with clusters is attached to the model; {words}")
