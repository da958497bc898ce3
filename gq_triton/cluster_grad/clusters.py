"""The clusters of a model's batches, and the hooks of the model that keep features for them."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.accumulate import Accumulator
from gq_triton.cluster_grad.batch import BatchSize, rows_per_sample_pooled
from gq_triton.cluster_grad.compiled_ops import begin, capture, end, prepare_for_compile, watch
from gq_triton.cluster_grad.copies import recorded, without_trace
from gq_triton.cluster_grad.given import MISSING
from gq_triton.cluster_grad.handover import hand_over
from gq_triton.cluster_grad.install import Conversion
from gq_triton.cluster_grad.labeller import Labeller, Labels
from gq_triton.cluster_grad.layers.registry import Layer, survey
from gq_triton.cluster_grad.layers.slices import SLICES
from gq_triton.cluster_grad.microbatch import backward
from gq_triton.cluster_grad.sink import Sink
from gq_triton.cluster_grad.standins.standin import plain, without_stand_ins
from gq_triton.cluster_grad.step import Step
from gq_triton.grouping.feature_layer import check_features
from gq_triton.grouping.features import (
    first_dimensions,
    first_tensor,
    is_spatial,
    tensors_in,
    with_first_tensor,
)
from gq_triton.grouping.groups import Groups
from gq_triton.options import OUTPUT_GRADIENT, ClusterOptions

__all__ = ["INSTALLED", "Clusters"]

# The attribute of the model that holds its clusters while they are installed.
INSTALLED = "_gq_triton_clusters"


def _nothing() -> None:
    pass


class Clusters:
    """The clusters of a model's batches and the sums of its gradients by cluster.

    Args:
        model: the model.
        names: the names of its parameters.
        sink: the receiver of the layers' sums.
        options: how samples are grouped and how the groups are mixed.
        before_assign: called before the clusters of a step are found.
        whole_batch: called with this process's number of samples; returns that of the whole batch.
        sizes_only: whether the clusterer needs only the number of samples, so that no features are
            kept.
        accumulator: makes the accumulator, called as ``Accumulator``.

    Attributes:
        batch_size: tells how many samples a forward pass has.
        owners: by parameter name, the module that uses the parameter, and how.

    Raises:
        ValueError: an option that cannot hold.
    """

    def __init__(
        self,
        model: nn.Module,
        names: dict[Tensor, str],
        sink: Sink,
        options: ClusterOptions,
        *,
        before_assign: Callable[[], None] = _nothing,
        whole_batch: Callable[[int], int | Tensor] = int,
        sizes_only: bool = False,
        accumulator: Callable[..., Accumulator] = Accumulator,
    ) -> None:
        features = options.features
        if not options.labels and features is None:
            raise ValueError(
                "n_clusters needs features: the name of the submodule whose output describes a "
                f'sample, or "{OUTPUT_GRADIENT}"; or labels=True where the loader brings clusters'
            )
        if not options.labels:
            check_features(model, features)
        self.model, self.features, self.options = model, features, options
        self.mode = options.mode
        self._layer: nn.Module | None = None
        self.uninstall: Callable[[], None] = _nothing
        self._backend = sink.backend
        self.labeller = Labeller(options, sink.backend)
        self._before_assign, self._whole_batch = before_assign, whole_batch
        self._sizes_only = sizes_only
        self._names = names
        self.layers = survey(model) if self.mode == "one_backward" else []
        self.owners = dict(self._held(names))
        self.accumulator = accumulator(sink, names, self.owners, self.assign)
        self.accumulator.batch_dim = options.batch_dim
        coverage = self.accumulator.coverage
        coverage.strict = options.strict
        coverage.kinds = {
            name: type(layer.module).__name__
            for name, layer in self.owners.items()
            if layer.family is not None
        }
        clusters = weakref.ref(self)

        def mend(whole: list[str]) -> list[str]:
            alive = clusters()
            if alive is None:
                return whole
            if alive.batch_size.learns():
                return []  # the next step shows what is known
            if alive._disorder():
                return whole
            return hand_over(alive, alive._conversion, whole)

        coverage.mend = mend
        if self.labeller.given is not None:
            self.accumulator.given = self.labeller.given.take
        self.sample_weights: Tensor | None = None
        self.batch_size = BatchSize(options.batch_dim)
        self.last: Step | None = None
        # How many calls of the model run, one within the other.
        self._depth = 0
        # The owner of what is installed is gone.
        self._ownerless = False

    def _held(self, names: dict[Tensor, str]) -> Iterator[tuple[str, Layer]]:
        """Yield parameters' names with the module that holds them, families last."""
        for layer in sorted(self.layers, key=lambda layer: layer.family is not None):
            whole = layer.family is not None and layer.family.runs_whole
            for param in layer.module.parameters(recurse=whole):
                if param in names:
                    yield names[param], layer

    def __deepcopy__(self, memo: dict[int, Any]) -> "Clusters":
        """Return the clusters themselves: a copy of the model has none."""
        return self

    def assign(self, step: Step) -> Groups:
        """Return the clusters of a step's samples."""
        self._before_assign()
        if step.features is None and self.labeller.given is not None:
            raise RuntimeError(MISSING)
        if step.features is None:
            raise RuntimeError(
                f"features={self.features!r} was not computed in the forward pass that this "
                "backward pass belongs to: name a layer that every training step runs"
                if self.features != OUTPUT_GRADIENT
                else "the model's first output with a gradient took no part in the loss: name a "
                'layer in place of features="output_gradient"'
            )
        step.check_batch(self.features or "")
        if step.arguments is not None:
            step.mismatch = self.batch_size.differs(step.arguments, len(step.features))
        step.mismatch = step.mismatch or self._disorder()
        with torch.no_grad():
            labels, clusters, problem = self._label(step.features)
        self.last = step
        whole = self._whole_batch(len(labels))
        options, weights, backend = self.options, self.sample_weights, self._backend
        return Groups.of(labels, clusters, options, weights, whole, backend, problem)

    def _label(self, features: Tensor) -> Labels:
        return self.labeller.label(features)

    def set_labels(self, labels: Tensor | Sequence[int]) -> None:
        """Keep the clusters ``(B,)`` of the next forward pass's samples."""
        given = self.labeller.given
        if given is None:
            raise ValueError("set_labels needs labels=True, which takes the place of features")
        given.set(labels, next(iter(self._names)).device)

    def install(self) -> Callable[[], None]:
        """Make the model's backward passes use the sink's gradients; return what undoes it."""
        earlier: Clusters | None = vars(self.model).get(INSTALLED)
        if earlier is not None and earlier.model is self.model:
            earlier.uninstall()  # its plug-in or hook is gone, or is replaced
        accumulator = self.accumulator
        prepare_for_compile()
        conversion = Conversion(self.layers if self.mode == "one_backward" else [], accumulator)
        self._conversion = conversion
        handles = [self.model.register_forward_pre_hook(self._enter, with_kwargs=True)]
        if self.features not in (None, OUTPUT_GRADIENT):
            layer = self._layer = self.model.get_submodule(self.features)
            handles.append(layer.register_forward_hook(partial(self._capture, is_spatial(layer))))
        for name, module in self.model.named_modules():
            # A model may say batch_first=False of what is inside it.
            if name and getattr(module, "batch_first", True) is False:
                see = partial(self._see_second, name)
                handles.append(module.register_forward_pre_hook(see, with_kwargs=True))
        handles.append(self.model.register_forward_hook(self._leave, always_call=True))
        show_all = without_trace(self.model)

        def undo() -> None:
            show_all()
            for handle in handles:
                handle.remove()
            conversion.undo()
            accumulator.release()
            vars(self.model).pop(INSTALLED, None)
            self.uninstall = _nothing

        vars(self.model)[INSTALLED] = self
        self._depth = 0
        self.uninstall = undo
        self._ownerless = False
        return undo

    @property
    def installed(self) -> bool:
        """Whether the model's backward passes use the sink's gradients."""
        return vars(self.model).get(INSTALLED) is self

    def end_with(self, owner: object) -> None:
        """Undo the present installation when its owner is gone: something else may train the model.

        Args:
            owner: what feeds the queue; held weakly.
        """
        clusters, undo = weakref.ref(self), weakref.ref(self.uninstall)

        def end() -> None:
            alive = clusters()
            if alive is None or alive.uninstall is not undo():
                return  # with the model, or undone before
            # The garbage collector may call in the middle of a pass.
            if alive.accumulator.waits:
                alive._ownerless = True
            else:
                alive.uninstall()

        weakref.finalize(owner, end).atexit = False

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.accumulator.asleep or recorded():
            return
        if self._ownerless and not torch.compiler.is_compiling():
            return self.uninstall()
        accumulator = self.accumulator
        if module is self.model:
            # A forward pass may call the model, as a training_step of Lightning does.
            self._depth += 1
            if self._depth > 1:
                return
        if torch.is_grad_enabled() and module is self.model:
            dim = self.options.batch_dim
            if torch.compiler.is_compiling():
                given = tensors_in((args, kwargs))
                sizes = [tensor.shape[dim] for tensor in given if tensor.dim() > dim]
                accumulator.batch = sizes[0] if sizes and sizes[0] else 1
            else:
                shown = accumulator.arguments = self.batch_size.shown(args, kwargs)
                accumulator.batch = shown.samples or 1
                labels = self.labeller.given
                if labels is not None:
                    labels.check_number([tensor.shape[dim] for tensor in shown.tensors])
                accumulator.inputs = {
                    tensor.data_ptr(): tensor.stride(dim)
                    for tensor in shown.tensors
                    if tensor.shape[dim] == accumulator.batch
                }
                accumulator.trusted.clear()
            accumulator.token = begin(accumulator.clock, accumulator.number)
            accumulator.arguments = None
            if not torch.compiler.is_compiling():
                self._conversion.show(accumulator.token)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        accumulator = self.accumulator
        if accumulator.asleep or recorded():
            return None
        if module is self.model:
            self._depth -= 1
            if self._depth:
                return None
            if not torch.compiler.is_compiling():
                self._conversion.hide()
        if accumulator.token is None or not torch.is_grad_enabled() or module is not self.model:
            return None
        end(accumulator.clock, accumulator.token)
        if not torch.compiler.is_compiling():
            if accumulator.lookout.on:
                by_output = self.features == OUTPUT_GRADIENT and not self.options.batch_dim
                batch, trusted = accumulator.batch, accumulator.trusted
                accumulator.lookout.end(output, batch, trusted, by_output)
            accumulator.trusted.clear()
            output = without_stand_ins(output)
            if accumulator.step is not None:
                accumulator.step.outputs = first_dimensions(output)
        if self.features != OUTPUT_GRADIENT:
            return None if torch.compiler.is_compiling() else output
        return with_first_tensor(output, partial(watch, token=accumulator.token))

    def _disorder(self) -> str:
        """Return how the samples' rows are in another order than their clusters; empty if not.

        Features of a layer behind a change of the order are in the layers' order.
        """
        lookout = self.accumulator.lookout
        by_input = self.labeller.given is not None or self.sample_weights is not None
        return lookout.output or (lookout.layer if by_input else "")

    def _see_second(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note the shape of the input of a layer whose batch is the second dimension."""
        step, tensor = self.accumulator.step, first_tensor([*args, *kwargs.values()])
        if torch.compiler.is_compiling() or step is None or not step.open or tensor is None:
            return
        if tensor.dim() == 3:
            step.second[name] = tuple(tensor.shape)

    def _capture(self, channels_first: bool, module: nn.Module, args: Any, output: Any) -> None:
        accumulator, tensor = self.accumulator, plain(first_tensor(output))
        if accumulator.token is None or accumulator.asleep or recorded():
            return
        if tensor is not None and module is self._layer:
            if not torch.compiler.is_compiling() and not accumulator.batch_dim:
                batch, trusted = accumulator.batch, accumulator.trusted
                tensor = rows_per_sample_pooled(tensor, batch, trusted, channels_first)
            if self._sizes_only:
                tensor = tensor.flatten(1)[:, :0]
            capture(accumulator.clock, accumulator.token, tensor, channels_first)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of k-means in plain values; an empty one for another clusterer."""
        return self.labeller.state_dict()

    def check_saved(self, state: Any) -> None:
        """Raise a ValueError that names what keeps a saved state from being loaded."""
        self.labeller.check_saved(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state; with an empty one k-means starts anew."""
        self.labeller.load_state_dict(state)

    def report(self) -> dict[str, str]:
        """Return, by parameter name, how the last gradient was handled or the first will be."""
        if self.mode == "microbatch":
            how = dict.fromkeys(self._names.values(), "clusters (microbatch)")
        else:
            how = {name: self._tier(self.owners[name]) for name in self._names.values()}
        coverage = self.accumulator.coverage
        for name, known in coverage.known.items():
            if not known:
                how[name] = f"whole batch ({coverage.why_whole(name)})"
        frozen = {name: "frozen" for p, name in self._names.items() if not p.requires_grad}
        return how | frozen

    def _tier(self, layer: Layer) -> str:
        kind = type(layer.module).__name__
        if layer.family is SLICES:
            return f"clusters ({kind} run again)"
        return (
            f"clusters ({kind})" if layer.family is not None else f"clusters (expanded in {kind})"
        )

    def covered(self) -> set[str]:
        """Return the names of the parameters that clusters cover, frozen ones included."""
        return set(self._names.values())

    def backward(self, losses: Tensor) -> None:
        """Run K backward passes, one per cluster, and leave the weighted sum in ``p.grad``.

        Args:
            losses: ``(B,)`` per-sample losses.

        Raises:
            ValueError: there was no forward pass, or there is not one loss per sample.
        """
        backward(self.accumulator, losses, self.options)
