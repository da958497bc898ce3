"""Intervals and verdicts: a planted effect is found, an absent one is not."""

import math

import numpy as np
import pytest

from gq_triton.study.design.arms import ARMS
from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.controls import CONTROLS, PRIMARY
from gq_triton.study.design.protocol import cells, progress
from gq_triton.study.design.trial import EVALUATE, Record
from gq_triton.study.report.results import collect, results_csv
from gq_triton.study.report.statistics import compare, interval, median_interval
from gq_triton.study.report.verdict import (
    HELPS,
    HURTS,
    LESS_LAG,
    LONGER,
    NONE,
    PLAIN,
    TOO_FEW,
    Finding,
    findings,
    task_verdict,
)
from gq_triton.study.report.write import _COLUMNS, _row
from gq_triton.study.run.records import Store

TASK = "digits-longtail"


def test_intervals_of_ten_normal_values_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = sum(
        low <= 0 <= high for low, high in (interval(rng.normal(size=10)) for _ in range(400))
    )
    # 0.95 +- 4 standard errors of 400 tries
    assert 0.906 <= hits / 400 <= 0.994


def test_an_interval_needs_values_that_are_numbers():
    for values in ([1.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="at least 2 finite values"):
            interval(values)
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_medians_hold_runs_that_never_got_there():
    assert median_interval([10.0, 20.0, 30.0])[0] == 20.0
    median, low, high = median_interval([1.0, 2.0, 3.0, 4.0, *[math.inf] * 6])
    assert (median, low, high) == (math.inf, 2.0, math.inf)
    median, low, high = median_interval(list(map(float, range(1, 11))))
    # The interval from rank 2 to rank 9 of 10 covers 97.9 % by the binomial distribution.
    assert (median, low, high) == (5.5, 2.0, 9.0)


def test_a_comparison_counts_wins_and_is_stricter_in_company():
    differences = [0.02, 0.01, 0.03, 0.0, 0.02, -0.01, 0.02, 0.01, 0.02, 0.03]
    alone, in_company = compare(differences), compare(differences, comparisons=50)
    assert (alone.wins, alone.losses, alone.n) == (8, 1, 10)
    assert alone.mean == pytest.approx(np.mean(differences))
    assert alone.sign == 1
    assert in_company.sure_low < alone.sure_low
    assert (in_company.low, in_company.high) == (alone.low, alone.high)
    assert compare([-d for d in differences]).sign == -1
    # Three seeds that agree prove nothing, though a bootstrap alone would call them better.
    assert compare([0.01, 0.02, 0.03]).sign == 0


def study(
    effects, noise=0.004, seeds=10, sizes=(16, 256), seed=0, arms=("sgdm", "gq-sgdm"), trials=8,
    controls=tuple(CONTROLS), **options,
):  # fmt: skip
    """Return the cells and the records of a finished, synthetic study.

    `effects(trial)` is added to the score of an evaluation run. A seed shifts all arms alike.
    """
    config = StudyConfig.of(
        {
            "tasks": [TASK],
            "arms": list(arms),
            "batch_sizes": list(sizes),
            "trials": trials,
            "tuning_seeds": 1,
            "seeds": seeds,
            "controls": list(controls),
            **options,
        }
    )
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.05, seeds)
    every, store = cells(config), Store(config_folder())
    while (done := progress(every, store))[0] < done[1]:
        for cell in every:
            for trial in cell.known(store):
                if store.get(trial) is None:
                    store.know(record(trial, effects, shared, rng, noise))
    return every, store


def config_folder():
    from pathlib import Path

    return Path("nowhere")  # `know` writes nothing


def record(trial, effects, shared, rng, noise):
    score = 0.7
    if trial.purpose == EVALUATE:
        score += rng.normal(0, noise) + shared[trial.seed] + effects(trial)
    law = trial.law.kind != "none"
    return Record(
        trial,
        {
            "diverged_at": None,
            "validation_score": 0.7,
            "validation_loss": 1.0,
            "test": {"loss": 1.0, "balanced_accuracy": score},
            "score": score,
            "steps_to_target": 10,
            "train_loss": 1.0,
            "mean_weight": 1.2 if law else None,
            "norm_ratio": 1.5 if law else None,
            "saturated_high": None,
            "saturated_low": None,
            "effective_length": None,
            "losses": [],
            "series": {},
        },
        {"seconds": 1.0, "seconds_to_target": 0.5},
        {"torch": "x"},
    )


def verdicts(*args, **options):
    every, store = study(*args, **options)
    found = findings(collect(every, store), TASK)
    return {f.group.cell.batch_size: f for f in found}


def test_a_planted_gain_is_found_where_it_is_and_only_there():
    found = verdicts(lambda t: 0.02 * (t.law.kind == "queue" and t.batch_size == 256))
    assert (found[16].verdict, found[256].verdict) == (NONE, HELPS)
    assert set(found[256].beaten) == set(found[256].against) - {"sgdm"}
    assert PRIMARY["sgd"] in found[256].beaten
    (arm, summary, lines) = task_verdict(list(found.values()))[0]
    assert arm == "gq-sgdm"
    assert summary == "(balanced accuracy): no difference at batch 16; helps at batch 256"
    assert "better on 10 of 10 seeds" in lines[1]


def test_a_gain_that_any_weights_would_give_is_said_to_be_one():
    kinds = "queue", "shuffled", "constant"
    found = verdicts(lambda t: 0.02 * (t.law.kind in kinds))
    (_, summary, _) = task_verdict(list(found.values()))[0]
    assert "helps at batch 16 (no more than shuffled, constant do)" in summary


def test_a_planted_loss_is_found():
    found = verdicts(lambda t: -0.02 * (t.law.kind == "queue"))
    assert {finding.verdict for finding in found.values()} == {HURTS}


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        ({"trials": 2}, "2 of the 8 tuning trials that a verdict needs"),
        ({"seeds": 9}, "9 of the 10 evaluation seeds that a verdict needs"),
        ({"trials": 7, "seeds": 2}, "7 of the 8 tuning trials and 2 of the 10 evaluation seeds "),
    ],
)
@pytest.mark.parametrize("effect", [0.5, -0.5])
def test_too_few_trials_or_seeds_decide_nothing(effect, options, lacking):
    found = verdicts(lambda t: effect * (t.law.kind == "queue"), **options)
    assert {finding.verdict for finding in found.values()} == {TOO_FEW}
    (_, summary, lines) = task_verdict(list(found.values()))[0]
    assert summary == "(balanced accuracy): not enough trials at batch 16, 256"
    for line in lines:
        assert lacking in line


def test_a_gain_that_a_longer_step_shares_is_not_one_of_the_law():
    # The norm-ratio control is the plain optimizer at 1.5 times the tuned learning rate.
    every, store = study(lambda t: 0.0)
    groups = [g for g in collect(every, store) if g.label == "gq-sgdm"]
    lr = {group.cell.batch_size: group.choice.settings["lr"] for group in groups}
    found = verdicts(lambda t: 0.02 * (t.law.kind == "queue" or t.lr == 1.5 * lr[t.batch_size]))
    assert {finding.verdict for finding in found.values()} == {LONGER}
    assert all(PRIMARY["sgd"] in finding.unbeaten for finding in found.values())


def test_a_gain_that_less_momentum_lag_shares_is_not_one_of_the_law():
    for kinds in (("queue", "lead"), ("queue", "shuffled", "lead")):
        found = verdicts(lambda t, kinds=kinds: 0.02 * (t.law.kind in kinds))
        assert {finding.verdict for finding in found.values()} == {LESS_LAG}
    # The control lower-momentum is the plain optimizer at half the memory of the tuned one's.
    every, store = study(lambda t: 0.0)
    groups = [g for g in collect(every, store) if g.label == "gq-sgdm"]
    memory = {g.cell.batch_size: 1 / (1 - g.choice.recipe.beta1) for g in groups}

    def effect(trial):
        halved = abs(1 / (1 - trial.beta1) - memory[trial.batch_size] / 2) < 1e-6
        return 0.02 * (trial.law.kind == "queue" or halved)

    found = verdicts(effect)
    assert {finding.verdict for finding in found.values()} == {LESS_LAG}
    assert all("lower-momentum" in finding.unbeaten for finding in found.values())


def test_with_adam_the_step_as_long_is_the_one_at_the_same_learning_rate():
    """Adam divides by the gradient's size, so that a longer gradient makes no longer step."""
    better, equal = compare([0.01, 0.02, 0.03] * 4), compare([-0.01, 0.0, 0.01] * 4)
    assert (better.sign, equal.sign) == (1, 0)
    for base, against, verdict in (
        ("adamw", {"norm-ratio": better, "same-lr": equal}, PLAIN),
        ("adamw", {"norm-ratio": equal, "same-lr": better}, HELPS),
        ("sgdm", {"norm-ratio": better, "same-lr": equal}, HELPS),
        ("sgdm", {"norm-ratio": equal, "same-lr": better}, LONGER),
    ):
        every, store = study(lambda t: 0.0, arms=(base, f"gq-{base}"), sizes=(16,))
        group = next(g for g in collect(every, store) if g.label == f"gq-{base}")
        finding = Finding(group, {base: better, **against}, base, frozenset())
        assert finding.verdict == verdict


def test_absent_effects_are_rarely_found():
    verdict = [
        finding.verdict
        for seed in range(40)
        for finding in verdicts(lambda t: 0.0, seed=seed, controls=()).values()
    ]
    # A study is wrong in 5 % of the cases: in 2 of 40 on average, with standard deviation 1.4.
    assert sum(v != NONE for v in verdict) <= 7


def test_a_study_with_one_beta1_has_the_columns_of_the_first_studies():
    def header(**options):
        every, store = study(lambda t: 0.0, sizes=(16,), controls=(), **options)
        return results_csv(collect(every, store)).splitlines()[0]

    old, new = header(beta1=[0.9], warmup=[0.0]), header()
    assert old.startswith("task,arm,control,batch_size,seed,lr,rho,queue_length,n_clusters,score_n")
    assert new.replace(",beta1,warmup", "") == old
    assert new != old


def test_the_median_of_an_even_number_of_seeds_lies_between_the_middle_two():
    every, store = study(lambda t: 0.0, sizes=(16,), arms=("sgdm",), controls=(), seeds=4)
    (group,) = collect(every, store)
    lower, upper = sorted(group.scores)[1:3]
    assert lower < upper
    assert _row(group)[_COLUMNS.index("median")] == f"{(lower + upper) / 2:.4f}"


def test_a_lower_score_is_better_where_it_is():
    options = {"tasks": ["python-lm"], "arms": ["sgdm"], "batch_sizes": [8]}
    config = StudyConfig.of(options | {"trials": 2, "tuning_seeds": 1, "seeds": 2})
    (cell,) = cells(config)
    store = Store(config_folder())
    for number, (trial,) in enumerate(cell.tuning):
        one = record(trial, lambda t: 0.0, [0, 0], np.random.default_rng(0), 0.0)
        result = one.result | {"validation_score": 3.0 - number}
        store.know(Record(trial, result, {}, {}))
    choice = cell.choice(store)
    assert choice is not None
    assert choice.score == 2.0


def test_every_arm_and_control_is_explained():
    for explained in (*ARMS.values(), *CONTROLS.values()):
        assert explained.text
