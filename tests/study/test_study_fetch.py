"""The fetching of data sets, from a server that the test starts."""

import gzip
import hashlib
import io
import sys
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from test_study_tasks import DOCUMENT, idx

from gq_triton.commands import cli
from gq_triton.extras import how_to_install
from gq_triton.tasks import STUDY_TASKS, fetch

pytest.importorskip("pooch", reason="comes with the extra data")


@pytest.fixture
def server(monkeypatch):
    """Yield the address of a server, its files by name, and the names it was asked for."""
    files, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[1]
            asked.append(name)
            self.send_response(200 if name in files else 404)
            self.end_headers()
            self.wfile.write(files.get(name, b""))

        def log_message(self, format, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", files, asked
        listening.shutdown()
        thread.join()


def archive(members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def small(task):
    """Return the files of a task by name, in the right format, with few samples."""
    if task in ("mnist", "fashion-mnist"):
        images, labels = idx(torch.randint(256, (20, 28, 28))), idx(torch.arange(20) % 10)
        both = {"images-idx3": images, "labels-idx1": labels}
        return {
            f"{part}-{kind}-ubyte.gz": gzip.compress(content)
            for part in ("train", "t10k")
            for kind, content in both.items()
        }
    if task == "cifar10":
        names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
        members = {f"cifar-10-batches-bin/{name}.bin": bytes(2 * 3073) for name in names}
        members["cifar-10-batches-bin/readme.html"] = b"about it"
        return {"cifar-10-binary.tar.gz": archive(members)}
    rows = [
        DOCUMENT.format(split, f"<D>{topic}</D>", f"{topic} shares")
        for split in ("TRAIN", "TEST")
        for topic in ("earn", "acq") * 6
    ]
    members = {"reut2-000.sgm": "".join(rows).encode(), "README.txt": b"about it"}
    return {"reuters21578.tar.gz": archive(members)}


def serve(task, server, monkeypatch):
    address, files, _ = server
    files.update(small(task))
    known = {f"{address}/{name}": hashlib.sha256(files[name]).hexdigest() for name in files}
    source = fetch.SOURCES[task]
    assert {url.rsplit("/", 1)[1] for url in source.files} == set(files)
    monkeypatch.setitem(fetch.SOURCES, task, replace(source, files=known))


@pytest.mark.slow
@pytest.mark.parametrize("task", fetch.SOURCES)
def test_what_was_fetched_can_be_run(task, server, tmp_path, monkeypatch, capsys):
    serve(task, server, monkeypatch)
    data = tmp_path / "data"
    assert cli.main(["study", "fetch", task, "--data", str(data)]) == 0
    assert f"{task} is in {data}" in capsys.readouterr().out
    assert len(STUDY_TASKS[task].load(0, data).test[1]) in (2, 12, 20)
    assert not list(data.glob("**/[rR][eE][aA][dD]*"))
    # The second fetch downloads nothing and restores the unpacked files that were deleted.
    _, files, asked = server
    assert sorted(asked) == sorted(files)
    for path in data.glob("*/*.[bs]*"):
        path.unlink()
    assert cli.main(["study", "fetch", task, "--data", str(data)]) == 0
    assert sorted(asked) == sorted(files)
    STUDY_TASKS[task].load(0, data)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_what_cannot_be_had_is_one_line_and_leaves_nothing(
    damage, server, tmp_path, monkeypatch, capsys
):
    serve("reuters", server, monkeypatch)
    files = server[1]
    if damage == "changed":
        files["reuters21578.tar.gz"] += b"more"
    else:
        files.clear()
    assert cli.main(["study", "fetch", "reuters", "--data", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("gq-triton study: reuters cannot be fetched from http://127.0.0.1")
    assert {"changed": "hash", "gone": "404"}[damage] in said
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_or_task_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert cli.main(["study", "fetch", "mnist", "--data", str(tmp_path)]) == 2
    assert f"fetching needs pooch: {how_to_install('data')}" in capsys.readouterr().err
    assert cli.main(["study", "fetch", "digits", "--data", str(tmp_path)]) == 2
    assert "invalid choice: 'digits'" in capsys.readouterr().err


def test_addresses_are_encrypted_and_checksums_whole():
    for source in fetch.SOURCES.values():
        for url, sha256 in source.files.items():
            assert url.startswith("https://")
            assert len(bytes.fromhex(sha256)) == 32
