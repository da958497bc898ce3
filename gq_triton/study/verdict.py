"""What a study found, in words: helps, hurts or no difference, where, and against what."""

from collections.abc import Sequence
from dataclasses import dataclass

from gq_triton.study.config import StudyConfig
from gq_triton.study.controls import LAG, PRIMARY
from gq_triton.study.results import Group, gains
from gq_triton.study.statistics import Comparison, compare
from gq_triton.tasks import STUDY_TASKS

__all__ = ["Finding", "findings", "lacking", "sentence", "task_verdict"]

HELPS, HURTS, NONE = "helps", "hurts", "no difference"
# Its 95 % interval excludes 0, but among so many comparisons that is to be expected now and then.
# Or the study is too small for any verdict.
UNDECIDED = "undecided"
LONGER = "better, but no more than a longer step is"
PLAIN = "better, but no more than the same learning rate is without it"
LESS_LAG = "better, but no more than less momentum lag is"
UNKNOWN = "no verdict"
LEAST_TRIALS, LEAST_SEEDS = 8, 10  # the defaults: of fewer nothing is called a finding


def lacking(config: StudyConfig) -> list[str]:
    """Return what a study has too little of for a verdict."""
    needs = (
        (config.trials, LEAST_TRIALS, "tuning trials"),
        (config.seeds, LEAST_SEEDS, "evaluation seeds"),
    )
    return [f"{has} {what}, a verdict takes {least}" for has, least, what in needs if has < least]


@dataclass(frozen=True)
class Finding:
    """A Grad Queue arm at one batch size, against its tuned baseline and its controls.

    Args:
        group: the arm's runs.
        against: the comparison with each, by name; the baseline comes first if the study has it.
        baseline: name of the baseline, None if the study lacks it.
        pairs: comparisons that are the same run on both sides; they say nothing.
    """

    group: Group
    against: dict[str, Comparison]
    baseline: str | None
    pairs: frozenset[str]

    @property
    def verdict(self) -> str:
        """``helps`` only if it beats the tuned baseline and, of those that ran, two controls.

        They are a step as long, and less lag of the momentum.
        """
        if self.baseline is None:
            return UNKNOWN
        if lacking(self.group.cell.config):
            return UNDECIDED
        sign = self.against[self.baseline].sign
        if sign < 0:
            return HURTS
        if sign == 0:
            result = self.against[self.baseline]
            return UNDECIDED if result.low > 0 or result.high < 0 else NONE
        family = self.group.cell.arm.family
        primary = self.against.get(PRIMARY[family])
        if primary is not None and primary.sign <= 0:
            return LONGER if family == "sgd" else PLAIN
        lag = [self.against[name] for name in LAG if name in self.against]
        return HELPS if all(comparison.sign > 0 for comparison in lag) else LESS_LAG

    @property
    def controls(self) -> dict[str, Comparison]:
        """The comparisons but for that with the baseline."""
        return {name: c for name, c in self.against.items() if name != self.baseline}

    @property
    def beaten(self) -> list[str]:
        """Controls that it is better than."""
        return [name for name, comparison in self.controls.items() if comparison.sign > 0]

    @property
    def unbeaten(self) -> list[str]:
        """Controls that it is not better than: they share the gain, if there is one."""
        return [name for name, comparison in self.controls.items() if comparison.sign <= 0]


def findings(groups: Sequence[Group], task: str) -> list[Finding]:
    """Return every Grad Queue arm of a task against its baseline and controls.

    The intervals of the verdicts share 5 % over all arms and batch sizes of the task.
    """
    mine = [group for group in groups if group.cell.task == task]
    arms = [g for g in mine if not g.control and g.cell.arm.baseline is not None]
    plain = {(g.cell.arm.name, g.cell.batch_size): g for g in mine if not g.control}
    return [_finding(group, mine, plain, max(1, len(arms))) for group in arms]


def _finding(
    group: Group, mine: list[Group], plain: dict[tuple[str, int], Group], family: int
) -> Finding:
    size, name = group.cell.batch_size, group.cell.arm.baseline
    others: dict[str, Group] = {}
    baseline = plain.get((name, size)) if name is not None else None
    if baseline is not None and name is not None:
        others[name] = baseline
    for other in mine:
        same = other.cell.arm.name == group.cell.arm.name and other.cell.batch_size == size
        if same and other.control:
            others[other.control] = other
    keys = [record.trial.key for record in group.records]
    return Finding(
        group=group,
        against={key: compare(gains(group, other), family) for key, other in others.items()},
        baseline=name if baseline is not None else None,
        pairs=frozenset(
            key for key, other in others.items() if [r.trial.key for r in other.records] == keys
        ),
    )


def sentence(finding: Finding) -> str:
    """Return a finding in words, with its numbers."""
    verdict, size, baseline = finding.verdict, finding.group.cell.batch_size, finding.baseline
    if baseline is None:
        return f"batch {size}: {verdict}, the study has no {finding.group.cell.arm.baseline}"
    if baseline in finding.pairs:
        return f"batch {size}: the same runs as {baseline}: there is one cluster"
    result = finding.against[baseline]
    text = (
        f"batch {size}: {verdict} ({result.mean:+.4f} against tuned {baseline}, 95 % interval "
        f"{result.low:+.4f} to {result.high:+.4f}, better on {result.wins} of {result.n} seeds)"
    )
    absent = lacking(finding.group.cell.config)
    if absent:
        return f"{text}: {', and '.join(absent)}"
    if verdict == UNDECIDED:
        text += "; too uncertain among so many comparisons"
    if result.sign > 0 and finding.controls:
        text += f"; beyond {_names(finding.beaten, 'no control')}"
        text += f"; not beyond {_names(finding.unbeaten, 'none')}"
    elif result.sign > 0:
        text += "; no control was run"
    return text


def task_verdict(found: Sequence[Finding], task: str) -> list[tuple[str, str, list[str]]]:
    """Return for every arm that has a baseline its name, a verdict and a line per batch size.

    Args:
        found: the findings of the task.
        task: its name.
    """
    unit = STUDY_TASKS[task].score.replace("_", " ")
    lines = []
    for arm in dict.fromkeys(finding.group.cell.arm.name for finding in found):
        mine = [finding for finding in found if finding.group.cell.arm.name == arm]
        by_verdict: dict[str, list[str]] = {}
        for finding in mine:
            by_verdict.setdefault(finding.verdict, []).append(_where(finding))
        parts = [f"{verdict} at batch {', '.join(sizes)}" for verdict, sizes in by_verdict.items()]
        lines.append((arm, f"({unit}): {'; '.join(parts)}", [sentence(one) for one in mine]))
    return lines


def _where(finding: Finding) -> str:
    """Return the batch size, and what shares the gain if there is one."""
    size = str(finding.group.cell.batch_size)
    if finding.verdict != HELPS or not finding.unbeaten:
        return size
    return f"{size} (no more than {_names(finding.unbeaten, '')} do)"


def _names(names: list[str], nothing: str) -> str:
    return ", ".join(names) if names else nothing
