"""The install lines of messages, for each way in which pip may have installed the package."""

import json
from importlib.metadata import PackageNotFoundError

import pytest

from gq_triton import extras

GIT = {"vcs": "git", "commit_id": "c0ffee"}


@pytest.mark.parametrize(
    ("note", "line"),
    [
        (None, 'pip install "gq_triton[cpu]"'),
        ({"url": "file:///a%20b/gq", "dir_info": {}}, 'pip install "/a b/gq[cpu]"'),
        (
            {"url": "file:///home/gq", "dir_info": {"editable": True}},
            'pip install -e "/home/gq[cpu]"',
        ),
        (
            {"url": "file:///out/gq_triton-0.2.0-py3-none-any.whl", "archive_info": {}},
            'pip install "gq_triton[cpu] @ file:///out/gq_triton-0.2.0-py3-none-any.whl"',
        ),
        (
            {"url": "https://host/gq.git", "vcs_info": GIT},
            'pip install "gq_triton[cpu] @ git+https://host/gq.git@c0ffee"',
        ),
    ],
    ids=["index", "folder", "editable", "archive", "repository"],
)
def test_the_line_installs_from_where_the_package_came_from(note, line, monkeypatch):
    class Installed:
        def read_text(self, name):
            assert name == "direct_url.json"
            return note and json.dumps(note)

    monkeypatch.setattr(extras, "distribution", lambda name: Installed())
    assert extras.how_to_install("cpu") == line


def test_sources_that_are_not_installed_name_the_checkout(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "distribution", missing)
    assert extras.how_to_install("cpu") == 'pip install ".[cpu]" in a checkout of gq_triton'
