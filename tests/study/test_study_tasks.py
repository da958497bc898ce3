"""The data of the studies' tasks, compared with what the tasks promise."""

import gzip
import struct

import pytest
import torch

from gq_triton import GradQueue
from gq_triton.tasks import (
    STUDY_TASKS,
    MissingData,
    batch_stream,
    data_files,
    measure,
    sample_losses,
)
from gq_triton.tasks.text import CONTEXT

FILES = ("cifar10", "mnist", "fashion-mnist", "reuters")
HERE = [name for name in STUDY_TASKS if not name.startswith(FILES)]


@pytest.fixture(autouse=True)
def no_package(tmp_path, monkeypatch):
    """The tests see no data set that this machine happens to have."""
    monkeypatch.setattr(data_files, "_DEBIAN", tmp_path / "no-package")


@pytest.mark.parametrize("name", HERE)
def test_tasks_depend_on_the_seed_alone_and_can_be_clustered(name):
    entry = STUDY_TASKS[name]
    task, again = entry.load(3, None), entry.load(3, None)
    for first, second in zip((*task.train, *task.test), (*again.train, *again.test), strict=True):
        assert torch.equal(first, second)
    model = task.model()
    GradQueue(model, n_clusters=2, features=task.features).attach(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    )
    inputs, labels = (tensor[:12] for tensor in task.train)
    outputs = model(inputs)
    sample_losses(outputs, labels).mean().backward()
    assert entry.score in measure(outputs, labels, None if task.groups is None else labels)
    assert (task.classes is not None) == entry.labels


def test_lines_are_those_of_the_paper():
    task = STUDY_TASKS["lines-disc"].load(0, None)
    images, labels = task.train
    assert images.shape == (100, 1, 8, 8)
    assert labels.sum() == 5
    rows, columns = images[:, 0].mean(dim=2), images[:, 0].mean(dim=1)
    assert torch.equal(columns.amax(dim=1) > rows.amax(dim=1), labels.bool())
    bright = torch.where(labels.bool(), columns.argmax(dim=1), rows.argmax(dim=1))
    assert (bright.min(), bright.max()) == (1, 6)
    assert (images[images < 0.5].std() - 0.1).abs() < 0.01
    assert len(task.test[1]) == 600
    model = task.model()
    assert sum(p.numel() for p in model.parameters()) == 21
    detect = STUDY_TASKS["lines-detect"].load(0, None)
    assert len(detect.train[1]) == 200
    assert detect.train[1].sum() == 100
    assert detect.groups is not None
    assert torch.bincount(detect.groups[1]).tolist() == [300, 300, 300]


def test_the_long_tail_keeps_six_of_three_classes_and_the_seed_chooses_them():
    tails = set()
    for seed in range(4):
        task = STUDY_TASKS["digits-longtail"].load(seed, None)
        counts = torch.bincount(task.train[1], minlength=10)
        tail = (counts == 6).nonzero()[:, 0].tolist()
        assert len(tail) == 3
        assert counts[counts != 6].min() > 100
        assert torch.bincount(task.test[1]).min() > 30
        tails.add(tuple(tail))
    assert len(tails) > 1


def test_bursts_bring_three_classes_in_every_twentieth_batch():
    task = STUDY_TASKS["digits-bursts"].load(1, None)
    labels = task.train[1]
    order = task.order(len(labels), 64, 1)
    drawn = [torch.bincount(labels[next(order)], minlength=10) for _ in range(40)]
    rare = torch.stack(drawn[:19]).sum(dim=0) == 0
    assert rare.sum() == 3
    assert [bool(counts[rare].sum()) for counts in drawn] == [n % 20 == 19 for n in range(40)]
    assert drawn[19][rare].min() > 0
    assert torch.bincount(task.test[1]).min() > 30


def test_hidden_digits_are_a_twentieth_of_every_class():
    plain = STUDY_TASKS["digits"].load(0, None)
    hidden = STUDY_TASKS["digits-hidden"].load(0, None)
    changed = (plain.train[0] != hidden.train[0]).flatten(1).any(dim=1)
    share = torch.bincount(plain.train[1][changed]) / torch.bincount(plain.train[1])
    assert ((share - 0.05).abs() < 0.01).all()
    assert torch.equal(hidden.train[0][changed], -plain.train[0][changed].flip(-1))
    images, groups = hidden.test[0], hidden.groups
    assert groups is not None
    assert torch.equal(images[groups[1] == 1], -images[groups[1] == 0].flip(-1))


def test_training_validation_and_test_share_no_digit():
    task = STUDY_TASKS["digits"].load(0, None)
    sets = [{image.numpy().tobytes() for image in part[0]} for part in
            (task.train, task.validation, task.test)]  # fmt: skip
    assert sum(map(len, sets)) == 1797
    assert not sets[0] & sets[1]
    assert not sets[2] & (sets[0] | sets[1])


def test_text_windows_predict_the_next_byte():
    task = STUDY_TASKS["python-lm"].load(0, None)
    inputs, labels = task.train
    assert inputs.shape == labels.shape
    assert inputs.shape[1] == CONTEXT
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    text = bytes(inputs[:2000].flatten().tolist())
    assert text.count(b"self") > 50
    model = task.model().eval()
    later = inputs[:4].clone()
    later[:, -1] = 0  # the model is causal: the last byte changes no output before it
    first, second = model(inputs[:4]), model(later)
    torch.testing.assert_close(first[:, :-1], second[:, :-1])


def test_measures():
    outputs = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    labels, groups = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 1])
    found = measure(outputs, labels, groups)
    assert found["accuracy"] == 0.5
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["worst_class_recall"] == 0
    assert found["worst_group_accuracy"] == pytest.approx(1 / 3)
    one = measure(torch.tensor([[3.0], [-1.0]]), torch.tensor([1, 1]))
    assert one["accuracy"] == 0.5
    uniform = torch.zeros(2, 5, 256)
    assert measure(uniform, torch.zeros(2, 5).long())["bits_per_byte"] == pytest.approx(8)


def test_batches_use_every_sample_equally_and_have_one_size():
    for size in (3, 7, 16):  # below, at and above the size of the data
        stream = batch_stream(7, size, seed=0)
        drawn = [next(stream) for _ in range(7)]
        assert {len(batch) for batch in drawn} == {size}
        assert torch.bincount(torch.cat(drawn)).tolist() == [size] * 7


def idx(values):
    header = bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape)
    return header + bytes(values.flatten().tolist())


def test_mnist_is_read_from_idx_files_packed_or_not(tmp_path):
    images = torch.randint(256, (20, 28, 28))
    labels = torch.arange(20) % 10
    for part in ("train", "t10k"):
        packed = gzip.compress(idx(images))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(packed)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    task = STUDY_TASKS["mnist"].load(0, tmp_path)
    assert task.train[0].shape == (18, 1, 28, 28)
    assert task.validation[1].tolist() == [9, 9]
    torch.testing.assert_close(task.test[0][:, 0], images / 127.5 - 1)
    assert task.model()(task.test[0]).shape == (20, 10)
    assert STUDY_TASKS["mnist"].load(1, tmp_path).train[0] is task.train[0]  # not read again
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels)[:-1])
    with pytest.raises(MissingData, match="holds 19 values, its header says"):
        STUDY_TASKS["mnist"].load(0, tmp_path)


def write_idx(folder, images, labels):
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))


def test_fashion_mnist_is_never_read_from_the_files_of_mnist(tmp_path, monkeypatch):
    load = STUDY_TASKS["fashion-mnist"].load
    labels = torch.arange(20) % 10
    write_idx(tmp_path / "mnist", torch.zeros(20, 28, 28, dtype=torch.uint8), labels)
    for data in (tmp_path, tmp_path / "mnist"):
        with pytest.raises(MissingData, match=r"in DIR/fashion-mnist, and .* has none"):
            load(0, data)
    package, own = tmp_path / "system", tmp_path / "fashion-mnist"
    write_idx(package, torch.full((20, 28, 28), 51), labels)
    monkeypatch.setattr(data_files, "_DEBIAN", package)
    for data in (None, tmp_path / "mnist", tmp_path / "nowhere"):
        torch.testing.assert_close(load(0, data).test[0], torch.full((20, 1, 28, 28), -0.6))
    write_idx(own, torch.full((20, 28, 28), 255), labels)
    for data in (tmp_path, own):  # what --data names goes before the package
        task = load(0, data)
        assert torch.equal(task.test[0], torch.ones(20, 1, 28, 28))
    assert task.model()(task.test[0]).shape == (20, 10)
    assert STUDY_TASKS["mnist"].load(0, tmp_path).test[0].max() == -1


@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion-mnist"])
def test_images_have_variants_with_something_rare(name, tmp_path):
    labels = (torch.arange(700) + torch.arange(700) // 10) % 10  # every tenth is of any class
    if name == "cifar10":
        rows = torch.randint(256, (140, 3073), dtype=torch.uint8)
        rows[:, 0] = labels[:140]
        for part in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
            (tmp_path / f"{part}.bin").write_bytes(bytes(rows.flatten().tolist()))
    else:
        write_idx(tmp_path / name, torch.randint(256, (700, 28, 28)), labels)
    plain, tail, again, hidden = (
        STUDY_TASKS[f"{name}{variant}"].load(3, tmp_path)
        for variant in ("", "-longtail", "-longtail", "-hidden")
    )
    before, left = (torch.bincount(task.train[1], minlength=10) for task in (plain, tail))
    rare = left < before
    assert left[rare].tolist() == [45 if name == "cifar10" else 54] * 3
    assert torch.equal(tail.train[0], again.train[0])
    assert torch.equal(tail.test[0], plain.test[0])
    changed = (plain.train[0] != hidden.train[0]).flatten(1).any(dim=1)
    assert torch.equal(torch.bincount(plain.train[1][changed]), (before * 0.05).round().long())
    assert torch.equal(hidden.train[0][changed], -plain.train[0][changed].flip(-1))
    assert hidden.groups is not None
    (held_out, half), groups = hidden.validation, hidden.groups[0]
    assert torch.equal(held_out[groups == 1], -plain.validation[0].flip(-1))
    assert torch.equal(half[groups == 1], plain.validation[1])
    measures = measure(hidden.model()(held_out), half, groups)
    assert STUDY_TASKS[f"{name}-hidden"].score in measures
    with pytest.raises(MissingData, match=f"gq-triton study fetch {name} --data DIR"):
        STUDY_TASKS[f"{name}-hidden"].load(0, None)


def test_cifar10_is_read_from_its_binary_version(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = torch.randint(10, (4, 3073), dtype=torch.uint8)
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    for name in names:
        (folder / name).write_bytes(bytes(records.flatten().tolist()))
    task = STUDY_TASKS["cifar10"].load(0, tmp_path)
    assert torch.equal(task.test[1], records[:, 0].long())
    red = task.test[0][1, 0]
    torch.testing.assert_close(red.flatten(), records[1, 1:1025] / 127.5 - 1)
    assert task.model()(task.test[0]).shape == (4, 10)
    assert STUDY_TASKS["cifar10"].load(1, tmp_path) is task  # read once, until the files change
    (folder / "test_batch.bin").write_bytes(b"12345")
    with pytest.raises(MissingData, match="3073 bytes"):
        STUDY_TASKS["cifar10"].load(0, tmp_path)


DOCUMENT = (
    '<REUTERS TOPICS="YES" LEWISSPLIT="{}" NEWID="1">\n<TOPICS>{}</TOPICS>\n'
    "<TEXT>\n<TITLE>T</TITLE><BODY>{}</BODY></TEXT>\n</REUTERS>\n"
)


def test_reuters_is_read_from_its_sgml_files(tmp_path):
    rows = []
    for split in ("TRAIN", "TEST"):
        for number in range(12):
            topic = ("earn", "acq")[number % 2]
            words = f"{topic} shares shares the {number}"
            rows.append(DOCUMENT.format(split, f"<D>{topic}</D>", words))
    rows.append(DOCUMENT.format("TRAIN", "<D>earn</D><D>acq</D>", "both"))  # two topics: left out
    rows.append(DOCUMENT.format("NOT-USED", "<D>earn</D>", "unused"))
    (tmp_path / "reut2-000.sgm").write_text("<!DOCTYPE lewis>\n" + "".join(rows))
    task = STUDY_TASKS["reuters"].load(0, tmp_path)
    assert STUDY_TASKS["reuters"].load(1, tmp_path) is task  # read once, until the files change
    assert task.classes == 2
    assert task.test[0].shape == (12, 4)  # acq, earn, shares, the
    assert sorted(task.test[0][0].expm1().round().tolist()) == [0, 1, 1, 2]
    (tmp_path / "reut2-000.sgm").write_text("nothing")
    with pytest.raises(MissingData, match="no Reuters documents"):
        STUDY_TASKS["reuters"].load(0, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_one_line_that_says_where_to_get_them(name, tmp_path):
    for data in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(MissingData, match=r"^[^\n]+$") as missing:
            STUDY_TASKS[name].load(0, data)
        assert "--data DIR with the files of https://" in str(missing.value)
        assert f"gq-triton study fetch {name} --data DIR" in str(missing.value)
