"""The code blocks of README.md and of the pages in docs/, by page and heading."""

import ast
import builtins
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A fenced block of code: where it stands and what it says."""

    page: Path
    heading: str
    number: int  # among the blocks of this language under this heading, from 1
    line: int  # of the first line of code
    text: str

    @property
    def name(self) -> str:
        """Page, heading and number: the test id."""
        return f"{self.page.name}:{self.heading}:{self.number}"

    def tree(self) -> ast.Module:
        """Return the block as Python; line numbers are those of the page."""
        tree = ast.parse(self.text, self.page.name)
        return ast.increment_lineno(tree, self.line - 1)

    def unknown_names(self) -> set[str]:
        """Return the names that the block reads before anything in it has defined them."""
        unknown, defined = set(), set(dir(builtins)) | {"__name__"}
        for statement in self.tree().body:
            # `x = f(x)` reads x first; in a loop or a function the order is not looked at.
            assigns = isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign))
            first = statement.value if assigns and statement.value else statement
            read, written = _names(first)
            unknown |= read - written - defined
            defined |= written | _names(statement)[1]
        return unknown


def _names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Return the names that are read and those that are defined anywhere below a node."""
    read, defined = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
    return read, defined


def blocks(language: str) -> list[Block]:
    """Return every block of a language, page by page from the top."""
    return [block for page in PAGES for block in _of_page(page, language)]


def _of_page(page: Path, language: str) -> list[Block]:
    found: list[Block] = []
    heading, fence, start = "", None, 0
    lines = page.read_text(encoding="utf-8").splitlines()
    for index, line in enumerate(lines):
        if fence is None and line.startswith("#"):
            heading = re.sub(r"[^\w ,-]", "", line.lstrip("# "))
        elif line.startswith("```") and fence is None:
            fence, start = line.removeprefix("```").strip(), index + 1
        elif line.startswith("```"):
            if fence == language:
                number = 1 + sum(block.heading == heading for block in found)
                text = "\n".join(lines[start:index]) + "\n"
                found.append(Block(page, heading, number, start + 1, text))
            fence = None
    return found
