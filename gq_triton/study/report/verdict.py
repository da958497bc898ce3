"""The verdicts of a study: does an arm help, hurt or change nothing, where, compared with what."""

from collections.abc import Sequence
from dataclasses import dataclass

from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.controls import LAG, PRIMARY
from gq_triton.study.report.results import Group, gains
from gq_triton.study.report.statistics import Comparison, compare

__all__ = ["Finding", "findings", "lacking", "sentence", "task_verdict"]

HELPS, HURTS, NONE = "helps", "hurts", "no difference"
UNDECIDED = "undecided"  # the 95 % interval excludes 0, as some do by chance among many
TOO_FEW = "not enough trials"
LONGER = "better, but no more than a longer step is"
PLAIN = "better, but no more than the same learning rate is without it"
LESS_LAG = "better, but no more than less momentum lag is"
UNKNOWN = "no verdict"
LEAST_TRIALS, LEAST_SEEDS = 8, 10  # a study with fewer gives no verdict; the defaults


def lacking(config: StudyConfig) -> list[str]:
    """Return what a study has too few of for a verdict; empty if it has enough."""
    needs = (
        (config.trials, LEAST_TRIALS, "tuning trials"),
        (config.seeds, LEAST_SEEDS, "evaluation seeds"),
    )
    return [f"{has} of the {least} {what}" for has, least, what in needs if has < least]


@dataclass(frozen=True)
class Finding:
    """A Grad Queue arm at one batch size, compared with its tuned baseline and its controls.

    Args:
        group: the arm's runs.
        against: the comparisons with the baseline and the controls, by name; the baseline is first
            if the study has it.
        baseline: name of the baseline, or None if the study lacks it.
        pairs: names of those in ``against`` whose runs are the arm's own, which compare nothing.
    """

    group: Group
    against: dict[str, Comparison]
    baseline: str | None
    pairs: frozenset[str]

    @property
    def verdict(self) -> str:
        """The verdict in words.

        ``helps`` means better than the tuned baseline, the primary control and the controls with
        less lag of the momentum, as far as these controls ran.
        """
        if self.baseline is None:
            return UNKNOWN
        if lacking(self.group.cell.config):
            return TOO_FEW
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
        """The comparisons with the controls."""
        return {name: c for name, c in self.against.items() if name != self.baseline}

    @property
    def beaten(self) -> list[str]:
        """Names of the controls that the arm is better than."""
        return [name for name, comparison in self.controls.items() if comparison.sign > 0]

    @property
    def unbeaten(self) -> list[str]:
        """Names of the other controls, which share the gain if there is one."""
        return [name for name, comparison in self.controls.items() if comparison.sign <= 0]


def findings(groups: Sequence[Group], task: str) -> list[Finding]:
    """Return the finding of every Grad Queue arm of a task at every batch size.

    The intervals of all these verdicts share an error of 5 %.
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
    """Return a finding as a line of text with its numbers."""
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
        return f"{text}; the study has {' and '.join(absent)} that a verdict needs"
    if verdict == UNDECIDED:
        text += "; too uncertain among so many comparisons"
    if result.sign > 0 and finding.controls:
        text += f"; beyond {_names(finding.beaten, 'no control')}"
        text += f"; not beyond {_names(finding.unbeaten, 'none')}"
    elif result.sign > 0:
        text += "; no control was run"
    return text


def task_verdict(found: Sequence[Finding]) -> list[tuple[str, str, list[str]]]:
    """Return for every arm its name, its verdicts in one line, and a line per batch size.

    Args:
        found: findings of one task.
    """
    lines = []
    for arm in dict.fromkeys(finding.group.cell.arm.name for finding in found):
        mine = [finding for finding in found if finding.group.cell.arm.name == arm]
        by_verdict: dict[str, list[str]] = {}
        for finding in mine:
            by_verdict.setdefault(finding.verdict, []).append(_where(finding))
        parts = [f"{verdict} at batch {', '.join(sizes)}" for verdict, sizes in by_verdict.items()]
        unit = mine[0].group.cell.entry.shown
        lines.append((arm, f"({unit}): {'; '.join(parts)}", [sentence(one) for one in mine]))
    return lines


def _where(finding: Finding) -> str:
    """Return the batch size, with the controls that share a gain."""
    size = str(finding.group.cell.batch_size)
    if finding.verdict != HELPS or not finding.unbeaten:
        return size
    return f"{size} (no more than {_names(finding.unbeaten, '')} do)"


def _names(names: list[str], nothing: str) -> str:
    return ", ".join(names) if names else nothing
