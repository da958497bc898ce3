"""The parts that all frameworks share: choice of the door, options, numbers to log."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gq_triton.dist import GradQueueState, register
from gq_triton.dist.state import NOT_ON_RANKS, HookOptions
from gq_triton.extras import how_to_install
from gq_triton.grad_queue import GradQueue, Handle
from gq_triton.keywords import read
from gq_triton.optim.base import GradQueueOptimizer
from gq_triton.options import ClusterKeywords, ClusterOptions, LawKeywords, LawOptions
from gq_triton.wrappers import innermost

__all__ = [
    "NOT_TAKEN",
    "ConnectKeywords",
    "Connection",
    "Weighing",
    "check_options",
    "is_of",
    "missing",
    "scalars",
]

# Options of the doors that a callback fills in by itself, or that no framework's loop allows.
NOT_TAKEN = "grad_scaler", "mode"
# Options that say nothing where there is one process.
_RANKS_ONLY = "shard_queue", "verify_every"


# The objects that weight gradients.
Weighing = GradQueue | GradQueueState | GradQueueOptimizer


class ConnectKeywords(ClusterKeywords, LawKeywords, total=False):
    """The keywords of the callbacks."""

    shard_queue: bool
    verify_every: int


def missing(framework: str) -> str:
    """Return the sentence for a framework that is not installed."""
    return (
        f"gq_triton.integrations.{framework} needs {framework}: {how_to_install('frameworks')}, or "
        f"pip install {framework}"
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Raise an error that names what is wrong with a callback's options, before any training.

    Raises:
        TypeError: an option that does not exist, or that the framework knows by itself.
        ValueError: an option that cannot hold.
    """
    if "grad_scaler" in options:
        raise TypeError("leave grad_scaler out: the framework's own GradScaler is used")
    clusters, _, _ = read(options, ClusterOptions, LawOptions, HookOptions)
    if clusters.mode != "one_backward":
        raise ValueError(
            f'mode="{clusters.mode}" replaces loss.backward(), which the framework calls itself: '
            'use mode="one_backward"'
        )


def is_of(framework: str, error: ModuleNotFoundError) -> bool:
    """Return whether it is the framework itself that an import did not find."""
    return (error.name or "").partition(".")[0] == framework


class Connection:
    """A ``GradQueue`` that is attached, or a ``GradQueueState`` that is registered.

    Where the run's optimizer is a ``GQSGD`` or ``GQAdamW``, which weights by itself and is saved by
    the framework, the connection only reads its figures.

    Args:
        model: the bare model.
        ddp: the DDP module around it, or None.
        optimizers: the run's optimizers, bare or in the framework's wrappers.
        options: options that ``check_options`` has passed.
        ranks: the number of processes that train this model.
        passes: the number of backward passes of a step, as the framework counts them.
        setting: the framework's name of that number.
        scaler: the framework's ``GradScaler``, or None.

    Raises:
        ValueError: the options and the framework's setting contradict each other, or several
            processes train without DDP.
    """

    def __init__(
        self,
        model: nn.Module,
        ddp: DistributedDataParallel | None,
        optimizers: Iterable[Optimizer],
        options: Mapping[str, Any],
        *,
        ranks: int,
        passes: int,
        setting: str,
        scaler: Any,
    ) -> None:
        given = dict(options)
        clustered = given.get("n_clusters") is not None
        if clustered:
            wanted = given.setdefault("accumulation_steps", passes)
            if wanted != passes:
                raise ValueError(
                    f"accumulation_steps={wanted}, but {setting} is {passes}: leave "
                    f"accumulation_steps out, it follows {setting}"
                )
        self._handles: list[Handle] = []
        self.queue: Weighing
        found = [innermost(optimizer) for optimizer in optimizers]
        own = [optimizer for optimizer in found if isinstance(optimizer, GradQueueOptimizer)]
        if own:
            if options or len(found) > 1:
                raise ValueError(
                    f"{type(own[0]).__name__} weights its gradients itself: give the options to "
                    "the optimizer, which must be the run's only one; without options its figures "
                    "are logged"
                )
            self.queue = own[0]
            self.queue._measures = True  # as the first call of metrics() does
            return
        if ddp is not None:
            _check_on_ranks(given)
            self.queue = register(ddp, grad_scaler=scaler, **_without(given, NOT_ON_RANKS))
            return
        if ranks > 1:
            raise ValueError(
                f"{ranks} processes train the model and no DistributedDataParallel is around it: "
                "use the strategy DDP, or GQSGD or GQAdamW in place of the optimizer, which work "
                "on FSDP2"
            )
        self.queue = GradQueue(model, **_without(given, _RANKS_ONLY))
        for optimizer in found:
            self._handles.append(self.queue.attach(optimizer, grad_scaler=scaler))

    @property
    def saved_here(self) -> bool:
        """Whether the callback saves the queue; an optimizer's is saved with the optimizer."""
        return not isinstance(self.queue, GradQueueOptimizer)

    @property
    def on_ranks(self) -> GradQueueState | None:
        """The state of the DDP hook; None where there is one process."""
        return self.queue if isinstance(self.queue, GradQueueState) else None

    def end(self) -> None:
        """Weight no gradients of the optimizers any more; the queue stays readable."""
        for handle in self._handles:
            handle.remove()


def _without(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def _check_on_ranks(options: Mapping[str, Any]) -> None:
    reduction = options.get("loss_reduction", "mean")
    if reduction != "mean":
        raise ValueError(
            f'loss_reduction="{reduction}" cannot be used with DDP, which averages over the ranks: '
            "use a loss that is a mean over the rank's samples"
        )


def scalars(queue: Weighing, per_layer: bool = False) -> dict[str, float]:
    """Return the figures of the last step as single numbers, as trackers take them.

    Under DDP with ``shard_queue`` or clusters every rank must call.

    Args:
        queue: what weights the gradients.
        per_layer: add the figures of every parameter, as ``grad_queue/mean_weight/NAME``.

    Returns:
        ``grad_queue/mean_weight`` and so on; with clusters also the numbers of samples in the
        smallest and in the largest cluster. Empty before the first step.
    """
    figures = queue.metrics()
    sizes = _flat(figures.pop("cluster_sizes", None))
    if sizes:
        figures |= {"smallest_cluster": float(min(sizes)), "largest_cluster": float(max(sizes))}
    if per_layer:
        for name, own in queue.metrics(per_layer=True).items():
            figures |= {f"{figure}/{name}": value for figure, value in own.items()}
    return {f"grad_queue/{name}": value for name, value in figures.items()}


def _flat(sizes: Any) -> list[int]:
    """Return cluster sizes, those of all ranks where there are several, in one list."""
    if isinstance(sizes, list):
        return [size for part in sizes for size in _flat(part)]
    return [] if sizes is None else [sizes]
