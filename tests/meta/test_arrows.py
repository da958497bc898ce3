"""Imports that are allowed: launch, study -> entries -> clusters -> queues -> engines -> kernels.

The entries are ``GradQueue``, the optimizers and the DDP hook. A new package needs a line in
``MAY``. An import that the table does not allow has to be removed. Until then ``KNOWN`` lists it.
"""

import ast
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Folders of the repository, and the names of their modules.
PLACES = {
    "gq_triton": "gq_triton",
    "kernels": "gq_triton.kernels",
    "dist": "gq_triton.dist",
    "launch": "launch",
    "benchmarks": "benchmarks",
}

# A room is a package or module below gq_triton, without that prefix; HOUSE is gq_triton's own
# __init__. A module belongs to the room with the longest name. Every room may import itself. Rooms
# that are not in BASE may import those of BASE.
HOUSE = "gq_triton"
BASE = {
    "names", "extras", "options", "law", "layer_sums", "loss_scale", "ring", "saved", "claims",
    "describe", "wrappers", "aside", "float8", "replayed", "rounding", "living", "keywords",
    "divided", "untraced",
}  # fmt: skip
ENGINES = {"engines"}
QUEUES = {"queues", "grouping"} | ENGINES
DOORS = {HOUSE, "cuda_graph", "grad_queue", "optim", "dist", "dist.routes", "dist.state"}
BELOW = {"cluster_grad", "cluster_grad.layers", "cluster_grad.standins"} | QUEUES
MAY = {
    "aside": set(),
    "replayed": set(),
    "names": {"divided"},
    "claims": set(),
    "living": set(),
    "divided": set(),
    "describe": {"options", "ring"},
    "keywords": {"options"},
    "extras": set(),
    "loss_scale": {"living", "untraced"},
    "untraced": set(),
    "wrappers": set(),
    "float8": set(),
    "rounding": set(),
    "options": {"float8"},
    "law": {"float8", "options"},
    "layer_sums": set(),
    "saved": {"divided", "float8", "options", "ring"},
    "ring": {"divided", "float8", "options"},
    "reference": set(),
    "testing": set(),
    "kernels": set(),
    "engines": {"kernels"},
    "queues": ENGINES,
    "grouping": ENGINES,
    "cluster_grad": BELOW,
    # A layer gives its sums to a sink, and may not know of queues.
    "cluster_grad.layers": {"cluster_grad", "grouping"} | ENGINES,
    "cluster_grad.standins": {"cluster_grad", "cluster_grad.layers", "grouping"} | ENGINES,
    "sampling": {"grouping"} | ENGINES,
    # Variance is measured by a sink of its own, and may not know of queues.
    "variance": {"cluster_grad", "grouping", "sampling", "variance.noise"} | ENGINES,
    "variance.noise": {"cluster_grad", "grouping", "commands", "tasks", "dist.sharded"} | ENGINES,
    # A command that trains tasks, with pieces of studies.
    "variance.trajectory": {
        "variance",
        "sampling",
        "study.report",
        "study.run",
        "study.trials",
        "tasks",
        "commands",
    },
    "optim": QUEUES,
    "attachment": {"optim"},
    "captured": {"grad_queue", "holders", "optim"},
    "holders": {"attachment", "cluster_grad", "grad_queue", "optim"},
    "grad_queue": {"attachment", "dist.sharded"} | BELOW,
    "dist": {"dist.routes", "dist.state"} | BELOW,
    "dist.state": {"dist", "dist.routes"} | BELOW,
    # A route is given what it needs of the state, and may not import the state.
    "dist.routes": {"dist"} | BELOW,
    "dist.sharded": {"dist"} | BELOW,
    "integrations": {"commands"} | DOORS,
    HOUSE: {"captured", "grad_queue", "optim", "cluster_grad"},
    # Tasks and training may not import each other.
    "tasks": {"commands"},
    "training": {"commands"} | DOORS,
    # The packages of a study, each of which builds on those before it; the last is the command.
    "study.design": {"tasks", "commands"},
    "study.trials": {"study.design", "tasks", "commands"} | DOORS | BELOW,
    "study.run": {"study.design", "study.trials", "tasks", "commands"} | DOORS | BELOW,
    "study.report": {"study.design", "study.run", "tasks", "commands"},
    "study": {
        "study.design",
        "study.trials",
        "study.run",
        "study.report",
        "tasks",
        "commands",
    },
    # The plan is arithmetic on shapes; ranks of the tests' tools measure the machine.
    "plan": {"commands", "testing"},
    # Benchmarks also time engines alone, and check before they time.
    "bench": {"testing", "reference", "commands"} | DOORS | BELOW,
    # The program gq-triton imports a command only when it is called, by a name in a string.
    "commands": set(),
    "launch": {"commands", "tasks", "training"} | DOORS,
    "benchmarks": {
        "bench",
        "testing",
        "kernels",
        "reference",
        "sampling",
        "tasks",
        "variance",
        "variance.noise",
        "study.design",
        "study.run",
        "study.report",
        "study.trials",
    }
    | DOORS
    | BELOW,
}

# November 2026: imports that must go, as (module, room). A line fails when its import is gone.
KNOWN: set[tuple[str, str]] = set()


def sources():
    """Yield the name and the file of every module; links are not followed."""
    for place, name in PLACES.items():
        for folder, _, files in os.walk(ROOT / place):
            for file in (Path(folder, f) for f in files if f.endswith(".py")):
                below = file.relative_to(ROOT / place).with_suffix("").parts
                yield ".".join((name, *below)).removesuffix(".__init__"), file


MODULES = dict(sources())


def imported(text):
    """Return our modules that a source imports, in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in MODULES else node.module for name in whole)
    return {name for name in found if name.partition(".")[0] == HOUSE}


def room_of(module):
    """Return the room of a module: the longest name in the table to which it belongs."""
    name = module.removeprefix(f"{HOUSE}.")
    while name not in MAY:
        name, dot, _ = name.rpartition(".")
        assert dot, f"{module} belongs to no line of MAY: add one for its package"
    return name


def wrong(module, text):
    """Return the rooms that a module imports but may not."""
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
    assert not found - known, "these modules import packages that MAY does not allow them"
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
