"""The download of the paper's data sets, from known addresses, with known checksums, on request."""

import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gq_triton.commands.files import whole_file
from gq_triton.tasks.scored import MissingData

__all__ = ["SOURCES", "Source", "fetch"]


@dataclass(frozen=True)
class Source:
    """The source of a task's files.

    Args:
        folder: where the task looks for the files, below the folder of all data.
        files: SHA-256 of each download, by its address.
        members: pattern of the names of files that are copied out of an archive; None if the
            downloads are no archives.
        size: size of the downloads, in words.
    """

    folder: str
    files: dict[str, str]
    members: str | None
    size: str


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"  # PyTorch's; the authors' page is closed
# The repository of the data set's authors at one commit; their other address is not encrypted.
_FASHION = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/"
    "b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion"
)

SOURCES: dict[str, Source] = {
    "cifar10": Source(
        "cifar-10-batches-bin",
        {
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz": (
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
            )
        },
        members="*.bin",
        size="170 MB",
    ),
    "fashion-mnist": Source(
        "fashion-mnist",
        {
            f"{_FASHION}/train-images-idx3-ubyte.gz": (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
            ),
            f"{_FASHION}/train-labels-idx1-ubyte.gz": (
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
            ),
            f"{_FASHION}/t10k-images-idx3-ubyte.gz": (
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
            ),
            f"{_FASHION}/t10k-labels-idx1-ubyte.gz": (
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
            ),
        },
        members=None,
        size="31 MB",
    ),
    "mnist": Source(
        "mnist",
        {
            f"{_MNIST}/train-images-idx3-ubyte.gz": (
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
            ),
            f"{_MNIST}/train-labels-idx1-ubyte.gz": (
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
            ),
            f"{_MNIST}/t10k-images-idx3-ubyte.gz": (
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
            ),
            f"{_MNIST}/t10k-labels-idx1-ubyte.gz": (
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
            ),
        },
        members=None,
        size="12 MB",
    ),
    "reuters": Source(
        "reuters21578",
        {
            "https://kdd.ics.uci.edu/databases/reuters21578/reuters21578.tar.gz": (
                "3bae43c9b14e387f76a61b6d82bf98a4fb5d3ef99ef7e7075ff2ccbcf59f9d30"
            )
        },
        members="*.sgm",
        size="8 MB",
    ),
}
"""The tasks whose files can be fetched."""


def fetch(task: str, data: Path) -> Path:
    """Fetch the files of a task and return their folder; downloads that exist are only checked.

    An archive stays in ``data``, so that a later call need not download it.

    Args:
        task: a key of ``SOURCES``.
        data: folder of all data, as ``--data`` names it.

    Raises:
        MissingData: a file cannot be downloaded, or its checksum is another.
    """
    import pooch

    source = SOURCES[task]
    folder = data / source.folder
    for url, sha256 in source.files.items():
        try:
            place = folder if source.members is None else data
            path = pooch.retrieve(url, f"sha256:{sha256}", PurePosixPath(url).name, place)
            if source.members is not None:
                _unpack(Path(path), source.members, folder)
        except (OSError, ValueError) as error:  # the network's errors are of the former kind
            reason = " ".join(str(error).split())
            raise MissingData(
                f"{task} cannot be fetched from {url}; where there is no network put "
                f"{_contents(source)} into {folder} by hand ({reason})"
            ) from error
    return folder


def _contents(source: Source) -> str:
    """Return which files the folder of a task holds, in words."""
    names = [PurePosixPath(url).name for url in source.files]
    return ", ".join(names) if source.members is None else f"the {source.members} of {names[0]}"


def _unpack(archive: Path, members: str, folder: Path) -> None:
    """Copy the matching files out of any folder of an archive, each whole or not at all."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive) as packed:
        for member in packed:
            name = PurePosixPath(member.name)
            content = packed.extractfile(member) if name.match(members) else None
            if content is not None:
                with whole_file(folder / name.name) as file:
                    file.write(content.read())
