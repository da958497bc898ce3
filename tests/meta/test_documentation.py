"""The code blocks, commands and file names of README.md and docs/: they run, and they exist."""

import ast
import inspect
import itertools
import re
import shlex
import sys
import types
from functools import cache
from pathlib import Path

import pytest
import torch
from pages import PAGES, ROOT, blocks
from torch.distributed.run import get_args_parser
from train_runs import start_and_listen

import gq_triton
import gq_triton.dist
from gq_triton.commands.cli import main

PYTHON = blocks("python")
SHELL = blocks("bash")

# Blocks that continue earlier code of their page and so cannot run alone, and what tests them.
FRAGMENTS = {
    "distributed.md:On many ranks:1": "the line of README.md's example for DDP",
    "frameworks.md:Hugging Face Accelerate:1": "test_frameworks.py trains so",
    "loop.md:What the law does, in TensorBoard:1": "test_figures_go_to_a_writer runs it",
    "loop.md:nanoGPT:1": "the zoo's nanoGPT; the script itself was run by hand",
    "tutorial.md:5 Two processes:1": "the line of README.md's example for DDP",
}
# Whole scripts that need a framework: test_frameworks.py runs them as files of examples/.
FRAMEWORKS = {"lightning.md:PyTorch Lightning:1", "trainer.md:Transformers Trainer:1"}
# The page whose blocks continue each other, in one session.
SESSION = "tutorial.md"

COMPLETE = [
    b
    for b in PYTHON
    if b.name not in FRAGMENTS and b.name not in FRAMEWORKS and b.page.name != SESSION
]
ALONE = [b for b in COMPLETE if "init_process_group" not in b.text]
RANKS = [b for b in COMPLETE if "init_process_group" in b.text]


def by_name(block):
    return block.name


def test_the_list_of_fragments_is_right():
    unknown = {
        b.name for b in PYTHON if b.unknown_names() and (b in COMPLETE or b.name in FRAGMENTS)
    }
    assert unknown == set(FRAGMENTS), "a block reads names it does not define, or no longer does"


@pytest.mark.slow
@pytest.mark.parametrize("block", ALONE, ids=by_name)
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block.tree(), block.page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.slow
def test_the_session_of_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in PYTHON:
        if block.page.name == SESSION and block.name not in FRAGMENTS:
            exec(compile(block.tree(), SESSION, "exec"), names)
    said = capsys.readouterr().out.splitlines()
    weights = ["1.0 tensor([0.3333])", "1.2 tensor([1.4142])", "-6.0 tensor([3.])"]
    assert said[:3] == weights, "section 1 says other weights"
    assert said[-1] == "True"


@pytest.mark.slow
def test_figures_go_to_a_writer(monkeypatch):
    (block,) = [b for b in PYTHON if b.name == "loop.md:What the law does, in TensorBoard:1"]
    written = {}

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == "runs"

        def add_scalar(self, name, value, step):
            written[name, step] = value

    # TensorBoard is not installed everywhere; its writer's class stands in.
    stand_in = types.ModuleType("tensorboard")
    vars(stand_in)["SummaryWriter"] = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    queue = gq_triton.GradQueue(model, queue_length=3)
    queue.attach(optimizer)

    def train_step(batch):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    names = {"loader": torch.randn(5, 8, 4), "train_step": train_step, "queue": queue}
    exec(compile(block.tree(), block.page.name, "exec"), names)
    assert len(written) == 5 * 5
    assert written["grad_queue/mean_weight", 4] != 1


@pytest.mark.slow
@pytest.mark.parametrize("block", RANKS, ids=by_name)
def test_block_runs_on_two_ranks(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = Path("script.py")
    script.write_text(block.text)
    done = start_and_listen(2, script, timeout=120)
    assert [code for code, _ in done] == [0, 0], "\n".join(said for _, said in done)
    # Every script prints its rank and something that is the same on all ranks.
    one, other = (said.split()[-1] for _, said in done)
    assert len(one) == 64 or "digest()" not in block.text
    assert one == other


@pytest.mark.parametrize("block", PYTHON, ids=by_name)
def test_block_uses_keywords_that_exist(block):
    # The blocks that cannot run alone are checked too.
    public = {name: getattr(gq_triton, name) for name in gq_triton.__all__}
    public |= {name: getattr(gq_triton.dist, name) for name in gq_triton.dist.__all__}
    for call in ast.walk(block.tree()):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in public
        ):
            known = keywords(public[call.func.id])
            for keyword in call.keywords:
                assert keyword.arg is None or keyword.arg in known, f"line {call.lineno}"


def keywords(function):
    """Return the names of a function's arguments; for `register(**options)` also the state's."""
    taken = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return {*taken, *inspect.signature(gq_triton.dist.GradQueueState).parameters}
    return set(taken)


# --- examples/

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Files that stand on no page as a whole, and what runs them.
ELSEWHERE = {
    "own_script.py": "tests/study/test_study_told.py",
    "gradient_clusters.py": "tests/sampling/test_gradient_clustering.py",
}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_is_a_block_of_a_page(file):
    """What runs the blocks runs the examples, too."""
    # Below the comment that says what it is and how it is started.
    _, _, code = file.read_text(encoding="utf-8").partition("\n\n")
    same = [block for block in PYTHON if block.text == code]
    assert same or file.name in ELSEWHERE, "the page that shows this file has another text"
    pages = [page for page in PAGES if f"examples/{file.name}" in page.read_text(encoding="utf-8")]
    assert pages or same[0].page.name == "README.md", "no page names this file"


# --- commands


def commands(block):
    """Return a block's commands as lists of words; lines that continue are joined."""
    joined = block.text.replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    # Without settings of the environment, as in `A=1 command`.
    setting = re.compile(r"\w+=").match
    return [list(itertools.dropwhile(setting, words)) for words in lines if words]


@cache
def help_of(script):
    """Return the text in which a script of this repository explains its options."""
    ((code, said),) = start_and_listen(1, ROOT / script, "--help")
    assert code == 0, said
    return said


def check_options(words, shown):
    """Assert that a command's help names every option, and every name given to an option."""
    option = None
    for word in words:
        if word.startswith("--"):
            option = word
            assert re.search(rf"(?<![\w-]){word}(?![\w-])", shown), f"no option {word}"
        elif option == "--task" and ":" in word:
            pass  # a module of the user's
        elif option in ("--tasks", "--task", "--arms", "--controls", "--optimizer"):
            assert re.search(rf"(?<![\w-]){word}(?![\w-])", shown), f"nothing called {word}"


@pytest.mark.slow
@pytest.mark.parametrize("block", SHELL, ids=by_name)
def test_commands_exist(block, capsys):
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for words in commands(block):
        match words[0], words[1:]:
            case "make", [target]:
                assert target in targets
            case "pip", ["install", what]:
                extra = re.fullmatch(r"(?:\.|gq_triton)(?:\[(\w+)\])?", what)
                assert extra, f"not gq_triton: {what}"
                assert extra[1] is None or re.search(rf"^{extra[1]} = \[", pyproject, re.MULTILINE)
            case "git", ["tag" | "push", *_]:
                pass  # git's own, which nothing here can check
            case "gq-triton", _:
                # A command may have commands of its own.
                named = 2 if words[2].startswith("-") else 3
                with pytest.raises(SystemExit, match=r"^0$"):
                    main([*words[1:named], "--help"])
                check_options(words[named:], capsys.readouterr().out)
            case ("sbatch", _) | ("launch/multi_node.sh", _):
                scripts = [word for word in words if word.startswith(("launch/", "examples/"))]
                assert all((ROOT / script).is_file() for script in scripts)
                after = words[words.index(scripts[-1]) + 1 :]
                if after:
                    check_options(after, help_of(scripts[-1]))
            case "torchrun", [*options]:
                given = get_args_parser().parse_args(options)
                assert (ROOT / given.training_script).is_file()
            case _:
                pytest.fail(f"nothing here checks a command like {' '.join(words)}")


def test_every_block_names_its_language():
    fences = {
        f"{page.name}:{number}": line
        for page in PAGES
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if line.startswith("```")
    }
    known = {"```", "```python", "```bash", "```math", "```text"}
    assert {place for place, line in fences.items() if line not in known} == set()
    assert not blocks(""), "name the language: bash is checked, text is not"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_list_begins_after_an_empty_line(page):
    """Without it the site makes one paragraph of both."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    item = re.compile(r"(?:[*-]|\d+\.) ")
    for part in re.split(r"\n\s*\n", text):
        first, *others = part.strip("\n").split("\n")
        assert item.match(first) or not any(map(item.match, others)), part


# --- files


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [
        link for link in links if link and "://" not in link and not (page.parent / link).exists()
    ]
    named = re.findall(r"`(?:python )?((?:\w+/)+\w+\.(?:py|sh|md))", text)
    below = (ROOT, ROOT / "gq_triton")
    missing += [name for name in named if not any((root / name).exists() for root in below)]
    assert not missing


def anchors(page):
    """Return the anchors of a page's headings, as the site and the repository's pages make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings_and_stay_on_the_site(page):
    """`make docs` finds such links too, but is no part of the gate."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        assert page.name == "README.md" or not path.startswith(".."), f"not on the site: {link}"
        if anchor:
            assert anchor in anchors(page.parent / path if path else page), link
