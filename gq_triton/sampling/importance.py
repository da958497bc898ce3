"""Batches drawn by an upper bound of each sample's gradient norm, wherever that pays.

Katharopoulos and Fleuret, "Not All Samples Are Created Equal" (2018), Algorithm 1. Shapes: N
samples in the dataset, B of them scored, b drawn, W processes.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from gq_triton.sampling import presample as law
from gq_triton.sampling.checks import check_data, check_model
from gq_triton.sampling.costs import EpochCost
from gq_triton.sampling.fetch import Fetch, Fetched, moved, pick, split_batch
from gq_triton.sampling.gate import Gate, Reading
from gq_triton.sampling.importance_options import check_loader_options, check_options
from gq_triton.sampling.ranks import check_samples, place, shard, stream
from gq_triton.sampling.scores import Loss, as_module
from gq_triton.sampling.watch import device_of, run_model
from gq_triton.saved.rules import Exactly, Flag, Integer, ListOf, Maybe, Number, Record, check

__all__ = ["ImportanceBatch", "ImportanceLoader"]


class ImportanceBatch(NamedTuple):
    """One batch of an ``ImportanceLoader``.

    Attributes:
        indices: places of the samples in the dataset, ``(b,)`` int64, on the CPU.
        inputs: what the model takes, on the model's device.
        targets: what the loss takes, on the model's device.
        weights: the factors of the samples' losses, ``(b,)`` in torch's default type, on the
            model's device. The gradient of the weighted losses' mean has the gradient of the whole
            dataset's mean loss as its expectation.
    """

    indices: Tensor
    inputs: Any
    targets: Any
    weights: Tensor


class ImportanceLoader:
    r"""Batches in which hard samples come more often, and count less, once that pays.

    A step by score reads ``presample * batch_size`` samples, runs the model on them once without a
    graph, and draws ``batch_size`` of them by ``importance_score``. Steps are by score while
    ``tau``, the moving average of ``variance_reduction``, is above ``tau_th``. Before that batches
    are uniform, and the scores that ``tau`` needs are those of the model's own answers in training:
    a hook takes them, almost for nothing, from the first forward pass of as many samples after a
    batch. (A loop that runs the model on parts of the batch has no such pass, nor has one that
    compiled the very model that this loader was given: there the loader scores the batch.)

    All draws are with replacement, and ``tau`` starts from 0 without correction, as in the authors'
    code. Scoring runs the model in evaluation mode and leaves every module's mode as it was. No
    global generator is read.

    *Several processes.* Under ``torch.distributed`` every epoch divides the dataset at random, each
    rank draws from its own part, and ``tau`` is the mean over the ranks (one message of three
    numbers per step), so that all ranks score in the same steps. The batch is ``batch_size`` per
    rank.

    *Worker processes* read ahead, so what a step reads was decided as many steps ago as there are
    batches under way, ``num_workers * prefetch_factor``.

    Args:
        dataset: a map-style dataset of N samples. A batch is ``(inputs, ..., targets)``, or a dict
            whose ``"labels"`` are the targets; ``split`` says what else it is.
        model: the model that is trained, also within DDP. Inputs that are a tuple or list are its
            arguments, those in a dict its keywords.
        loss: the loss by which samples are scored, as in ``importance_score``.
        batch_size: b, at least 1.
        presample: B / b; ``int(presample * b)`` must exceed b. The authors advise 2 to 6.
        tau_th: the threshold of ``tau``; None takes that of the cost model, ``(B + 3b) / (3b)``.
            ``math.inf`` never draws by score. It may be set at any time, as after a warm-up.
        schedule: ``"constant_batch"``; ``"constant_time"``, where a step by score takes the time of
            a uniform one and trains on fewer samples than ``batch_size``; or
            ``"constant_variance"``, where ``batch_size`` samples are scored and as many of them
            trained on as give a uniform batch's variance. The last two set B themselves.
        score: ``"gradient"``; ``"loss"``, by which outliers are drawn most of all; or ``"norm"``,
            the gradient's true norm (``gradient_norms``), which costs three times as much, and for
            uniform steps too: for studies of what the bound loses.
        weight_power: k of the biased variant, at most 1: weights ``w^k``, scaled. 1 is unbiased.
        power: exponent of the scores, from 0 to 1.
        smooth: what is added to every score, in the scores' unit.
        smooth_mean: how much of the mean score of past steps is added to every score.
        gate: a number of scores ``(S,)`` whose moving average must pass ``tau_th`` in place of
            ``tau``: ``total_variation``, or ``lambda s: 1 / s.mean()``, which waits until scores
            are small.
        steps: batches per epoch; None takes ``ceil(N / (W b))``.
        split: ``batch -> (inputs, targets)``, of what ``collate_fn`` returns.
        forward: ``(model, inputs) -> outputs``, how the model is run to score, as with autocast.
        collate_fn: makes a batch of a list of samples; None is torch's default.
        seed: seed of all draws, the same on all ranks.
        num_replicas: W; None asks ``torch.distributed``.
        rank: this process; None asks ``torch.distributed``.
        num_workers: worker processes that read the dataset.
        **options: ``pin_memory``, ``prefetch_factor``, ``persistent_workers``, ``worker_init_fn``,
            ``timeout`` and ``multiprocessing_context`` of ``torch.utils.data.DataLoader``.

    Attributes:
        tau: the moving average.
        tau_th: the threshold.
        costs: an ``EpochCost`` for each epoch that has begun, the present one last.

    Raises:
        TypeError: the dataset has no length, the model is no module, the loss no loss, or an
            unknown option is given.
        ValueError: an argument out of its range, a dataset that is smaller than a batch; later,
            scores that are negative, infinite or NaN.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> x, y = torch.randn(512, 8), torch.randint(3, (512,))
        >>> model, data = torch.nn.Linear(8, 3), torch.utils.data.TensorDataset(x, y)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = ImportanceLoader(data, model, cross_entropy, batch_size=32)
        >>> for indices, inputs, targets, weights in loader:
        ...     losses = cross_entropy(model(inputs), targets, reduction="none")
        ...     optimizer.zero_grad()
        ...     (weights * losses).mean().backward()
        ...     optimizer.step()
        >>> len(loader), loader.costs[-1].trained
        (16, 512)
    """

    def __init__(
        self,
        dataset: Any,
        model: nn.Module,
        loss: Loss,
        batch_size: int,
        presample: float = 3.0,
        tau_th: float | None = None,
        *,
        schedule: str = "constant_batch",
        score: str = "gradient",
        weight_power: float = 1.0,
        power: float = 1.0,
        smooth: float = 0.0,
        smooth_mean: float = 0.0,
        gate: Callable[[Tensor], Any] | None = None,
        steps: int | None = None,
        split: Callable[[Any], tuple[Any, Any]] | None = None,
        forward: Callable[[Any, Any], Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        check_data(dataset)
        check_model(model)
        as_module(loss)
        check_loader_options(options)
        self.num_replicas, self.rank = place(num_replicas, rank)
        check_options(
            batch_size=batch_size, presample=presample, tau_th=tau_th, schedule=schedule,
            score=score, weight_power=weight_power, power=power, smooth=smooth,
            smooth_mean=smooth_mean, steps=steps, seed=seed, num_workers=num_workers, gate=gate,
            forward=forward,
        )  # fmt: skip
        self._samples, self.batch_size = len(dataset), batch_size
        if self._samples < batch_size * self.num_replicas:
            raise ValueError(
                f"the dataset must have at least the {batch_size * self.num_replicas} samples of a "
                f"batch of all ranks, got {self._samples}"
            )
        self.model, self.loss, self.schedule, self.presample = model, loss, schedule, presample
        self._price = 1 + law.BACKWARD if score == "norm" else 1.0
        cheapest = law.threshold(schedule, batch_size, presample, self._price)
        self.tau_th = cheapest if tau_th is None else tau_th
        smoothing = law.Smoothing(power, smooth, smooth_mean)
        self._gate = Gate(
            model, loss, score, forward or run_model, smoothing, self.num_replicas, self._scored,
            gate,
        )  # fmt: skip
        self._weight_power, self._split = weight_power, split or split_batch
        self._collate, self._seed = collate_fn or default_collate, seed
        self._steps = steps or -(-self._samples // (batch_size * self.num_replicas))
        self.costs: list[EpochCost] = []
        # The epoch, whether it has begun, and the batches of it that were given.
        self._epoch, self._begun, self._step = 0, False, 0
        self._resumes, self._turn = False, 0
        self._compared = False  # with the lengths of the other ranks' datasets
        # Batches that are being read; and, of a loaded state, plans of batches still to be asked.
        self._under_way: deque[tuple[law.Plan, Tensor]] = deque()
        self._again: deque[law.Plan] = deque()
        self._part: Tensor | None = None
        self._loaded: Reading | None = None
        self._base = torch.Generator()
        self._data = DataLoader(
            Fetch(dataset, self._collate),  # pyright: ignore[reportArgumentType]
            batch_size=None,
            sampler=_Requests(self),
            num_workers=num_workers,
            collate_fn=_unchanged,
            generator=self._base,
            **options,
        )

    @property
    def tau(self) -> float:
        """The moving average of ``variance_reduction``."""
        return self._gate.tau

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self._steps

    def __iter__(self) -> Iterator[ImportanceBatch]:
        """Yield the batches of the next epoch, or what a loaded state has left of its epoch."""
        self._turn += 1
        turn = self._turn
        self._begin()
        device = device_of(self.model)
        handle = self.model.register_forward_hook(self._gate.watch)
        try:
            batches = iter(self._data)
            while self._step < self._steps:
                fetched: Fetched = next(batches)
                plan, indices = self._under_way.popleft()
                if plan.scored:
                    batch = self._by_score(plan, indices, fetched, device)
                else:
                    batch = self._uniform(indices, fetched, device)
                self._step += 1
                yield batch
                if turn != self._turn:
                    raise RuntimeError("another loop over this ImportanceLoader has begun since")
                self._gate.settle()
        finally:
            # What the model answered is kept: state_dict() may be asked for after a loop was left.
            handle.remove()
        self._epoch, self._begun, self._step = self._epoch + 1, False, 0

    def state_dict(self) -> dict[str, Any]:
        """Return where the run is, for a run that continues with the next batch.

        Call it after the model has run on the batch: the state then holds what that says of
        ``tau``. Under several processes any rank's state serves all of them; a run whose ranks each
        load their own continues bit for bit. Only the model's answers and this state decide what
        comes next; the model has a state of its own.
        """
        cost = self.costs[-1] if self._begun else self._cost()
        reading = self._gate.answered or self._loaded
        plans = [*(plan for plan, _ in self._under_way), *self._again]
        return {
            **self._fixed(),
            "epoch": self._epoch,
            "step": self._step,
            "begun": self._begun,
            "tau": self.tau,
            "mean": self._gate.mean,
            "level": self._gate.level,
            "reading": None if reading is None else list(reading),
            "plans": [list(plan) for plan in plans],
            "cost": [cost.steps, cost.steps_by_score, cost.scored, cost.trained],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; the next loop continues there.

        Raises:
            ValueError: the state is of another dataset, batch size, number of ranks or seed, or was
                altered. Nothing is changed.
        """
        positive = Number(low=0)
        rules = {name: Exactly(value) for name, value in self._fixed().items()} | {
            "epoch": Integer(),
            "step": Integer(0, self._steps),
            "begun": Flag(),
            "tau": positive,
            "mean": positive,
            "level": Number(),
            "reading": Maybe(ListOf(Number(), 3)),
            "plans": ListOf(ListOf(Integer(), 2)),
            "cost": ListOf(Integer(), 4),
        }
        if "level" not in state and "tau" in state:  # of version 0.2.0, which had no other gate
            reading = state.get("reading")
            state = {**state, "level": state["tau"]}
            if isinstance(reading, list):
                state["reading"] = [*reading, *reading[:1]]
        check(state, Record(rules), "the saved ImportanceLoader")
        self._turn += 1  # a loop that is running ends with an error
        self._gate.forget()
        self._epoch, self._step, self._begun = state["epoch"], state["step"], state["begun"]
        self._resumes = self._begun
        self._gate.tau, self._gate.mean = state["tau"], state["mean"]
        self._gate.level = state["level"]
        self._loaded = None if state["reading"] is None else Reading(*state["reading"])
        self._under_way.clear()
        self._again = deque(law.Plan(*plan) for plan in state["plans"])
        self.costs = [self._cost(*state["cost"])] if self._begun else []

    # --- an epoch

    def _fixed(self) -> dict[str, int]:
        """Return what must be the same in a run that continues this one."""
        return {
            "samples": self._samples,
            "batch_size": self.batch_size,
            "num_replicas": self.num_replicas,
            "steps": self._steps,
            "seed": self._seed,
        }

    def _begin(self) -> None:
        """Begin an epoch, or continue one."""
        if not self._compared and self.num_replicas > 1 and dist.is_initialized():
            check_samples(self._samples)
        self._compared = True
        self._under_way.clear()
        if not self._resumes:
            self._epoch += self._begun  # a loop was left before its end
            self._step = 0
            self._again.clear()
            self.costs.append(self._cost())
        self._begun, self._resumes = True, False
        self._gate.forget()
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._gate.learn(loaded)
        name = self._seed, self._epoch
        self._part = shard(self._samples, self.num_replicas, self.rank, *name, "parts")
        # Seeds of worker processes: not those of the global generator, and the same on resumption.
        self._base.manual_seed(stream(*name, self.rank, "workers").initial_seed())

    def _ask(self, step: int) -> tuple[law.Plan, Tensor]:
        """Decide what a step reads; called when its batch is asked for."""
        if self._again:
            plan = self._again.popleft()
        elif self._gate.level > self.tau_th:
            plan = law.plan(self.schedule, self.batch_size, self.presample, self.tau)
        else:
            plan = law.Plan(0, self.batch_size)
        part, generator = self._part, stream(self._seed, self._epoch, self.rank, step, "read")
        highest = self._samples if part is None else len(part)
        indices = torch.randint(highest, (plan.read,), generator=generator)
        return plan, indices if part is None else part[indices]

    # --- a batch

    def _uniform(self, indices: Tensor, fetched: Fetched, device: torch.device) -> ImportanceBatch:
        inputs, targets = self._split(moved(fetched.batch, device))
        self._gate.wait(inputs, targets, len(indices))
        self._count(len(indices))
        weights = torch.full((len(indices),), self._correction)
        return ImportanceBatch(indices, inputs, targets, weights.to(device))

    def _by_score(
        self, plan: law.Plan, indices: Tensor, fetched: Fetched, device: torch.device
    ) -> ImportanceBatch:
        whole = moved(fetched.batch, device)
        scores = self._gate.run(*self._split(whole), plan.scored)
        smooth = self._gate.smooth(scores)
        generator = stream(self._seed, self._epoch, self.rank, self._step, "draw")
        drawn = law.draw(smooth, plan.trained, generator)
        weights = law.weights_of(smooth, drawn, self._weight_power) * self._correction
        self._gate.learn(self._gate.read(scores))
        self._count(plan.trained, by_score=1)
        fetched = fetched._replace(batch=whole)
        inputs, targets = self._split(moved(pick(fetched, drawn, self._collate), device))
        weights = weights.to(device, torch.get_default_dtype())
        return ImportanceBatch(indices[drawn], inputs, targets, weights)

    @property
    def _correction(self) -> float:
        """The factor of this rank's samples: not 1 where W does not divide N."""
        own = len(range(self.rank, self._samples, self.num_replicas))
        return own * self.num_replicas / self._samples

    def _cost(self, *counts: int) -> EpochCost:
        return EpochCost(self._epoch, *counts, price=self._price)

    def _count(self, trained: int, by_score: int = 0) -> None:
        cost = self.costs[-1]
        cost.steps += 1
        cost.steps_by_score += by_score
        cost.trained += trained

    def _scored(self, samples: int) -> None:
        self.costs[-1].scored += samples


class _Requests:
    """The sampler of the DataLoader: what each batch reads, decided when it is asked for."""

    def __init__(self, loader: ImportanceLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[tuple[list[int], bool]]:
        loader = self._loader
        for step in range(loader._step, loader._steps):
            plan, indices = loader._ask(step)
            loader._under_way.append((plan, indices))
            yield indices.tolist(), bool(plan.scored)


def _unchanged(fetched: Any) -> Any:
    return fetched
