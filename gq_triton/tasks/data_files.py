"""The paper's data sets, read from files that the user has; ``fetch.py`` can get them."""

import gzip
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from gq_triton.tasks.scored import MissingData, ScoredTask

__all__ = ["load_cifar10", "load_fashion_mnist", "load_mnist", "load_reuters"]

Pair = tuple[Tensor, Tensor]
Builder = Callable[[], nn.Module]
Stamps = tuple[tuple[str, int, int], ...]  # of files: name, bytes, nanoseconds of the last change

_CIFAR = "cifar-10-batches-bin"
_MNIST = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
_TOPICS, _WORDS = 8, 2000


def load_cifar10(seed: int, data: Path | None = None) -> ScoredTask:
    """Return CIFAR-10 from its binary version; a tenth of the training set is for validation.

    Raises:
        MissingData: the folder is not there, or a file in it is not of that format.
    """
    folder = _folder(data, _CIFAR, "cifar10", "https://www.cs.toronto.edu/~kriz/cifar.html")
    return _read_cifar10(folder, _stamps(folder.glob("*.bin")))


@lru_cache(maxsize=1)
def _read_cifar10(folder: Path, stamps: Stamps) -> ScoredTask:
    batches = [_cifar_file(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    test = _cifar_file(folder / "test_batch.bin")
    return _vision((images, labels), test, _conv_net(3, 8))


def _cifar_file(path: Path) -> Pair:
    """Return images ``(N, 3, 32, 32)`` in [-1, 1] and labels; a record is 1 + 3072 bytes."""
    content = _bytes(path)
    if len(content) == 0 or len(content) % 3073:
        raise MissingData(
            f"{path} is no CIFAR-10 batch: it must hold records of 3073 bytes, got {len(content)}"
        )
    rows = content.view(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).float() / 127.5 - 1, rows[:, 0].long()


def load_mnist(seed: int, data: Path | None = None) -> ScoredTask:
    """Return MNIST from its four IDX files, packed or not.

    Raises:
        MissingData: a file is not there or not of that format.
    """
    folder = _folder(data, "mnist", "mnist", "https://ossci-datasets.s3.amazonaws.com/mnist")
    return replace(_idx_task(folder), model=_conv_net(1, 7))


def load_fashion_mnist(seed: int, data: Path | None = None) -> ScoredTask:
    """Return Fashion-MNIST, whose four IDX files have the names of MNIST's.

    The folder is ``data / "fashion-mnist"``, else the one of Debian's package. ``data`` itself
    counts only if it has that name: the files in it could be MNIST's.

    Raises:
        MissingData: a file is not there or not of that format.
    """
    source = "https://github.com/zalandoresearch/fashion-mnist"
    places = [] if data is None else [data / "fashion-mnist", data.resolve()]
    for folder in [*(place for place in places if place.name == "fashion-mnist"), _DEBIAN]:
        if _holds_files(folder):
            return replace(_idx_task(folder), model=_mlp)
    raise _missing(data, "fashion-mnist", "fashion-mnist", source)


def _idx_task(folder: Path) -> ScoredTask:
    """Return the task of images ``(N, 1, 28, 28)`` in [-1, 1]; its model is of no importance."""
    known = (path for path in folder.iterdir() if path.name.removesuffix(".gz") in _MNIST)
    return _read_idx(folder, _stamps(known))


@lru_cache(maxsize=1)
def _read_idx(folder: Path, stamps: Stamps) -> ScoredTask:
    images, labels, test_images, test_labels = (_idx_file(folder / name) for name in _MNIST)
    return _vision(_pixels(images, labels), _pixels(test_images, test_labels), _mlp)


def _pixels(images: Tensor, labels: Tensor) -> Pair:
    return images[:, None].float() / 127.5 - 1, labels.long()


def _idx_file(path: Path) -> Tensor:
    """Return the bytes of an IDX file in its shape: 0, 0, 8, dimensions, sizes, values."""
    if not path.exists():
        path = path.with_name(path.name + ".gz")
    content = _bytes(path)
    dimensions = int(content[3]) if len(content) > 4 else 0
    start = 4 + 4 * dimensions
    if content[:3].tolist() != [0, 0, 8] or not dimensions or len(content) < start:
        raise MissingData(f"{path} is no IDX file of bytes")
    place = torch.tensor([2**24, 2**16, 2**8, 1])
    sizes = (content[4:start].view(dimensions, 4).long() * place).sum(dim=1).tolist()
    values = content[start:]
    if len(values) != torch.Size(sizes).numel():
        raise MissingData(f"{path} holds {len(values)} values, its header says {sizes}")
    return values.view(*sizes)


def load_reuters(seed: int, data: Path | None = None) -> ScoredTask:
    """Return Reuters-21578 in Lewis's split: the documents whose only topic is one of 8.

    These are the topics that the most training documents have as their only one.

    The input is the logarithm of one plus the count of each of the training set's 2000 most
    frequent words.

    Raises:
        MissingData: the SGML files are not there or hold no such document.
    """
    folder = _folder(
        data, "reuters21578", "reuters", "https://archive.ics.uci.edu/dataset/137 (reut2-*.sgm)"
    )
    return _read_reuters(folder, _stamps(folder.glob("*.sgm")))


@lru_cache(maxsize=1)
def _read_reuters(folder: Path, stamps: Stamps) -> ScoredTask:
    documents = [entry for path in sorted(folder.glob("*.sgm")) for entry in _documents(path)]
    train = [(topic, words) for split, topic, words in documents if split == "TRAIN"]
    test = [(topic, words) for split, topic, words in documents if split == "TEST"]
    topics = [name for name, _ in Counter(topic for topic, _ in train).most_common(_TOPICS)]
    counts = Counter(word for _, words in train for word in words)
    # Equal counts by name: the order of a dictionary would depend on that of the files.
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:_WORDS]
    vocabulary = {word: column for column, word in enumerate(ranked)}
    pairs = [_bags(part, topics, vocabulary) for part in (train, test)]
    if len(topics) < 2 or any(len(labels) < 2 for _, labels in pairs):
        raise MissingData(f"{folder} holds no Reuters documents of one topic in both splits")

    def model() -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                hidden=nn.Linear(len(vocabulary), 64),
                relu=nn.ReLU(),
                head=nn.Linear(64, len(topics)),
            )
        )

    return _scored(pairs[0], pairs[1], model, "hidden", len(topics))


def _documents(path: Path) -> list[tuple[str, str, list[str]]]:
    """Return split, topic and words of the documents that have exactly one topic."""
    text = path.read_text(encoding="latin-1")
    found = []
    for header, body in re.findall(r"<REUTERS([^>]*)>(.*?)</REUTERS>", text, re.DOTALL):
        split = re.search(r'LEWISSPLIT="(\w+)"', header)
        listed = re.search(r"<TOPICS>(.*?)</TOPICS>", body, re.DOTALL)
        topics = re.findall(r"<D>(.*?)</D>", listed[1]) if listed else []
        words = re.search(r"<BODY>(.*?)</BODY>", body, re.DOTALL)
        if split and words and len(topics) == 1:
            found.append((split[1], topics[0], re.findall(r"[a-z]+", words[1].lower())))
    return found


def _bags(
    documents: list[tuple[str, list[str]]], topics: list[str], vocabulary: dict[str, int]
) -> Pair:
    known = [(topic, words) for topic, words in documents if topic in topics]
    inputs = torch.zeros(len(known), len(vocabulary))
    for row, (_, words) in zip(inputs, known, strict=True):
        for word, count in Counter(words).items():
            if word in vocabulary:
                row[vocabulary[word]] = count
    return inputs.log1p(), torch.tensor([topics.index(topic) for topic, _ in known]).long()


def _folder(data: Path | None, name: str, task: str, source: str) -> Path:
    """Return the folder with a task's files: the one named, or one called ``name`` in it."""
    for folder in [] if data is None else [data / name, data]:
        if _holds_files(folder):
            return folder
    raise _missing(data, name, task, source)


def _stamps(files: Iterable[Path]) -> Stamps:
    """Return what tells that files have changed.

    A task is kept until then: reading the files takes longer than many a trial.
    """
    status = ((path.name, path.stat()) for path in sorted(files))
    return tuple((name, found.st_size, found.st_mtime_ns) for name, found in status)


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _missing(data: Path | None, name: str, task: str, source: str) -> MissingData:
    where = "" if data is None else f", and {data} has none"
    return MissingData(
        f"{task} needs --data DIR with the files of {source} in DIR/{name}{where}: "
        f"gq-triton study fetch {task} --data DIR gets them"
    )


def _bytes(path: Path) -> Tensor:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except OSError as error:
        raise MissingData(f"{path} cannot be read: {error.strerror or error}") from error
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)


def _conv_net(channels: int, side: int) -> Builder:
    def model() -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(channels, 32, 3, padding=1),
                norm1=nn.GroupNorm(8, 32),
                relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(32, 64, 3, padding=1),
                norm2=nn.GroupNorm(8, 64),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                hidden=nn.Linear(64 * side * side, 128),
                relu3=nn.ReLU(),
                head=nn.Linear(128, 10),
            )
        )

    return model


def _mlp() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden=nn.Linear(784, 128),
            relu=nn.ReLU(),
            head=nn.Linear(128, 10),
        )
    )


def _vision(train: Pair, test: Pair, model: Builder) -> ScoredTask:
    return _scored(train, test, model, "hidden", 10)


def _scored(train: Pair, test: Pair, model: Builder, features: str, classes: int) -> ScoredTask:
    """Keep every tenth training sample for validation."""
    inputs, labels = train
    held_out = torch.arange(len(labels)) % 10 == 9
    return ScoredTask(
        train=(inputs[~held_out], labels[~held_out]),
        validation=(inputs[held_out], labels[held_out]),
        test=test,
        model=model,
        features=features,
        classes=classes,
    )
