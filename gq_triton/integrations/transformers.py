"""The Trainer of Hugging Face Transformers: one callback."""

import uuid
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Unpack

from gq_triton.commands.files import whole_file
from gq_triton.dist.state import HookOptions
from gq_triton.dist.wrappers import carries, find_ddp
from gq_triton.integrations.accelerate import check_synchronization
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
from gq_triton.living import living
from gq_triton.options import ClusterOptions, LawOptions
from gq_triton.saved.files import DAMAGE, load_checked
from gq_triton.saved.rules import Exactly, Record, check

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ModuleNotFoundError as error:
    if not is_of("transformers", error):
        raise
    raise ModuleNotFoundError(missing("transformers"), name="transformers") from error

__all__ = ["GradQueueCallback"]

# The file of a checkpoint that holds the queue.
FILE = "grad_queue.pt"
# The key of trainer_state.json that names the run which wrote the queue's file.
_KEY = "grad_queue"


@takes(ClusterOptions, LawOptions, HookOptions, without=NOT_TAKEN)
class GradQueueCallback(TrainerCallback):
    """A callback that weights gradients, logs what the law did, and saves the queue.

    On one process the queue is attached to the optimizer, under DDP the hook is registered. With
    ``GQSGD`` or ``GQAdamW`` as the optimizer the callback only logs its figures. Every checkpoint
    folder gets a file ``grad_queue.pt``, which a resumed run loads. Accumulation and loss scale
    follow the trainer. Figures go through ``Trainer.log`` at every logging step, as
    ``grad_queue/mean_weight`` and so on.

    Args:
        per_layer: log the figures of every parameter too.
        resume_from: the checkpoint folder that ``resume_from_checkpoint`` names, where it does not
            lie in ``output_dir``.
        **options: those of ``ClusterOptions``, ``LawOptions`` and ``HookOptions``. With
            ``loss_window`` call ``callback.queue.record_loss(loss)`` in ``compute_loss``.

    Raises:
        ValueError: an option that cannot hold; when training begins, an option that contradicts
            the trainer, or a checkpoint whose queue is missing or was altered.

    For example:

        trainer = Trainer(model, args, callbacks=[GradQueueCallback(rho=3.0)])
    """

    def __init__(
        self,
        *,
        per_layer: bool = False,
        resume_from: str | Path | None = None,
        **options: Unpack[ConnectKeywords],
    ) -> None:
        check_options(options)
        self._options, self._per_layer, self._resume_from = options, per_layer, resume_from
        self._trainer: Trainer | None = None
        self._connection: Connection | None = None
        # Written into trainer_state.json and into the queue's file: they belong together.
        self._run = ""

    @property
    def queue(self) -> Weighing:
        """The ``GradQueue``, ``GradQueueState`` or optimizer that weights, from ``train`` on."""
        if self._connection is None:
            raise RuntimeError("the queue exists from the beginning of Trainer.train on")
        return self._connection.queue

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, or register under DDP, and load the saved queue."""
        self._end()
        trainer = self._trainer = _trainer_of(self)
        ddp = find_ddp(trainer)
        if args.n_gpu > 1 and self._options.get("n_clusters") is not None:
            raise ValueError(
                "DataParallel runs copies of the model, which have no clusters: start the script "
                "with torchrun, one process per GPU"
            )
        passes = args.gradient_accumulation_steps
        check_synchronization(trainer.accelerator, ddp, passes)
        model = trainer.accelerator.unwrap_model(trainer.model)
        known = None if self._connection is None else self._connection.on_ranks
        if ddp is None or known is None or not carries(ddp, known):
            self._connection = Connection(
                model,
                ddp,
                [trainer.optimizer],  # pyright: ignore[reportArgumentType]
                self._options,
                ranks=args.world_size,
                passes=passes,
                setting="gradient_accumulation_steps",
                scaler=trainer.accelerator.scaler,
            )
        assert self._connection is not None
        if state.global_step > 0 and self._connection.saved_here:
            self._load(args, state)
        self._run = uuid.uuid4().hex
        _notes(state)[_KEY] = {"run": self._run}

    def _load(self, args: TrainingArguments, state: TrainerState) -> None:
        """Load the queue of the checkpoint that the trainer has resumed."""
        folder = Path(self._resume_from or _folder(args, state))
        noted = _notes(state).get(_KEY)
        if not isinstance(noted, dict):
            raise ValueError(
                "the checkpoint was saved without this callback, so training would not go on as it "
                "was: begin a new run from its weights, or train without the callback"
            )
        path = folder / FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {FILE}: give the folder that resume_from_checkpoint names as "
                "resume_from too"
            )
        try:
            saved = load_checked(path)
        except DAMAGE as error:
            raise ValueError(f"{path} is damaged: resume from an earlier checkpoint") from error
        run, step = Exactly(noted.get("run")), Exactly(state.global_step)
        check(saved, Record({"run": run, "step": step, "queue": Record({})}), str(path))
        self.queue.load_state_dict(saved["queue"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the queue into the checkpoint folder."""
        if args.save_only_model or self._connection is None or not self._connection.saved_here:
            return
        saved = self.queue.state_dict()  # on every rank: with slices or clusters it communicates
        if args.should_save:
            with whole_file(_folder(args, state) / FILE) as file:
                content = {"run": self._run, "step": state.global_step, "queue": saved}
                torch.save(content, file)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the figures of the step, through the trainer."""
        if control.should_log and self._trainer is not None:
            self._trainer.log(scalars(self.queue, self._per_layer))
            control.should_log = True  # Trainer.log clears it, and the loss is yet to be logged

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the weighting; the queue stays readable."""
        self._end()

    def _end(self) -> None:
        self._trainer = None
        if self._connection is not None:
            self._connection.end()


def _notes(state: TrainerState) -> dict[str, Any]:
    """Return the dict that ``trainer_state.json`` keeps for callbacks."""
    notes: Any = state.stateful_callbacks
    return notes


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir, f"checkpoint-{state.global_step}")


def _trainer_of(callback: TrainerCallback) -> Trainer:
    """Return the trainer of a callback, which no callback is given.

    The function looks through all living objects, which takes milliseconds: once per training.
    """
    for candidate in living(Trainer):
        handler = getattr(candidate, "callback_handler", None)
        if any(own is callback for own in getattr(handler, "callbacks", ())):
            return candidate
    raise RuntimeError("this callback belongs to no living Trainer: pass it as callbacks=[...]")
