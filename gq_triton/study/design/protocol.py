"""The order of a study: every arm is tuned, then it and its controls run on fresh seeds."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from gq_triton.study.design.arms import ARMS, Arm
from gq_triton.study.design.config import FIRST_TUNING_SEED, StudyConfig
from gq_triton.study.design.controls import CONTROLS, Tuned, altered, applicable
from gq_triton.study.design.law import NO_LAW, Recipe, StudyLaw
from gq_triton.study.design.space import Settings, Space, at_edge, candidates
from gq_triton.study.design.trial import EVALUATE, TUNE, Record, Records, Trial
from gq_triton.tasks import StudyTask

__all__ = ["Cell", "Choice", "cells", "missing", "progress"]


@dataclass(frozen=True)
class Choice:
    """The settings that tuning chose for an arm.

    Args:
        settings: the chosen settings by name.
        recipe: the same, with the arm's law.
        score: their mean validation score over the tuning seeds.
        edges: settings beyond which no trial went, see ``at_edge``.
        measured: mean norm ratio and mean weight of those runs; 1 without a law.
        diverged: number of tuning trials of which a run diverged.
    """

    settings: Settings
    recipe: Recipe
    score: float
    edges: list[str]
    measured: dict[str, float]
    diverged: int


@dataclass
class Cell:
    """One arm at one batch size of one task.

    Its choice, once made, is kept: records are added, never changed.

    Args:
        config: options of the study.
        task: name of the task.
        batch_size: samples per step.
        arm: the arm.
    """

    config: StudyConfig
    task: str
    batch_size: int
    arm: Arm

    def __post_init__(self) -> None:
        self._choice: Choice | None = None
        self._known: list[Trial] | None = None

    @property
    def entry(self) -> StudyTask:
        """What is known of the task before its data is read."""
        return self.config.entry(self.task)

    @property
    def n_clusters(self) -> int | None:
        """K at this batch size, or None for no clusters."""
        return self.arm.clusters_at(self.batch_size, self.config.best_batch)

    @cached_property
    def candidates(self) -> list[Settings]:
        """The settings that tuning tries."""
        config = self.config
        space = Space(
            lr=config.lr_range(self.arm.family),
            beta1=config.beta1,
            warmup=config.warmup,
            rho=config.rho_range,
            queue_length=config.queue_length,
        )
        return candidates(self.arm.tuned, space, config.trials)

    @cached_property
    def tuning(self) -> list[list[Trial]]:
        """The tuning trials: a list by tuning seed for each of the candidates."""
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.config.tuning_seeds)
        return [
            [self._trial(self._recipe(settings), seed, TUNE) for seed in seeds]
            for settings in self.candidates
        ]

    def _recipe(self, settings: Settings) -> Recipe:
        plain = {name: settings[name] for name in ("lr", "beta1", "warmup")}
        return Recipe(**plain, law=self._law(settings))

    def _law(self, settings: Settings) -> StudyLaw:
        law = self.arm.law
        if not law.queued:
            return law
        clusters = self.n_clusters
        own: dict[str, Any] = {"n_clusters": clusters}
        if clusters is None:
            # Without clusters their options do nothing. At their defaults, equal runs have one key.
            own |= {"cluster_by": NO_LAW.cluster_by, "centroid_scale": NO_LAW.centroid_scale,
                    "population_power": NO_LAW.population_power}  # fmt: skip
        if "rho" in settings:
            own |= {"rho": settings["rho"], "queue_length": int(settings["queue_length"])}
        law = replace(law, **own)
        return NO_LAW if law.rho == 1 and clusters is None else law

    def _trial(self, recipe: Recipe, seed: int, purpose: str) -> Trial:
        config = self.config
        return Trial(
            task=self.task,
            batch_size=self.batch_size,
            steps=config.steps,
            schedule=config.schedule,
            looks_every=config.looks_every,
            target=config.target(self.task),
            base=self.arm.base,
            lr=recipe.lr,
            seed=seed,
            purpose=purpose,
            law=recipe.law,
            class_weighted=self.arm.class_weighted,
            processes=config.nproc_per_trial,
            device=config.device,
            beta1=recipe.beta1,
            warmup=recipe.warmup,
            command=config.command,
        )

    def choice(self, records: Records) -> Choice | None:
        """Return what tuning chose, or None while tuning trials are missing.

        The best mean validation score wins; of equal scores the lower validation loss, then the
        smaller learning rate. A diverged run has the score of a model that learnt nothing.
        """
        if self._choice is not None:
            return self._choice
        runs = [[records.get(trial) for trial in trials] for trials in self.tuning]
        known = [[r for r in some if r is not None] for some in runs]
        if any(len(some) < self.config.tuning_seeds for some in known):
            return None
        tried = self.candidates
        order = sorted(range(len(tried)), key=lambda n: self._rank(known[n], tried[n]))
        best = order[0]
        self._choice = Choice(
            settings=tried[best],
            recipe=self._recipe(tried[best]),
            score=_mean([r.result["validation_score"] for r in known[best]]),
            edges=at_edge(tried[best], tried),
            measured={
                name: _mean([r.result[name] or 1.0 for r in known[best]])
                for name in ("norm_ratio", "mean_weight")
            },
            diverged=sum(any(r.result["diverged_at"] for r in some) for some in known),
        )
        return self._choice

    def known(self, records: Records) -> list[Trial]:
        """Return the trials known so far: tuning, and after it evaluation and controls."""
        if self._known is not None:
            return self._known
        found = [trial for trials in self.tuning for trial in trials]
        choice = self.choice(records)
        if choice is not None:
            found += self.evaluation(choice)
            found += [trial for name in self.controls() for trial in self.control(name, choice)]
            self._known = list({trial.key: trial for trial in found}.values())
            return self._known
        return found

    def _rank(self, records: list[Record], settings: Settings) -> tuple[float, float, float]:
        score = _mean([r.result["validation_score"] for r in records])
        losses = [r.result["validation_loss"] for r in records]
        loss = float("inf") if None in losses else _mean(losses)
        return -self.entry.gain(score, 0.0), loss, settings["lr"]

    def evaluation(self, choice: Choice) -> list[Trial]:
        """Return the trials of the tuned arm on the evaluation seeds."""
        return self._seeds(choice.recipe)

    def _seeds(self, recipe: Recipe) -> list[Trial]:
        first = self.config.first_seed
        return [
            self._trial(recipe, seed, EVALUATE) for seed in range(first, first + self.config.seeds)
        ]

    def controls(self) -> list[str]:
        """Return the names of the controls that this arm is compared with here."""
        if self.arm.baseline is None or self.arm.law.rho == 1 or not self.arm.law.queued:
            return []
        law = replace(self.arm.law, n_clusters=self.n_clusters)
        labels = self.entry.labels
        names = [name for name in self.config.controls if applicable(name, law, labels)]
        if self.config.command:
            names = [name for name in names if self.config.can_run(CONTROLS[name], name)]
        if self.config.nproc_per_trial > 1:
            names = [name for name in names if not CONTROLS[name].inside]
            if self.n_clusters is not None and self.n_clusters < 2 * self.config.nproc_per_trial:
                # Each rank has one cluster, and permuting its samples changes nothing.
                names = [name for name in names if name != "random-clusters"]
        return names

    def control(self, name: str, choice: Choice) -> list[Trial]:
        """Return the trials of a control on the evaluation seeds."""
        return self._seeds(altered(name, Tuned(choice.recipe, self.arm.family, **choice.measured)))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def cells(config: StudyConfig) -> list[Cell]:
    """Return every arm at every batch size of every task; class-weighted arms need classes."""
    return [
        Cell(config, task, size, ARMS[arm])
        for task in config.tasks
        for size in config.batch_sizes
        for arm in config.arms
        if config.entry(task).labels or not ARMS[arm].class_weighted
    ]


def missing(cell: Cell, records: Records) -> list[Trial]:
    """Return the trials of a cell that can start now and have no record."""
    return [trial for trial in cell.known(records) if records.get(trial) is None]


def progress(all_cells: list[Cell], records: Records) -> tuple[int, int]:
    """Return the number of finished trials, and that of all trials as far as it is known.

    The latter falls when tuning chooses the same settings for several arms, which then share runs.
    """
    known = {trial.key: trial for cell in all_cells for trial in cell.known(records)}
    finished = sum(records.get(trial) is not None for trial in known.values())
    unknown = sum(
        cell.config.seeds * (1 + len(cell.controls()))
        for cell in all_cells
        if cell.choice(records) is None
    )
    return finished, len(known) + unknown
