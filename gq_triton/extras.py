"""The commands that install the package's optional dependencies, its extras."""

import json
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import urlsplit
from urllib.request import url2pathname

__all__ = ["how_to_install"]


def how_to_install(extra: str) -> str:
    """Return the command with which a message tells how to install an extra.

    It installs from where this installation came from. pip notes that (``direct_url.json``, PEP
    610) for a checkout, an archive and a repository; without a note the package came from an index.

    Args:
        extra: a key of ``[project.optional-dependencies]`` in pyproject.toml.
    """
    try:
        note = distribution("gq_triton").read_text("direct_url.json")
    except PackageNotFoundError:  # the sources are on the path, but nothing is installed
        return f'pip install ".[{extra}]" in a checkout of gq_triton'
    if note is None:
        return f'pip install "gq_triton[{extra}]"'
    origin = json.loads(note)
    url = origin["url"]
    if "dir_info" in origin:
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f'pip install {editable}"{url2pathname(urlsplit(url).path)}[{extra}]"'
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return f'pip install "gq_triton[{extra}] @ {url}"'
