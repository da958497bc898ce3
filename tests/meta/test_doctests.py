"""The examples in docstrings, which must run and print what stands below them."""

import doctest
import importlib
import os
from pathlib import Path

import pytest

from gq_triton.testing import spawn

ROOT = Path(__file__).resolve().parents[2]

# Folders of the repository, and the names of the packages that are installed from them.
PLACES = {"gq_triton": "gq_triton", "kernels": "gq_triton.kernels", "dist": "gq_triton.dist"}


def modules_with_examples():
    """Return the installed names of the modules that have an example; links are not followed."""
    found = []
    for place, name in PLACES.items():
        for folder, _, files in os.walk(ROOT / place):
            for file in files:
                path = Path(folder, file)
                if path.suffix == ".py" and ">>> " in path.read_text(encoding="utf-8"):
                    below = path.relative_to(ROOT / place).with_suffix("").parts
                    found.append(".".join((name, *below)).removesuffix(".__init__"))
    return sorted(found)


MODULES = modules_with_examples()


def run_examples(*modules):
    """Run every example of some modules; fail with the differences from the printed text."""
    said = []
    runner = doctest.DocTestRunner()
    for name in modules:
        module = importlib.import_module(name)
        for case in doctest.DocTestFinder(exclude_empty=True).find(module, name):
            runner.run(case, out=said.append)
    assert not runner.failures, "".join(said)
    assert runner.tries


def run_examples_on_a_rank(rank, *modules):
    run_examples(*modules)


# The examples of gq_triton.testing train: seconds.
@pytest.mark.parametrize(
    "module",
    [
        pytest.param(m, marks=pytest.mark.slow) if m == "gq_triton.testing" else m
        for m in MODULES
        if not m.startswith("gq_triton.dist.")
    ],
)
def test_examples_print_what_they_say(module):
    run_examples(module)


@pytest.mark.slow
def test_examples_of_dist_print_what_they_say_on_two_ranks():
    spawn(2, run_examples_on_a_rank, *[m for m in MODULES if m.startswith("gq_triton.dist.")])


def test_examples_stand_where_the_site_looks_for_them():
    """Griffe knows ``Examples:``; below ``Example:`` it makes quotations of ``>>>``."""
    assert not [
        path
        for place in PLACES
        for path in (ROOT / place).glob("**/*.py")
        if " Example:\n" in path.read_text(encoding="utf-8")
    ]


def test_no_example_is_skipped():
    assert not [
        path
        for place in PLACES
        for path in (ROOT / place).glob("**/*.py")
        if "doctest: +SKIP" in path.read_text(encoding="utf-8")
    ]
