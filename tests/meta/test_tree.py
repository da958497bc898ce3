"""The tree of tests, as pytest and its workers need it."""

from collections import Counter
from pathlib import Path

from conftest import LONGEST

FILES = [file.name for file in Path(__file__).resolve().parents[1].rglob("*.py")]


def test_names_of_modules_are_unique():
    """Every folder is on the path, so that of two modules with one name one would be hidden."""
    assert [name for name, count in Counter(FILES).items() if count > 1] == []


def test_the_longest_files_exist():
    assert set(LONGEST) <= set(FILES)
