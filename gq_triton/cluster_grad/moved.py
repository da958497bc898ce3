"""Layers that see the samples in another order than their clusters, found by changing a sample.

A model may put its samples in another order before a layer, in a way that no graph shows. So one
sample of a batch after the other is changed: the rows of a layer's input that change are its rows.
"""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gq_triton.cluster_grad.layers.registry import Layer
from gq_triton.grouping.features import first_tensor, tensors_in
from gq_triton.options import OUTPUT_GRADIENT

if TYPE_CHECKING:
    from gq_triton.cluster_grad.clusters import Clusters

__all__ = ["called", "moved", "same_draws"]

# The numbers of samples that are changed, and of calls of a layer that are looked at.
_SAMPLES, _CALLS = 3, 4
# By layer (None for the features), number of its call and place among its arguments.
_Rows = dict[tuple[Layer | None, int, int], Tensor]
_FEATURES = None, 0, 0


def called(model: nn.Module, batch: Any) -> Any:
    """Return what a model returns for a batch: a mapping, a tuple or list, or one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def moved(clusters: "Clusters", batch: Any) -> dict[str, str]:
    """Return, by parameter name, in what order a layer sees the samples, where it is a wrong one.

    The right order is that of the features. Where labels or weights of the samples were given, it
    is that of the model's inputs. A layer behind one that sees them in a wrong order is wrong too,
    unless it is seen to be right.

    Args:
        clusters: the clusters, after passes through the batch.
        batch: the arguments of the model.
    """
    if not _orders(clusters, batch, graded=False)[0]:
        return {}
    wrong, right = _orders(clusters, batch, graded=True)
    behind = f"behind {', '.join(sorted(layer.name for layer in wrong))}"
    return {
        name: wrong.get(layer, behind)
        for name, layer in clusters.owners.items()
        if layer in wrong or layer not in right
    }


def _orders(clusters: "Clusters", batch: Any, graded: bool) -> tuple[dict[Layer, str], set[Layer]]:
    """Return how layers see the samples in a wrong order, and the layers that see the right one.

    Args:
        clusters: the clusters.
        batch: the arguments of the model.
        graded: whether to look at inputs of layers that have a graph, too. The graph shows their
            order, and a norm may have mixed their samples, so alone they prove nothing.
    """
    samples, dim = clusters.accumulator.batch, clusters.options.batch_dim
    given = clusters.labeller.given is not None or clusters.sample_weights is not None
    source = "inputs have" if given else "features have"
    wrong, right = dict[Layer, str](), set[Layer]()
    first = _rows_of(clusters, batch, graded)
    for sample in sorted({0, samples // 2, samples - 1}):
        changed = _with_another(batch, sample, samples, dim)
        if changed is None:
            continue
        now = _rows_of(clusters, changed, graded)
        differences = {
            key: _difference(rows, now[key], samples, dim)
            for key, rows in first.items()
            if key in now and now[key].shape == rows.shape
        }
        place = sample if given else _changed_most(differences.get(_FEATURES), sample)
        for (layer, _, _), difference in differences.items():
            found = _changed_most(difference, -1)
            if layer is None or difference is None or found < 0:
                continue
            if found == place:
                right.add(layer)
            elif difference[place] < difference[found] / 2:
                wrong.setdefault(
                    layer,
                    f"{layer.name or 'the model'} has sample {sample} in row {found}, and the "
                    f"{source} it in row {place}",
                )
    return wrong, right


def _changed_most(difference: Tensor | None, otherwise: int) -> int:
    """Return the sample whose rows differ most; ``otherwise`` where none does."""
    if difference is None or not difference.any():
        return otherwise
    return int(difference.argmax())


def _rows_of(clusters: "Clusters", batch: Any, graded: bool) -> _Rows:
    """Run a forward pass without clusters; return copies of what the layers and features saw."""
    model, rows, calls = clusters.model, _Rows(), dict[Layer, int]()
    layers = set(clusters.owners.values())

    def see(layer: Layer, values: list[Any]) -> None:
        number = calls[layer] = calls.get(layer, -1) + 1
        for place, value in enumerate(values if number < _CALLS else []):
            if isinstance(value, Tensor) and value.dim() and (graded or not value.requires_grad):
                rows[layer, number, place] = value.detach().clone()

    def see_features(tensor: Tensor | None) -> None:
        if tensor is not None:
            rows[_FEATURES] = tensor.detach().clone()

    def watch(layer: Layer) -> Any:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            see(layer, [*args, *kwargs.values()])

        return layer.module.register_forward_pre_hook(before, with_kwargs=True)

    handles = [watch(layer) for layer in layers]
    if clusters.features not in (None, OUTPUT_GRADIENT):
        layer = model.get_submodule(clusters.features)
        handles.append(
            layer.register_forward_hook(lambda _, args, out: see_features(first_tensor(out)))
        )
    try:
        with _asleep(clusters), same_draws(model):
            output = called(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if clusters.features == OUTPUT_GRADIENT:
        see_features(next((out for out in tensors_in(output) if out.requires_grad), None))
    return rows


@contextmanager
def _asleep(clusters: "Clusters") -> Iterator[None]:
    accumulator = clusters.accumulator
    before, accumulator.asleep = accumulator.asleep, True
    try:
        yield
    finally:
        accumulator.asleep = before


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Give back afterwards the random numbers that were drawn, of torch, Python and NumPy."""
    numpy = sys.modules.get("numpy")
    devices = {param.device for param in model.parameters() if param.device.type == "cuda"}
    state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(list(devices)))
        try:
            yield
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


def _with_another(batch: Any, sample: int, samples: int, dim: int) -> Any:
    """Return a batch whose one sample is replaced by another one; None if all are alike."""
    tensors = [
        t for t in tensors_in(batch if not isinstance(batch, Mapping) else list(batch.values()))
        if t.dim() > dim and t.shape[dim] == samples
    ]  # fmt: skip
    for other in range(samples):
        if any(not torch.equal(t.select(dim, sample), t.select(dim, other)) for t in tensors):
            break
    else:
        return None

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() <= dim or value.shape[dim] != samples:
                return value
            copy = value.detach().clone()
            copy.select(dim, sample).copy_(value.select(dim, other).detach())
            return copy
        if isinstance(value, Mapping):
            return {key: replaced(entry) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)([replaced(entry) for entry in value])
        return value

    return replaced(batch)


def _difference(before: Tensor, now: Tensor, samples: int, dim: int) -> Tensor | None:
    """Return how much each sample's rows of a tensor differ, ``(B,)``; None if it has none."""
    if before.dim() > dim and before.shape[dim] == samples:
        before, now = before.movedim(dim, 0), now.movedim(dim, 0)
    elif dim or before.shape[0] % samples or not before.numel():
        return None
    apart = (now.double() - before.double()).abs().nan_to_num()
    return apart.reshape(samples, -1).amax(dim=1)
