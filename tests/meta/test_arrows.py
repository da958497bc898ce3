"""Imports go down the house: launch, study -> doors -> clusters -> queues -> engines -> kernels.

A package that is new goes into ``MAY``. An import that breaks the table goes, not into the table,
but away; one that a coming change mends stands in ``KNOWN`` until then.
"""

import ast
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Where the files of a package lie in the repository, and what their modules are called.
PLACES = {
    "gq_triton": "gq_triton",
    "kernels": "gq_triton.kernels",
    "dist": "gq_triton.dist",
    "launch": "launch",
    "benchmarks": "benchmarks",
}

# Rooms are packages and modules below gq_triton, ROOM is its __init__; the longest name counts.
# Everything may import itself and what stands in BASE, unless it stands in BASE itself.
HOUSE = "gq_triton"
BASE = {"names", "extras", "options", "law", "ring", "saved", "claims"}
ENGINES = {"engines"}
QUEUES = {"queues", "grouping"} | ENGINES
DOORS = {HOUSE, "grad_queue", "optim", "dist", "dist.routes", "dist.state"}
BELOW = {"cluster_grad", "cluster_grad.layers"} | QUEUES
MAY = {
    "names": set(),
    "claims": set(),
    "extras": set(),
    "options": set(),
    "law": {"options"},
    "saved": {"options", "ring"},
    "ring": {"options"},
    "reference": set(),
    "testing": set(),
    "kernels": set(),
    "engines": {"kernels"},
    "queues": ENGINES,
    "grouping": ENGINES,
    "cluster_grad": BELOW,
    # A layer gives sums to a sink: it knows no queue.
    "cluster_grad.layers": {"cluster_grad", "grouping"} | ENGINES,
    "optim": QUEUES,
    "grad_queue": {"optim"} | BELOW,
    "dist": {"dist.routes", "dist.state"} | BELOW,
    "dist.state": {"dist", "dist.routes"} | BELOW,
    # A route gets what it needs of the state: it does not know the state.
    "dist.routes": {"dist"} | BELOW,
    HOUSE: {"grad_queue", "optim"},
    # Neither imports the other.
    "tasks": {"commands"},
    "training": {"commands"} | DOORS,
    # A study: what is asked, one trial, many trials, what they say, the command.
    "study.design": {"tasks", "commands"},
    "study.trials": {"study.design", "tasks", "commands"} | DOORS | BELOW,
    "study.run": {"study.design", "study.trials", "tasks", "commands"} | DOORS | BELOW,
    "study.report": {"study.design", "study.run", "tasks", "commands"},
    "study": {"study.design", "study.run", "study.report", "tasks", "commands"},
    # gq-triton imports a command when it is called.
    "commands": set(),
    "launch": {"commands", "tasks", "training"} | DOORS,
    # They time engines alone, too.
    "benchmarks": {"testing", "kernels"} | DOORS | BELOW,
}

# November 2026: (module, room) of imports that must go. A line that is no longer true fails.
KNOWN: set[tuple[str, str]] = set()


def sources():
    """Yield the name of every module and its file, without following links."""
    for place, name in PLACES.items():
        for folder, _, files in os.walk(ROOT / place):
            for file in (Path(folder, f) for f in files if f.endswith(".py")):
                below = file.relative_to(ROOT / place).with_suffix("").parts
                yield ".".join((name, *below)).removesuffix(".__init__"), file


MODULES = dict(sources())


def imported(text):
    """Return the modules of ours that a source names anywhere, TYPE_CHECKING and functions too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in MODULES else node.module for name in whole)
    return {name for name in found if name.partition(".")[0] == HOUSE}


def room_of(module):
    """Return the longest name in the table that the module lies in."""
    name = module.removeprefix(f"{HOUSE}.")
    while name not in MAY:
        name, dot, _ = name.rpartition(".")
        assert dot, f"{module} is in no room: put it into MAY"
    return name


def wrong(module, text):
    """Return the rooms that a module imports and must not."""
    room = room_of(module)
    base = set() if room in BASE else BASE
    return {to for name in imported(text) if (to := room_of(name)) not in {room} | MAY[room] | base}


@pytest.mark.parametrize("room", MAY)
def test_imports_follow_the_arrows(room):
    found = {
        (module.removeprefix(f"{HOUSE}."), to)
        for module, file in MODULES.items()
        if room_of(module) == room
        for to in wrong(module, file.read_text(encoding="utf-8"))
    }
    known = {(module, to) for module, to in KNOWN if room_of(module) == room}
    assert not found - known, "these modules import rooms that MAY does not grant theirs"
    assert not known - found, "these imports are gone: delete their lines in KNOWN"


@pytest.mark.parametrize(
    ("module", "text", "rooms"),
    [
        ("gq_triton.dist.state", "import gq_triton.kernels.weigh", {"kernels"}),
        ("gq_triton.queues", "if TYPE_CHECKING:\n    from gq_triton.optim import X", {"optim"}),
        ("gq_triton.optim.sgd", "def f():\n    from gq_triton import GradQueue", {HOUSE}),
        ("gq_triton.dist.routes.whole", "from gq_triton.dist import state", {"dist.state"}),
        ("gq_triton.cluster_grad.layers.linear", "from gq_triton.queues import Queues", {"queues"}),
        ("gq_triton.ring", "from gq_triton.saved import check", {"saved"}),
        ("gq_triton.optim.sgd", "from gq_triton.ring import Ring\nimport torch", set()),
    ],
)  # fmt: skip
def test_a_wrong_import_is_seen(module, text, rooms):
    assert wrong(module, text) == rooms
