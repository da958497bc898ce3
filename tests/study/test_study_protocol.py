"""The protocol of a study: its trials, their records, and which results decide what runs next."""

import json
import math
from dataclasses import asdict, replace

import pytest
from study_trials import OPTIONS, trial

from gq_triton.commands.refusal import Refusal
from gq_triton.study.design.arms import ARMS
from gq_triton.study.design.config import StudyConfig
from gq_triton.study.design.controls import CONTROLS, Tuned, altered, applicable
from gq_triton.study.design.law import Recipe, StudyLaw
from gq_triton.study.design.protocol import cells, missing, progress
from gq_triton.study.design.space import Space, at_edge, candidates
from gq_triton.study.design.study_file import read_toml, write_toml
from gq_triton.study.design.trial import EVALUATE, SERIES, TUNE, Record
from gq_triton.study.run.records import Store
from gq_triton.study.trials.training import TrainingRun, learning_rate, run_trial
from gq_triton.tasks import STUDY_TASKS


def test_the_same_question_has_the_same_name_and_any_other_another():
    same = trial()
    assert same.key == trial().key
    others = [trial(lr=0.2), trial(seed=1), trial(purpose=TUNE), trial(law=StudyLaw("queue"))]
    others += [trial(law=StudyLaw("queue", rho=2.0)), trial(target=0.8), trial(class_weighted=True)]
    assert len({other.key for other in (same, *others)}) == len(others) + 1


def test_old_records_keep_their_names():
    # These are the keys of the first release. With one field more, no old record would be found.
    assert trial().key == "8d342208915dce23e78988d0"
    law = StudyLaw("queue", n_clusters=4, rho=2.0, match_norm=True)
    assert trial(law=law).key == "a695af45d09cf040bdd3527b"
    assert trial(processes=2).key == "7a5b9d888c6ed147995b79b3"
    assert trial(beta1=0.9, warmup=0.0).key == "8d342208915dce23e78988d0"
    assert len({trial().key, trial(beta1=0.8).key, trial(warmup=0.15).key}) == 3


def test_a_record_survives_the_disk_and_half_a_record_is_none(tmp_path):
    record = Record(trial(law=StudyLaw("queue", n_clusters=3)), {"score": 0.5}, {"seconds": 1}, {})
    Store(tmp_path).add(record)
    store = Store(tmp_path)
    assert store.load() == 0
    assert store.get(record.trial) == record
    path = next(tmp_path.glob("trials/*.json"))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole.replace(b'"lr": 0.1', b'"lr": 0.3')):
        path.write_bytes(damaged)
        store = Store(tmp_path)
        assert store.load() == 1
        assert store.get(record.trial) is None


def test_a_record_of_the_first_release_is_read(tmp_path):
    record = Record(trial(law=StudyLaw("queue", n_clusters=3)), {"score": 0.5}, {"seconds": 1}, {})
    Store(tmp_path).add(record)
    (path,) = tmp_path.glob("trials/*.json")
    content = json.loads(path.read_text())
    for later in ("processes", "device", "beta1", "warmup"):
        del content["trial"][later]
    path.write_text(json.dumps(content))
    store = Store(tmp_path)
    assert store.load() == 0
    assert store.get(record.trial) == record


@pytest.mark.slow
def test_runs_are_the_same_bit_for_bit_whatever_ran_before():
    first = run_trial(trial(law=StudyLaw("queue", n_clusters=2)))
    run_trial(trial(task="digits-longtail", base="adamw"))
    again = run_trial(trial(law=StudyLaw("queue", n_clusters=2)))
    assert json.dumps(first.result) == json.dumps(again.result)
    assert first.result["norm_ratio"] > 1
    assert set(first.result["series"]) == set(SERIES)
    assert {"torch", "python", "commit"} <= set(first.environment)


def test_arms_are_paired_by_seed():
    plain, queue = run_trial(trial()), run_trial(trial(law=StudyLaw("queue", rho=1.0)))
    # The same data, weights and order: with rho = 1 the law is off.
    assert plain.result["losses"] == queue.result["losses"]
    assert plain.result["losses"] != run_trial(trial(seed=1)).result["losses"]


def test_test_data_is_looked_at_once_and_only_to_evaluate(monkeypatch):
    looks = []
    real = TrainingRun._measure
    monkeypatch.setattr(
        TrainingRun, "_measure", lambda run, *a: looks.append(len(a[1])) or real(run, *a)
    )
    task = STUDY_TASKS["digits"].load(0, None)
    tuned = run_trial(trial(task="digits", purpose=TUNE))
    assert tuned.result["test"] is None
    assert tuned.result["score"] is None
    assert looks == [len(task.validation[1])] * 4
    looks.clear()
    run_trial(trial(task="digits"))
    assert looks == [len(task.validation[1])] * 4 + [len(task.test[1])]


def test_a_diverged_run_is_a_result():
    result = run_trial(trial(task="digits-longtail", lr=1e30, batch_size=16)).result
    assert result["diverged_at"] is not None
    assert result["validation_score"] == 0.1  # chance among ten classes
    assert result["score"] is None
    assert result["steps_to_target"] is None
    json.dumps(result, allow_nan=False)


def test_a_target_that_is_lost_again_was_not_reached(monkeypatch):
    scores = iter([0.95, 0.5, 0.95, 0.97, 0.9])
    monkeypatch.setattr(
        TrainingRun, "_measure", lambda *a: {"loss": 1.0, "balanced_accuracy": next(scores)}
    )
    assert run_trial(trial()).result["steps_to_target"] == 15


def test_every_arm_has_the_same_budget_and_the_same_learning_rates():
    space = Space((1e-3, 3.0), (0.5, 0.7, 0.8, 0.9, 0.95), (0.0, 0.15), (1.5, 6.0), (3, 4, 5))
    tried = {arm: candidates(ARMS[arm].tuned, space, 8) for arm in ("sgdm", "gq-sgdm")}
    rates = {arm: [settings["lr"] for settings in some] for arm, some in tried.items()}
    for name in ("lr", "beta1", "warmup"):
        first, second = ([settings[name] for settings in some] for some in tried.values())
        assert first == second
        assert name == "lr" or set(first) == set(getattr(space, name))
    assert len(set(rates["sgdm"])) == 8
    # A Sobol sequence has one point in every eighth of the logarithmic range.
    for number, rate in enumerate(sorted(rates["sgdm"])):
        eighth = 8 * math.log(rate / 1e-3) / math.log(3000)
        assert eighth == pytest.approx(number + 0.5, abs=1e-3)  # rates have 4 digits
    assert {settings["queue_length"] for settings in tried["gq-sgdm"]} == {3, 4, 5}
    assert all(1.5 <= settings["rho"] <= 6 for settings in tried["gq-sgdm"])
    fixed = StudyConfig.of(OPTIONS | {"rho": [10, 10], "queue_length": [2]})
    laws = [one.law for cell in cells(fixed) for (one, *_) in cell.tuning if cell.arm.law.queued]
    assert {(law.rho, law.queue_length) for law in laws} == {(10.0, 2)}


def test_the_edge_of_the_space_is_noticed():
    tried = [{"lr": lr, "rho": rho} for lr, rho in ((0.1, 2.0), (0.2, 3.0), (0.3, 2.5))]
    assert at_edge(tried[0], tried) == ["lr low", "rho low"]
    assert at_edge(tried[1], tried) == ["rho high"]
    assert at_edge(tried[2], tried) == ["lr high"]
    assert at_edge(tried[0], tried[:1]) == []
    tried = [{"beta1": beta1, "warmup": 0.15 * beta1, "queue_length": 3} for beta1 in (0.5, 0.9)]
    assert at_edge(tried[0], tried) == ["beta1 low"]


def fake(one, score=0.5, loss=1.0):
    result = {
        "validation_score": score, "validation_loss": loss, "diverged_at": None,
        "norm_ratio": 2.0, "mean_weight": 1.25,
    }  # fmt: skip
    return Record(one, result, {}, {})


def test_tuning_comes_first_and_decides(tmp_path):
    every = cells(StudyConfig.of(OPTIONS))
    store = Store(tmp_path)
    cell = next(c for c in every if c.arm.name == "gq-sgdm-clusters" and c.batch_size == 16)
    assert cell.n_clusters == 4
    first = missing(cell, store)
    assert {one.purpose for one in first} == {TUNE}
    assert len(first) == 2
    store.know(fake(first[0], score=0.8, loss=0.3))
    assert cell.choice(store) is None
    store.know(fake(first[1], score=0.8, loss=0.2))
    choice = cell.choice(store)
    assert choice is not None
    assert choice.recipe.law == first[1].law  # equal scores: the lower loss
    then = missing(cell, store)
    assert {one.purpose for one in then} == {EVALUATE}
    assert {one.seed for one in then} == {0, 1}
    assert not {one.seed for one in then} & {one.seed for one in first}
    assert len(then) == 2 * (1 + len(CONTROLS))
    lr, beta1 = choice.recipe.lr, choice.recipe.beta1
    plain = {one.lr for one in then if one.law.kind == "none" and one.beta1 == beta1}
    assert plain == {lr, float(f"{2 * lr:.6g}"), float(f"{1.25 * lr:.6g}")}


def test_a_second_study_can_take_seeds_that_the_first_has_not(tmp_path):
    (cell,) = cells(StudyConfig.of(OPTIONS | {
        "first_seed": 40, "arms": ["sgdm"], "batch_sizes": [4]}))  # fmt: skip
    store = Store(tmp_path)
    for one in missing(cell, store):
        assert one.seed >= 1_000_000
        store.know(fake(one))
    assert {one.seed for one in missing(cell, store)} == {40, 41}


def test_one_cluster_is_none_and_its_runs_are_shared(tmp_path):
    every = cells(StudyConfig.of(OPTIONS))
    of = {cell.arm.name: cell for cell in every if cell.batch_size == 4}
    assert of["gq-sgdm"].tuning == of["gq-sgdm-clusters"].tuning
    finished, total = progress(every, Store(tmp_path))
    # 5 different sets of 2 tuning runs, and the evaluation and controls that are known so far.
    assert finished == 0
    assert total == 5 * 2 + 2 * (2 + 8 + 8 + 8 + 12)


def test_controls_change_one_thing():
    law = StudyLaw("queue", n_clusters=4, rho=2.0, match_norm=True)
    recipe = Recipe(0.1, beta1=0.8, warmup=0.15, law=law)
    tuned = Tuned(recipe, "sgd", norm_ratio=1.5, mean_weight=1.2)
    plain = replace(recipe, law=StudyLaw())
    assert altered("norm-ratio", tuned) == replace(plain, lr=0.15)
    assert altered("mean-weight", tuned) == replace(plain, lr=0.12)
    assert altered("same-lr", tuned) == plain
    assert altered("lower-momentum", tuned) == replace(plain, lr=0.2, beta1=0.6)
    assert altered("lower-momentum", replace(tuned, family="adam")) == replace(plain, beta1=0.6)
    assert altered("lead", tuned) == replace(plain, law=StudyLaw("lead"))
    of_laws = set(CONTROLS) - {"norm-ratio", "mean-weight", "same-lr", "lower-momentum", "lead"}
    changed = {
        name: {k for k, v in asdict(altered(name, tuned).law).items() if v != asdict(law)[k]}
        for name in of_laws
    }
    assert {replace(altered(name, tuned), law=law) for name in of_laws} == {recipe}
    assert changed == {
        "shuffled": {"kind"},
        "constant": {"kind"},
        "random-clusters": {"cluster_by"},
        "label-clusters": {"cluster_by"},
        "rho1-population": {"rho"},
        "rho1-equal": {"rho", "population_power"},
    }
    by_output = replace(recipe, law=replace(law, cluster_by="output_gradient"))
    random = altered("random-clusters", replace(tuned, recipe=by_output)).law
    assert random.by_output
    assert random.permuted
    assert not applicable("random-clusters", replace(law, n_clusters=None), labels=True)
    assert not applicable("label-clusters", law, labels=False)


VARIANTS = {
    "gq-sgdm-tensor": set(),
    "gq-sgdm-magnitude": set(),
    "gq-sgdm-weighted-queue": set(),
    "gq-sgdm-rank": {"shuffled"},
    "gq-sgdm-clusters-rank": set(CONTROLS) - {"constant"},
    "gq-sgdm-clusters-gradient": set(CONTROLS),
    "gq-sgdm-clusters-gradient-norm": set(CONTROLS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_tuned_as_grad_queue_and_have_the_controls_that_mean_something(name):
    config = StudyConfig.of(OPTIONS | {"arms": [name]})
    cell = next(c for c in cells(config) if c.batch_size == 16)
    assert cell.arm.tuned == ("lr", "beta1", "warmup", "rho", "queue_length")
    assert cell.arm.baseline == "sgdm"
    always = {"norm-ratio", "mean-weight", "same-lr", "lower-momentum", "lead"}
    assert set(cell.controls()) == VARIANTS[name] | always
    first = cell.tuning[0][0]
    assert first.law.kind == cell.arm.law.kind
    assert first.law.n_clusters == (4 if "clusters" in name else None)
    result = run_trial(first).result
    assert result["diverged_at"] is None
    assert result["mean_weight"] != 1


def test_variants_share_their_runs_where_they_are_the_same(tmp_path):
    names = ["gq-sgdm", "gq-sgdm-clusters-gradient", "gq-sgdm-rank", "gq-sgdm-clusters-rank"]
    first, gradient, rank, ranked = (
        cell.tuning for cell in cells(StudyConfig.of(OPTIONS | {"arms": names, "batch_sizes": [4]}))
    )
    assert first == gradient  # one cluster
    assert rank == ranked
    assert first != rank
    # The control ``constant`` has the law of the arm gq-sgdm-tensor, at another arm's settings.
    tuned = Tuned(Recipe(0.1, law=StudyLaw("queue")), "sgd", norm_ratio=1.5, mean_weight=1.2)
    assert altered("constant", tuned).law == ARMS["gq-sgdm-tensor"].law


def test_the_file_says_the_same_as_the_options(tmp_path):
    config = StudyConfig.of(OPTIONS | {"targets": {"lines-disc": 0.9}, "lr-sgd": [1, 2.5]})
    path = tmp_path / "study.toml"
    path.write_text(write_toml(config))
    assert StudyConfig.of(read_toml(path)) == config
    assert config.target("lines-disc") == 0.9
    assert config.lr_range("sgd") == (1.0, 2.5)


def test_a_study_from_before_beta1_was_tuned_stays_what_it_was(tmp_path):
    path = tmp_path / "study.toml"
    whole = write_toml(StudyConfig.of(OPTIONS))
    path.write_text("".join(line for line in whole.splitlines(keepends=True)
                            if not line.startswith(("beta1", "warmup"))))  # fmt: skip
    config = StudyConfig.of(read_toml(path))
    assert config == StudyConfig.of(OPTIONS | {"beta1": [0.9], "warmup": [0.0]})
    for cell in cells(config):
        for one in (one for trials in cell.tuning for one in trials):
            assert (one.beta1, one.warmup) == (0.9, 0.0)
    # A file without all first options was written by hand, for a study that begins now.
    path.write_text('tasks = ["lines-disc"]\narms = ["sgdm"]\nbatch_sizes = [4]\n')
    assert len(StudyConfig.of(read_toml(path)).beta1) == 5


def test_the_learning_rate_rises_and_falls():
    steps = range(1, 21)
    plain = [learning_rate(trial(), step) for step in steps]
    assert plain == [0.1 * (1 + math.cos(math.pi * ((step - 1) / 20))) / 2 for step in steps]
    warm = [learning_rate(trial(warmup=0.15), step) for step in steps]
    assert warm[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert warm[3:] == pytest.approx(
        [0.1 * (1 + math.cos(math.pi * step / 17)) / 2 for step in range(17)]
    )
    constant = [learning_rate(trial(warmup=0.15, schedule="constant"), step) for step in steps]
    assert constant == pytest.approx([*warm[:3], *[0.1] * 17])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": []}, "--tasks needs at least one value"),
        ({"tasks": ["nothing"]}, "no 'nothing'"),
        ({"arms": ["sgdm", "sgdm"]}, "twice"),
        ({"arms": "sgdm"}, "must be a list"),
        ({"batch_sizes": [0]}, "whole number >= 1"),
        ({"batch_sizes": [1.5]}, "a whole number each"),
        ({"trials": 0}, "--trials must be a whole number >= 1"),
        ({"trials": True}, "--trials must be a whole number"),
        ({"seeds": 1}, "--seeds must be a whole number >= 2"),
        ({"first_seed": -1}, "--first-seed must be a whole number >= 0"),
        ({"first_seed": 999_999}, "--first-seed plus --seeds must be at most 1000000"),
        ({"schedule": "step"}, "cosine, constant"),
        ({"lr_sgd": [1.0, 0.1]}, "0 < LOW < HIGH"),
        ({"beta1": [0.9, 1.0]}, "--beta1 must be numbers, 0 < VALUE < 1, got 0.9, 1.0"),
        ({"beta1": [0.9, 0.9]}, "--beta1 names one value twice"),
        ({"beta1": []}, "--beta1 needs at least one value"),
        ({"rho": [3.0, 2.0]}, "--rho must be two numbers, 1 < LOW <= HIGH, got 3.0, 2.0"),
        ({"rho": [1.0, 2.0]}, "--rho must be two numbers"),
        ({"queue_length": [1]}, "--queue-length must be a whole number >= 2, got 1"),
        ({"queue_length": []}, "--queue-length needs at least one value"),
        ({"warmup": [-0.1]}, "--warmup must be numbers, 0 <= VALUE < 1, got -0.1"),
        ({"controls": ["placebo"]}, "no 'placebo'"),
        ({"targets": {"nothing": 1.0}}, "no 'nothing'"),
        ({"speed": 3}, "'speed' is no option"),
    ],
)
def test_bad_values_are_refused_by_name(changes, words):
    with pytest.raises(Refusal, match=r"^[^\n]+$") as refused:
        StudyConfig.of(OPTIONS | changes)
    assert words in str(refused.value)
