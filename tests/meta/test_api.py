"""docs/api.md lists every public name and no other; the pages of docs/api/ show the same ones."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
# A section: its heading, and the text up to the next heading.
_SECTION = re.compile(r"^## `([\w.]+)`\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SECTIONS = dict(_SECTION.findall(PAGE.read_text(encoding="utf-8")))
# Modules whose `__all__` is for users as a whole. Of gq_triton.grouping only KMeans is.
WHOLE = (
    "gq_triton",
    "gq_triton.dist",
    "gq_triton.reference",
    "gq_triton.sampling",
    "gq_triton.testing",
    "gq_triton.variance",
)
# Modules that need a framework, which this file does not import: their `__all__` is read.
CALLBACKS = tuple(
    f"gq_triton.integrations.{n}" for n in ("accelerate", "lightning", "transformers")
)
# Classes whose public members, as far as gq_triton defines them, are all for users. GradQueueState
# also has members for the hook's own files, which are no promise.
CLASSES = ("GQAdamW", "GQSGD", "GradQueue")


def listed(module):
    """Return the names that a section lists, each with its sentence."""
    rows = re.findall(r"^\| (`.*?`) \| (.*) \|$", SECTIONS[module], re.MULTILINE)
    return {name: text for names, text in rows for name in re.findall(r"`([\w.]+)`", names)}


def resolve(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def members(cls):
    """Return the public members of a class that gq_triton defines; torch's are left out."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("gq_triton")]
    return {name for base in ours for name in vars(base) if not name.startswith("_")}


def test_sections_are_modules():
    assert set(SECTIONS) == {*WHOLE, *CALLBACKS, "gq_triton.grouping"}


@pytest.mark.parametrize("module", CALLBACKS)
def test_every_name_of_a_callback_module_is_listed(module):
    source = (PAGE.parents[1] / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    (public,) = re.findall(r"^__all__ = (\[.*\])$", source, re.MULTILINE)
    assert {name for name in listed(module) if "." not in name} == set(ast.literal_eval(public))


@pytest.mark.parametrize("module", WHOLE)
def test_every_public_name_is_listed(module):
    public = set(importlib.import_module(module).__all__)
    assert {name for name in listed(module) if "." not in name} == public


@pytest.mark.parametrize("cls", CLASSES)
def test_every_public_member_is_listed(cls):
    named = {name.partition(".")[2] for name in listed("gq_triton") if name.startswith(f"{cls}.")}
    assert named == members(resolve("gq_triton", cls))


@pytest.mark.parametrize("module", [name for name in SECTIONS if name not in CALLBACKS])
def test_every_listed_name_exists_and_is_explained(module):
    assert listed(module)
    for name, text in listed(module).items():
        assert getattr(resolve(module, name), "__doc__", None), f"{name} has no docstring"
        assert len(text.split()) >= 3, name


# --- the pages of docs/api, which the site fills from the docstrings


def shown():
    """Return the objects that the pages show, each with the members that it is shown with."""
    found = {}
    for page in sorted((PAGE.parent / "api").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name, block in re.findall(r"^::: ([\w.]+)\n((?:    .*\n)*)", text, re.MULTILINE):
            assert name not in found, f"{page.name} shows {name} once more"
            options = yaml.safe_load(block)["options"]
            found[name] = (page.stem, options["members"] or [])
    return found


def test_every_listed_name_has_its_place_on_a_page():
    expected = {}
    for module in SECTIONS:
        names = list(listed(module))
        _, _, part = module.partition(".")
        page = part.partition(".")[0] or module
        for name in names:
            if "." not in name:
                own = [n.partition(".")[2] for n in names if n.startswith(f"{name}.")]
                expected[f"{module}.{name}"] = (page, own)
    assert shown() == expected


def test_the_site_has_every_page():
    site = (PAGE.parents[1] / "zensical.toml").read_text(encoding="utf-8")
    pages = {str(page.relative_to(PAGE.parent)) for page in PAGE.parent.rglob("*.md")}
    assert set(re.findall(r'"([\w/-]+\.md)"', site)) == pages, "nav in zensical.toml"
