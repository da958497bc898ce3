"""GradQueue: the plug-in that weights the gradients of any torch optimizer in any loop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import Unpack

from gq_triton.attachment import (
    SCALED,
    WITHIN,
    Added,
    Handle,
    before_step,
    check_dense,
    check_optimizer,
    note_attached,
    own_parameters,
)
from gq_triton.claims import ATTACH, claim, release
from gq_triton.cluster_grad import Check, Clusters, DeclaredPasses, Weigh, check_batch
from gq_triton.cluster_grad.passes import in_backward
from gq_triton.describe import changed, described
from gq_triton.grouping import Groups
from gq_triton.keywords import read, takes
from gq_triton.loss_scale import GradScale, scaler_of
from gq_triton.names import bare, is_divided, parameter_names
from gq_triton.options import ClusterKeywords, ClusterOptions, LawKeywords, LawOptions
from gq_triton.queues import Queues
from gq_triton.ring import flat, local, place_gradients, write_back_
from gq_triton.wrappers import innermost, refuse_wrappers

__all__ = ["GradQueue", "Handle"]


class PlugInKeywords(ClusterKeywords, LawKeywords, total=False):
    """The keywords of ``GradQueue``."""


@takes(ClusterOptions, LawOptions)
class GradQueue:
    """A plug-in that weights gradients by their scarcity just before an optimizer's step.

    A queue holds the last L raw gradients of every parameter. A new gradient is multiplied, element
    by element, by ``clip(|g - mu| / sigma, 1/rho, rho)``, where ``mu`` and ``sigma`` are mean and
    standard deviation of the queue (Grad Queue, arXiv 2404.16917, equations 1 and 2). The user's
    loop does not change.

    With ``n_clusters`` the samples of every batch are first grouped by their features. The mean
    gradient ``c_k`` of each group is weighted, and the weighted means are added up in proportion to
    the groups' populations ``p_k`` (section 3.3, Algorithm 1): ``g* = sum_k p_k w(c_k) c_k``. One
    ``loss.backward()`` computes the sum.

    Args:
        model: the model whose parameters the optimizer updates: bare, compiled, divided by
            ``fully_shard``, or in DDP. With ``n_clusters`` a model in DDP is refused. In a divided
            model every rank groups its own samples: W ranks with K clusters are one process with
            those W * K clusters.
        **options: the options of ``LawOptions`` and ``ClusterOptions``.

    Raises:
        ValueError: an option that cannot hold.

    Examples:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.Adagrad(model.parameters())
        >>> queue = GradQueue(model)
        >>> handle = queue.attach(optimizer)
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> queue.metrics()["mean_weight"]
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        **options: Unpack[PlugInKeywords],
    ) -> None:
        law: LawOptions
        clusters: ClusterOptions
        clusters, law = read(options, ClusterOptions, LawOptions)
        self._options = changed(clusters, law)
        self._serves: list[str] = []
        self._handle: Handle | None = None
        self._grad_scale = GradScale()
        # By parameter name, the statistics of its last weighting with clusters.
        self._statistics: Mapping[str, Tensor] = {}
        self._looked = False  # for a GradScaler that attach was not given
        self._added = Added(model, clusters.strict)
        self._declared = DeclaredPasses(
            clusters.accumulation_steps,
            "divide each of a step's A losses by A and give accumulation_steps=A",
        )
        self._clusters: Clusters | None = None
        params = parameter_names(model)
        if is_divided(model, params):
            self._build_divided(model, law, clusters)
            return
        self._names: dict[Tensor, str] = {param: name for name, param in params.items()}
        self._queues = Queues(params, law)
        if clusters.n_clusters is None:
            return
        if isinstance(bare(model), DistributedDataParallel):
            raise ValueError(
                "with clusters all ranks must share one queue, which GradQueue does not do: use "
                "gq_triton.dist.register(model, n_clusters=..., features=...) in its place"
            )
        sink = Weigh(self._queues, grad_scale=self._grad_scale, together=True)
        self._statistics = sink.statistics
        self._clusters = Clusters(bare(model), self._names, sink, clusters)

    def _build_divided(self, model: nn.Module, law: LawOptions, clusters: ClusterOptions) -> None:
        """Build the queue and the clusters of a model that ``fully_shard`` has divided."""
        # Imported here: few models are divided, and FSDP is slow to import.
        from gq_triton.dist.sharded import ShardedClusters, ShardedQueues, sharded_parameters

        params = sharded_parameters(model)
        self._names = {param: name for name, param in params.items()}
        self._queues = queues = ShardedQueues(params, law)
        if clusters.n_clusters is not None:
            own = ShardedClusters(bare(model), self._names, queues, clusters, self._grad_scale)
            self._clusters, self._statistics = own, own.tables

    def __repr__(self) -> str:
        """Return options that are not the defaults, size, memory, and what the queue serves."""
        serves = f"attached to {', '.join(self._serves)}" if self._serves else "not attached"
        return described(self, self._options, repr(self._queues), serves)

    def attach(self, optimizer: Optimizer, grad_scaler: Any = None) -> Handle:
        """Weight the gradients in every ``optimizer.step()`` from now on.

        Args:
            optimizer: any torch optimizer over parameters of the model. Gradients of other
                parameters that it holds are left as they are; those that came into the model
                after the queue was built are named in a warning. Without clusters several
                optimizers may divide the model's parameters among them. A wrapper that keeps the
                optimizer under ``.optimizer``, as those of Accelerate, Lightning and Fabric do, may
                be given in its place.
            grad_scaler: the loop's ``torch.amp.GradScaler``; needed only with clusters, whose
                gradients are weighted while they carry its scale.

        Returns:
            A handle. ``handle.remove()`` ends the weighting and keeps the queue.

        Raises:
            TypeError: ``optimizer`` is no torch optimizer.
            ValueError: the gradients would be weighted twice, or none of the optimizer's parameters
                belongs to the model.
        """
        optimizer = innermost(optimizer)
        check_optimizer(optimizer, self._names)
        if self._clusters and self._handle is not None:
            raise ValueError("with clusters a GradQueue serves one optimizer: call remove() first")

        before = before_step(optimizer, self._weigh, self.record_loss)
        # With clusters the backward pass weights the gradients, whichever optimizer steps.
        claimed = list(self._names) if self._clusters else own_parameters(optimizer, self._names)
        claim(claimed, before, ATTACH)
        hook = optimizer.register_step_pre_hook(before)
        kind = type(optimizer).__name__
        self._serves.append(kind)
        forget = note_attached(optimizer, self)
        self._grad_scale.scaler = grad_scaler
        restore = guard = None
        if self._clusters is not None:
            restore = self._clusters.install()
            self._clusters.end_with(before)
            guard = self._clusters.model.register_forward_pre_hook(refuse_wrappers)

        def undo() -> None:
            hook.remove()
            forget()
            if restore is not None:
                restore()
            if guard is not None:
                guard.remove()
            release(claimed, before)
            self._serves.remove(kind)
            self._handle = None

        self._handle = Handle(undo)
        return self._handle

    @torch.no_grad()
    def _weigh(self, optimizer: Optimizer) -> None:
        """Weight the gradients that the optimizer is about to use, and queue the raw ones."""
        if self._clusters is not None and in_backward():
            raise RuntimeError(WITHIN)
        # GradScaler sets both for fused optimizers, which unscale gradients and skip steps alone.
        grad_scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        if self._clusters is not None and self._grad_scale.scaler is None and not self._looked:
            self._looked = True
            if grad_scale is not None or scaler_of(optimizer) is not None:
                raise RuntimeError(SCALED)
        done = self._push_clustered(found_inf)
        batches: dict[Any, list[tuple[str, Tensor, Tensor]]] = {}
        for group in optimizer.param_groups:
            place_gradients(group["params"])
            for param in group["params"]:
                name = self._names.get(param)
                if param.grad is None or name in done:
                    continue
                if name is None:
                    self._added.meet(param)
                    continue
                check_dense(name, param.grad)
                grad, like = local(param.grad), local(param)
                key = grad.device, grad.dtype, param.dtype, getattr(param, "placements", None)
                batches.setdefault(key, []).append((name, grad, like))
        self._added.tell()
        if self._clusters is not None and self._clusters.mode == "one_backward":
            later = {name: grad for batch in batches.values() for name, grad, _ in batch}
            self._clusters.accumulator.coverage.note_later(later)
        for batch in batches.values():
            values = [flat(grad, like) for _, grad, like in batch]
            self._queues.weigh_(
                [name for name, _, _ in batch], values, grad_scale=grad_scale, found_inf=found_inf
            )
            for (_, grad, like), value in zip(batch, values, strict=True):
                write_back_(grad, value, like)

    def _push_clustered(self, found_inf: Tensor | None) -> set[str]:
        """Queue the raw gradients that the backward pass kept; return their parameters' names.

        Any other parameter with a gradient is weighted later, as one cluster.

        Args:
            found_inf: a tensor on the device, non-zero if the step is skipped; or None.
        """
        if self._clusters is None:
            return set()
        accumulator = self._clusters.accumulator
        accumulator.settle()
        self._declared.check(accumulator.raw.count_passes())
        raw = accumulator.raw.take_all()
        lost = not raw and any(param.grad is not None for param in accumulator.params.values())
        if lost and self._clusters.mode == "microbatch":
            raise RuntimeError(
                'mode="microbatch" needs GradQueue.backward(losses) in place of loss.backward()'
            )
        self._queues.push(raw, self._statistics, grad_scale=self._grad_scale(), found_inf=found_inf)
        return set(raw)

    def record_loss(self, loss: Tensor | float) -> None:
        """Record the loss of the coming step, from which the effective length follows.

        The call is needed only with ``loss_window``, and only where ``optimizer.step`` gets no
        closure.

        Args:
            loss: the loss before any loss scale: a number, or a tensor of one element.
        """
        self._queues.record_loss(loss)

    def metrics(self, per_layer: bool = False) -> dict[str, Any]:
        """Return figures of the last step's weights, in one transfer to the host.

        Args:
            per_layer: return the first four figures of each parameter by its name.

        Returns:
            ``mean_weight``; ``norm_ratio``, ``|g*| / |g|``; ``saturated_high`` and
            ``saturated_low``, the shares of weights at rho and at 1/rho; ``effective_length``;
            ``cluster_sizes``, None without clusters. Before the first step the dict is empty.
        """
        values = self._queues.metrics(per_layer)
        clusters = {"cluster_sizes": self.cluster_sizes_} if values and not per_layer else {}
        return values | clusters

    @property
    def labels_(self) -> Tensor | None:
        """The cluster of every sample of the last batch, ``(B,)`` int64; None if there is none."""
        groups = self._last_groups()
        return None if groups is None else groups.labels.clone()  # a replay writes to that memory

    @property
    def cluster_sizes_(self) -> list[int] | None:
        """The number of samples in each cluster of the last batch; None if there is none."""
        groups = self._last_groups()
        return None if groups is None else groups.sizes

    def _last_groups(self) -> Groups | None:
        last = None if self._clusters is None else self._clusters.last
        return None if last is None else last.known_groups

    def report(self) -> dict[str, str]:
        """Return, by parameter name, how the parameter's gradient is handled."""
        if self._clusters is None:
            return {
                name: "whole batch" if p.requires_grad else "frozen"
                for p, name in self._names.items()
            }
        return self._clusters.report()

    def check(self, batch: Any, loss: Callable[[Any], Tensor] | None = None) -> Check:
        """Show, before training, how the gradient of every parameter will be found.

        Runs one batch forward and backward. Nothing is queued, and the model keeps its gradients,
        buffers and random numbers.

        Args:
            batch: the arguments of the model: a mapping by name, a tuple or list, or the only one.
            loss: returns the loss of the model's output; by default the output's own ``loss``, or
                the mean square of its tensors.

        Returns:
            A table, to be printed: of each parameter its name, elements, and the words of
            ``report()``.

        Raises:
            ValueError: there are no clusters.
            RuntimeError: with ``strict=True``, where gradients are not known by cluster.

        Examples:
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.PReLU(3))
            >>> queue = GradQueue(model, n_clusters=2, features="0")
            >>> print(queue.check(torch.ones(8, 4)))
            0.weight            12  clusters (Linear)
            0.bias               3  clusters (Linear)
            1.weight             3  clusters (expanded in PReLU)
            100.0% of the trainable elements are clustered
        """
        if self._clusters is None:
            raise ValueError("check needs n_clusters: without clusters every gradient is one")
        return check_batch(self._clusters, batch, loss)

    def set_sample_weights(self, weights: Tensor | None) -> None:
        """Set how much each sample of the coming batches counts in the loss.

        Args:
            weights: ``(B,)``, for example the number of tokens of each sequence where the loss is a
                mean over tokens; None gives all samples equal weight.

        Raises:
            ValueError: there are no clusters.
        """
        if self._clusters is None:
            raise ValueError("set_sample_weights needs n_clusters")
        self._clusters.sample_weights = weights

    def set_labels(self, labels: Tensor | Sequence[int]) -> None:
        """Give the cluster of every sample of the next batch, with ``labels=True``.

        Each forward pass of training takes labels of its own: call before each one, in a step of
        ``cuda_graph`` inside the step.

        Args:
            labels: ``(B,)`` integers, at least 0; samples in the order of their clusters are not
                copied to sort them.

        Raises:
            ValueError: without ``labels=True``, or they are not one integer per sample.
        """
        if self._clusters is None:
            raise ValueError("set_labels needs n_clusters and labels=True")
        self._clusters.set_labels(labels)

    def backward(self, losses: Tensor) -> None:
        """Run the K backward passes of ``mode="microbatch"`` in place of ``loss.backward()``.

        Args:
            losses: per-sample losses ``(B,)``.

        Raises:
            ValueError: another mode, no forward pass before, or not one loss per sample.
        """
        if self._clusters is None or self._clusters.mode != "microbatch":
            raise ValueError('backward(losses) needs n_clusters and mode="microbatch"')
        self._clusters.backward(losses)

    def _tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that go on from step to step; after a load they are others."""
        yield from self._queues.tensors()
        kmeans = None if self._clusters is None else self._clusters.labeller.kmeans
        if kmeans is not None:
            yield from kmeans.kept()

    def digest(self) -> str:
        """Return the SHA-256 of the queue: two digests are equal if all elements are."""
        return self._queues.digest()

    def state_dict(self) -> dict[str, Any]:
        """Return the queue and the state of k-means, as tensors and plain values."""
        clusters = {} if self._clusters is None else {"clusters": self._clusters.state_dict()}
        return self._queues.state_dict() | clusters

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the queue and the state of k-means; training continues bit for bit.

        Raises:
            ValueError: the state belongs to another model or other options. Nothing is changed.
        """
        self._queues.check_saved(state)
        clusters = state.get("clusters", {})
        if self._clusters is not None:
            self._clusters.check_saved(clusters)
        self._queues.load_state_dict(state)
        if self._clusters is not None:
            self._clusters.load_state_dict(clusters)
