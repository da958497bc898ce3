"""The protocol of a study for other tools: Optuna, Ray or a loop of one's own run the trials.

A study decides what is trained: tuning with equal budgets, then fresh seeds and controls. Whatever
runs the trials asks which can start, and tells what came out. The folder is the one of
``gq-triton study run``, which can continue it, and ``gq-triton study report`` reports it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from gq_triton.commands.files import whole_file
from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.protocol import cells, missing, progress
from gq_triton.study.design.study_file import CONFIG, write_toml
from gq_triton.study.design.trial import Record, Trial
from gq_triton.study.run.records import Store
from gq_triton.study.trials.told import record_of, settings_of

__all__ = ["Study"]


class Study:
    """A study whose trials run elsewhere. One process holds a study's folder at a time.

    Args:
        folder: the folder of the study; one that holds records is continued.
        options: the options of ``gq-triton study run`` by name, as in ``study.toml``. With
            ``command`` (any text that holds the names in braces) the trials are those of a
            training of one's own.

    Raises:
        Refusal: an option is unknown or not allowed.

    Examples:
        >>> import tempfile
        >>> study = Study(tempfile.mkdtemp(), arms=["sgdm"], batch_sizes=[8], trials=2, seeds=2,
        ...               tuning_seeds=1, command="mine {lr} {beta1} {warmup} {seed}")
        >>> while trials := study.ask():
        ...     for trial in trials:
        ...         settings = study.settings(trial)
        ...         study.tell(trial, validation_score=settings["lr"], test_score=0.5)
        >>> study.progress
        (4, 4)
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        self.config = StudyConfig.of(options)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / CONFIG) as file:
            file.write(write_toml(self.config).encode())
        self._store, self._asked = Store(self.folder), set[str]()
        self._store.load()
        self._cells = cells(self.config)

    def ask(self, most: int | None = None) -> list[Trial]:
        """Return trials that can start now and were not asked for before.

        There are none while all that can start are under way, and none when the study is finished.

        Args:
            most: how many at the most; None: all.
        """
        found: dict[str, Trial] = {}
        for cell in self._cells:
            for trial in missing(cell, self._store):
                if len(found) == most:
                    break
                if trial.key not in self._asked:
                    found.setdefault(trial.key, trial)
        self._asked |= found.keys()
        return list(found.values())

    @staticmethod
    def settings(trial: Trial) -> dict[str, Any]:
        """Return a trial's settings: ``lr``, ``beta1``, ``rho``, ``seed`` and so on."""
        return settings_of(trial)

    def tell(self, trial: Trial, record: Record | None = None, **scores: Any) -> None:
        """Keep the result of a trial, whole or not at all.

        Args:
            trial: the trial.
            record: its record, from ``gq_triton.study.trials.training.run_trial``; None: scores.
            scores: see ``record_of``: ``validation_score``, ``test_score`` and so on.

        Raises:
            Refusal: a score is missing or is no finite number.
        """
        found = record_of(trial, scores) if record is None else replace(record, trial=trial)
        self._store.add(found)

    def forget(self, trial: Trial) -> None:
        """Let a trial be asked for again, because whatever ran it was lost."""
        self._asked.discard(trial.key)

    @property
    def progress(self) -> tuple[int, int]:
        """The number of finished trials, and that of all as far as it is known."""
        return progress(self._cells, self._store)
