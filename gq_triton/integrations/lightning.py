"""PyTorch Lightning: one callback for the Trainer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from gq_triton.dist.state import HookOptions
from gq_triton.dist.wrappers import find_ddp
from gq_triton.integrations.connect import (
    NOT_TAKEN,
    Connection,
    ConnectKeywords,
    Weighing,
    check_options,
    is_of,
    missing,
    scalars,
)
from gq_triton.keywords import takes
from gq_triton.options import ClusterOptions, LawOptions

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
except ModuleNotFoundError as error:
    if not is_of("lightning", error):
        raise
    raise ModuleNotFoundError(missing("lightning"), name="lightning") from error

__all__ = ["GradQueueCallback"]


@takes(ClusterOptions, LawOptions, HookOptions, without=NOT_TAKEN)
class GradQueueCallback(Callback):
    """A callback that weights gradients, logs what the law did, and saves the queue.

    On one process the queue is attached to the optimizers, under DDP the hook is registered. With
    ``GQSGD`` or ``GQAdamW`` as the optimizer the callback only logs its figures. Checkpoints hold
    the queue. Accumulation, loss and loss scale follow the trainer. Figures go through ``log_dict``
    every ``log_every_n_steps`` steps, as ``grad_queue/mean_weight`` and so on.

    Args:
        per_layer: log the figures of every parameter too.
        **options: those of ``ClusterOptions``, ``LawOptions`` and ``HookOptions``. ``features``
            names a submodule of the LightningModule.

    Raises:
        ValueError: an option that cannot hold; when training begins, an option that contradicts
            the trainer.

    For example:

        trainer = Trainer(strategy="ddp", callbacks=[GradQueueCallback(rho=3.0)])
    """

    def __init__(self, *, per_layer: bool = False, **options: Unpack[ConnectKeywords]) -> None:
        check_options(options)
        clustered = options.get("n_clusters") is not None
        described = clustered and not options.get("labels")
        if described and options.get("features") in (None, "", "output_gradient"):
            raise ValueError(
                "features must name a submodule of the LightningModule: what Lightning calls the "
                "model returns the loss, which describes no sample"
            )
        self._options, self._per_layer, self._clustered = options, per_layer, clustered
        self._connection: Connection | None = None
        self._saved: dict[str, Any] | None = None
        self._undo: Callable[[], None] = _nothing
        self._seen = 0

    @property
    def queue(self) -> Weighing:
        """The ``GradQueue``, ``GradQueueState`` or optimizer that weights, from ``fit`` on."""
        if self._connection is None:
            raise RuntimeError("the queue exists from the beginning of Trainer.fit on")
        return self._connection.queue

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, or register under DDP, and load the saved queue."""
        self._end()
        ddp = find_ddp(trainer.strategy)
        passes = self._passes(trainer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and passes > 1 and ddp is None and self._options.get("loss_window"):
            raise ValueError(
                "loss_window cannot be used with a GradScaler and accumulate_grad_batches > 1 on "
                "one process: leave one of the three out"
            )
        self._connection = Connection(
            pl_module,
            ddp,
            trainer.optimizers,
            self._options,
            ranks=trainer.world_size,
            passes=passes,
            setting="accumulate_grad_batches",
            scaler=scaler,
        )
        if self._clustered and ddp is None:
            self._undo = _call_through(pl_module, "training_step")
        saved, self._saved = self._saved, None
        if saved is not None and self._connection.saved_here:
            self._connection.queue.load_state_dict(saved)
        elif trainer.ckpt_path is not None and self._connection.saved_here:
            raise ValueError(
                f"{trainer.ckpt_path} holds no queue, so training would not go on as it was: load "
                "the weights alone, or train without this callback"
            )
        self._seen = trainer.global_step

    def _passes(self, trainer: Trainer) -> int:
        """Return the number of backward passes of a step, which with clusters may not change."""
        counts = {trainer.accumulate_grad_batches}
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, GradientAccumulationScheduler):
                counts = set(callback.scheduling.values())
        if self._clustered and len(counts) > 1:
            raise ValueError(
                "with clusters the number of accumulated batches must stay the same: leave out "
                "GradientAccumulationScheduler, or n_clusters"
            )
        return max(counts)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Record the loss for ``loss_window``, without the loss scale."""
        if self._connection is None or self._options.get("loss_window") is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        closure = scaler is None and pl_module.automatic_optimization
        if self._connection.on_ranks is None and closure:
            return  # the optimizer's closure returns the loss
        value = loss.detach() * trainer.accumulate_grad_batches
        scale = None if scaler is None or not scaler.is_enabled() else scaler._get_scale_async()
        self.queue.record_loss(value if scale is None else value / scale)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the figures of the step, through Lightning."""
        stepped, self._seen = trainer.global_step != self._seen, trainer.global_step
        every: int = getattr(trainer, "log_every_n_steps", 0)
        if stepped and every and trainer.global_step % every == 0:
            figures = scalars(self.queue, self._per_layer)
            pl_module.log_dict(figures, on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the weighting; the queue stays readable."""
        self._end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End the weighting."""
        self._end()

    def _end(self) -> None:
        self._undo()
        self._undo = _nothing
        if self._connection is not None:
            self._connection.end()

    def state_dict(self) -> dict[str, Any]:
        """Return the queue for the checkpoint; every rank must call, as Lightning does."""
        saves = self._connection is not None and self._connection.saved_here
        return self.queue.state_dict() if saves else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved queue until training begins; only then is there a model to load it for."""
        self._saved = state_dict or None


def _nothing() -> None:
    pass


def _call_through(module: nn.Module, method: str) -> Callable[[], None]:
    """Let a method run inside of ``module(...)``, as Lightning does where a wrapper is around it.

    On one device Lightning calls ``training_step`` alone, and the hooks of the module's forward
    pass, in which clusters begin and end a batch, would not run.

    Returns:
        What undoes it.
    """
    step = getattr(module, method)

    def through(*args: Any, **kwargs: Any) -> Any:
        own = vars(module).get("forward")

        def forward(*inner: Any, **named: Any) -> Any:
            restore()
            return step(*inner, **named)

        def restore() -> None:
            if own is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own

        module.forward = forward
        try:
            return module(*args, **kwargs)
        finally:
            restore()

    setattr(module, method, through)

    def undo() -> None:
        vars(module).pop(method, None)

    return undo
