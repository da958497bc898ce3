"""The command ``gq-triton variance``: the trajectory, its resumption, tables, refusals."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from gq_triton.commands import cli
from gq_triton.tasks import STUDY_TASKS, ScoredTask, batch_stream, flaws, sample_losses
from gq_triton.variance.trajectory import board, train
from gq_triton.variance.trajectory.figures import curves, overparametrisation
from gq_triton.variance.trajectory.plan import PRESETS, Plan, Trajectory
from gq_triton.variance.trajectory.results import Group, summary
from gq_triton.variance.trajectory.train import ESTIMATORS, Training, load_task

TINY = Plan(
    task="random-features", steps=12, batch_size=4, log_every=4, start=2, every=5, iterations=1,
    ratios=(50.0,), lr=(0.1,),
)  # fmt: skip
WORDS = [
    "random-features", "--ratios", "50", "25", "--inputs", "100", "--teacher", "100", "--lr", "0.1",
    "--seeds", "1", "--steps", "8", "--batch-size", "4", "--log-every", "4", "--start", "2",
    "--every", "4", "--iterations", "1",
]  # fmt: skip


def trained(plan, state, **options):
    trajectory = Trajectory(plan, 3)
    training = Training(trajectory, load_task(trajectory, None))
    training.run(state, lambda step: None, **options)
    return training


def weights(training):
    return torch.cat([p.detach().flatten() for p in training.model.parameters()])


# --- the trajectory


def test_tgc15_the_trajectory_is_plain_sgd_whether_watched_or_not(tmp_path):
    plan = replace(TINY, momentum=0.9, weight_decay=0.01, drops=(5, 8))
    watched, alone = trained(plan, tmp_path), trained(plan, tmp_path, measures=False)
    assert len(watched.rows) == 3 * len(ESTIMATORS)
    assert not alone.rows
    assert torch.equal(weights(watched), weights(alone))

    trajectory = Trajectory(plan, 3)
    task = load_task(trajectory, None)
    torch.manual_seed(3)
    model = task.model()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.1, momentum=0.9, weight_decay=0.01)
    order = batch_stream(20, 4, 3)
    for step in range(1, 13):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.1 ** ((step > 5) + (step > 8))
        inputs, labels = (t[next_] for t, next_ in zip(task.train, [next(order)] * 2, strict=True))
        optimizer.zero_grad()
        sample_losses(model(inputs), labels).mean().backward()
        optimizer.step()
    plain = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(weights(watched), plain)


@pytest.mark.parametrize("draws", [0, 3])
def test_a_stopped_trajectory_goes_on_bit_for_bit(tmp_path, draws):
    plan, state = replace(TINY, draws=draws, momentum=0.9), tmp_path / "state.pt"
    whole = trained(plan, tmp_path / "other.pt")

    def stop(step):
        if step == 8:
            raise KeyboardInterrupt

    trajectory = Trajectory(plan, 3)
    task = load_task(trajectory, None)
    with pytest.raises(KeyboardInterrupt):
        Training(trajectory, task).run(state, stop, save_every=0)
    resumed = Training(trajectory, task)
    assert resumed.load(state)
    assert resumed.step == 4
    resumed.run(state, lambda step: None)
    assert resumed.rows == whole.rows
    assert torch.equal(weights(resumed), weights(whole))


def test_a_damaged_or_foreign_state_is_not_loaded(tmp_path):
    state = tmp_path / "state.pt"
    trained(TINY, state, save_every=0)
    other = Trajectory(replace(TINY, lr=(0.2,)), 3)
    assert not Training(other, load_task(other, None)).load(state)
    same = Trajectory(TINY, 3)
    state.write_bytes(state.read_bytes()[:-100])
    training = Training(same, load_task(same, None))
    assert not training.load(state)
    assert training.step == 0


def test_a_trajectory_that_diverges_ends(tmp_path):
    training = trained(replace(TINY, lr=(1e30,), weight_decay=1.0), tmp_path)
    assert training.diverged_at is not None
    assert 1 < training.diverged_at <= 4
    # The clusters' gradients may be the first that are not finite.
    training = trained(replace(TINY, lr=(1e30,), weight_decay=1.0, start=3), tmp_path)
    assert training.diverged_at == 3


def test_svrg_and_sg_2b_are_what_they_must_be(tmp_path):
    # A measurement follows an anchor of the same step only where it is the first one.
    training = trained(replace(TINY, start=4, every=8), tmp_path)
    first = {row["estimator"]: row for row in training.rows if row["step"] == 4}
    assert first["SVRG"]["average"] == 0
    assert first["SG-2B"]["average"] == first["SG-B"]["average"] / 2
    later = {row["estimator"]: row for row in training.rows if row["step"] == 8}
    assert later["SVRG"]["average"] > 0
    assert all(row["normalised"] <= 1 for row in training.rows)


def test_linear_regression_is_measured_by_its_own_loss(tmp_path):
    """At w = 0 a sample's gradient is ``-2 y x``, so all of the variance is known."""
    plan = replace(PRESETS["linear-regression"][0], steps=4, log_every=2, start=2, every=9,
                   iterations=1, duplicates=(0.5,), lr=(1e-30,))  # fmt: skip
    plan.check()
    trajectory = Trajectory(plan, 3)
    training = Training(trajectory, load_task(trajectory, None))
    with torch.no_grad():
        next(training.model.parameters()).zero_()
    training.run(tmp_path / "state.pt", lambda step: None)
    inputs, targets = training.data.tensors
    rows = -2 * targets[:, None].double() * inputs.double()
    expected = (rows - rows.mean(0)).square().mean().item() / 10
    first = {row["estimator"]: row for row in training.rows if row["step"] == 2}
    assert first["SG-B"]["average"] == pytest.approx(expected, rel=1e-5)
    assert 0 < first["GC"]["average"] < 0.6 * expected  # half of the samples are five
    assert len(inputs.unique(dim=0)) == 250


def test_augmented_images_are_shifted_and_mirrored():
    images = torch.arange(2 * 3 * 5 * 6.0).view(1, 6, 5, 6).expand(200, -1, -1, -1).clone()
    torch.manual_seed(0)
    found = train.augmented(images)
    assert found.shape == images.shape
    wide = torch.nn.functional.pad(images[0], [4] * 4, value=0.0)
    places = [(y, x, f) for y in range(9) for x in range(9) for f in (0, 1)]
    every = [wide[:, y : y + 5, x : x + 6].flip([2] * f) for y, x, f in places]
    same = torch.stack([(found == one).flatten(1).all(1) for one in every], 1)
    assert same.any(1).all()
    assert same.any(0).sum() > 100  # of 162
    torch.manual_seed(0)
    assert torch.equal(train.augmented(images), found)


# --- flaws of training sets


def flawed(classes: int | None = 10):
    pair = torch.arange(20.0)[:, None], torch.arange(20) % 10
    return ScoredTask(pair, pair, torch.nn.ReLU, "", pair, classes)


def test_duplicates_keep_the_size_and_are_the_first_points_in_turn():
    inputs, labels = flaws.repeated(flawed(), 0.6).train
    assert inputs[:, 0].tolist() == [*range(8), *(n % 5 for n in range(12))]
    assert torch.equal(labels, inputs[:, 0].long() % 10)
    assert torch.equal(flaws.repeated(flawed(), 0.0).train[0], flawed().train[0])
    assert flaws.repeated(flawed(), 1.0).train[0].unique().tolist() == [0, 1, 2, 3, 4]


def test_appended_points_make_the_set_larger():
    inputs, labels = flaws.appended(flawed(), 3, 7, seed=0).train
    assert len(inputs) == len(labels) == 20 + 21
    assert torch.equal(inputs[:20], flawed().train[0])
    assert len(inputs[20:].unique()) == 3
    assert torch.equal(labels, inputs[:, 0].long() % 10)


def test_wrong_labels_are_the_first_and_always_the_same():
    inputs, labels = flaws.mislabelled(flawed(), 0.5).train
    assert torch.equal(inputs, flawed().train[0])
    assert torch.equal(labels[10:], flawed().train[1][10:])
    assert not torch.equal(labels[:10], flawed().train[1][:10])
    assert torch.equal(labels, flaws.mislabelled(flawed(), 0.5).train[1])
    with pytest.raises(ValueError, match="wrong labels need a task whose samples have classes"):
        flaws.mislabelled(flawed(None), 0.5)


# --- the grid


def test_presets_can_run_and_the_paper_s_grid_has_324_trajectories():
    for plan, text in PRESETS.values():
        plan.check()
        assert text
    groups = list(PRESETS["random-features"][0].groups())
    assert [len(group) for group in groups] == [3] * 108
    assert len({one.key for group in groups for one in group}) == 324
    assert {one.samples for group in groups for one in group} == {
        10_000, 2000, 1000, 666, 500, 400, 333, 200, 100
    }  # fmt: skip


def hand_made(values, ratio=2.0, diverged=None):
    """Return a group of one seed in which every estimator but SVRG has these variances."""
    rows = []
    for step, value in values.items():
        for number, name in enumerate(ESTIMATORS):
            one = 0.0 if name == "SVRG" else value / (number + 1)
            row = {"step": step, "estimator": name, "average": one, "normalised": 0.5}
            rows.append(row | {"noise_to_signal": None})
    plan = replace(TINY, steps=100, ratios=(ratio,))
    return Group("dup 0", [Trajectory(plan, 0)], [{"rows": rows, "diverged_at": diverged}])


def test_figures_are_of_the_last_70_percent():
    group = hand_made({10: 99.0, 30: 99.0, 40: 2.0, 100: 4.0})
    assert group.last("SG-B", "average") == [3.0]
    assert group.ratio("SG-2B") == 0.5
    assert group.ratio("SVRG") == 0
    assert group.last("SG-B", "noise_to_signal") == [float("inf")]
    head, row = summary([group])
    assert head.split() == ["SG-B", "variance", *(f"{n}/SG-B" for n in ESTIMATORS[1:]),
                            "normalised"]  # fmt: skip
    assert row.split() == ["dup", "0", "3", "0.5", "0", "0.25", "0.2", "0.5"]
    assert summary([hand_made({100: 1.0}, diverged=3)])[1].split()[2:] == ["-"] * 6


def test_pictures_are_drawn_also_of_nothing():
    groups = [hand_made({10: 1.0, 100: 2.0}, ratio) for ratio in (1.0, 5.0)]
    for content in (overparametrisation(groups), curves(hand_made({}))):
        assert content.startswith(b"\x89PNG")


# --- the command


def read(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_command_resumes_and_reports(tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    assert cli.main(["variance", *WORDS, "--out", str(whole)]) == 0
    said = capsys.readouterr().out
    assert "Mean over the last 70 % of the steps and over seeds:" in said
    assert "results.csv, summary.txt and 3 pictures" in said
    rows = read(whole)
    assert len(rows) == 2 * 2 * len(ESTIMATORS)
    assert {row["ratios"] for row in rows} == {"50.0", "25.0"}
    assert all(float(row["average"]) >= 0 for row in rows)

    advance, calls = board.Board.advance, []

    def stop(self, step):
        advance(self, step)
        calls.append(step)
        if len(calls) == 4:  # in the second trajectory, at its last step
            raise KeyboardInterrupt

    monkeypatch.setattr(board.Board, "advance", stop)
    monkeypatch.setattr(train.Training.run, "__defaults__", (0.0, True))
    words = ["variance", *WORDS, "--out", str(out)]
    assert cli.main(words) == 130
    assert "the same command continues" in capsys.readouterr().out
    assert len(list(out.glob("runs/*.json"))) == 1
    assert len(list(out.glob("runs/*.pt"))) == 1
    assert cli.main(words) == 0
    assert "1 of 2 trajectories were finished before" in capsys.readouterr().out
    assert calls[4:] == [8]
    assert not list(out.glob("runs/*.pt"))
    for name in ("results.csv", "summary.txt"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    record = json.loads(next(iter(out.glob("runs/*.json"))).read_text())
    assert record["environment"]["torch"] == torch.__version__


def test_images_are_measured_from_draws(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(30, 1, 8, 8, generator=generator), torch.arange(30) % 10

    def model():
        conv = torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten()
        return torch.nn.Sequential(*conv, torch.nn.Linear(72, 10))

    pair = images, labels
    task = ScoredTask(pair, pair, model, "3", pair, 10)
    entry = replace(STUDY_TASKS["mnist"], load=lambda seed, data: task)
    monkeypatch.setitem(STUDY_TASKS, "mnist", entry)
    given = PRESETS["mnist"][0]
    plan = replace(given, batch_size=5, steps=4, log_every=2, start=1, every=2, iterations=1,
                   draws=3, mislabelled=0.5, appended=(2, 9), augment=1)  # fmt: skip
    plan.check()
    training = trained(plan, tmp_path / "state.pt")
    assert len(training.data) == 30 + 18
    assert [row["draws"] for row in training.rows] == [3] * 2 * len(ESTIMATORS)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["mnist"], "mnist needs --data DIR with the files"),
        (["nothing"], "argument PRESET: invalid choice: 'nothing'"),
        (["random-features", "--task", "x"], "--task must be one of lines-disc, "),
        (["cifar10", "--ratios", "3"], "--ratios needs --task random-features, got cifar10"),
        (["random-features", "--seeds"], "--seeds needs at least one value"),
        (["random-features", "--lr", "-1"], "--lr must be >= 1e-30, got -1"),
        (["random-features", "--momentum", "2"], "--momentum must be from 0 to 1, got 2"),
        (["random-features", "--ratios", "5", "5"], "--ratios must not have a value twice"),
        (["random-features", "--draws", "2"], "--draws must be 0 or at least 3, got 2"),
        (["random-features", "--steps", "50"], "nothing would be measured: --steps must reach"),
        (["random-features", "--batch-size", "101"], "at most the 100 training samples, got 101"),
        (["random-features", "--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["random-features", "--augment", "1"], "--augment needs images, and random-features"),
        (["cifar10", "--task", "linear-regression"], "cannot be measured: --augment needs images"),
        (["random-features", "--task", "python-lm", "--mislabelled", "0.1"],
         "--mislabelled needs samples with a class, and python-lm has none"),
        (["random-features", "--appended", "1"], "argument --appended: expected 2 arguments"),
        (["random-features", "--lr", "x"], "argument --lr: invalid float value: 'x'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(words, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["variance", *words, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gq-triton variance: ")
    assert said.count("\n") == 1
    assert text in said
    assert not out.exists()


def test_a_folder_with_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert cli.main(["variance", *WORDS, "--out", str(tmp_path)]) == 2
    assert "holds something else: name a new or an empty folder" in capsys.readouterr().err
    assert cli.main(["variance", *WORDS, "--out", str(tmp_path / "thesis.tex")]) == 2
    assert "--out must be a folder" in capsys.readouterr().err
    assert cli.main(["variance", *WORDS, "--out", str(tmp_path / "thesis.tex" / "new")]) == 2
    assert "thesis.tex is no folder one may write to" in capsys.readouterr().err


def test_a_task_without_a_layer_for_the_clusters_is_refused(monkeypatch, tmp_path, capsys):
    entry = replace(STUDY_TASKS["digits"], load=lambda seed, data: flawed())
    monkeypatch.setitem(STUDY_TASKS, "digits", entry)
    words = ["cifar10", "--task", "digits", "--batch-size", "4", "--out", str(tmp_path / "out")]
    assert cli.main(["variance", *words]) == 2
    assert "digits cannot be measured: " in capsys.readouterr().err
