"""The commands of hosted machines and commit hooks, which must exist and fit pyproject.toml."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HOSTED = [
    *sorted(ROOT.glob(".github/**/*.yml")),
    ROOT / ".pre-commit-config.yaml",
    ROOT / "CITATION.cff",
]
WORKFLOWS = [path for path in HOSTED if path.parent.name == "workflows"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
(PHONY,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
TARGETS = set(PHONY.split())

pytestmark = pytest.mark.skipif(
    not (ROOT / ".github").is_dir(), reason="a source archive holds no files for hosted machines"
)


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def project():
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("path", HOSTED, ids=lambda path: path.name)
def test_file_is_yaml(path):
    assert isinstance(read(path), dict)


# --- make


def test_every_target_is_explained_and_has_a_recipe():
    explained = set(re.findall(r'^\t@echo "make ([\w-]+) ', MAKEFILE, re.MULTILINE))
    assert explained == TARGETS - {"help"}
    assert set(re.findall(r"^(\w[\w-]*):(?!=)", MAKEFILE, re.MULTILINE)) == TARGETS


# --- workflows


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_calls_targets_that_exist(path):
    workflow = read(path)
    called = set()
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] > 0, name
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), name
            called |= set(re.findall(r"^make (\S+)$", step.get("run", ""), re.MULTILINE))
    assert called
    assert called <= TARGETS


def test_the_citation_has_the_version_and_the_changelog_has_its_date():
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == project()["version"]
    heading = f"## [{citation['version']}] - {citation['date-released']}"
    assert heading in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()


def test_workflow_has_every_lane_and_every_python():
    jobs = read(ROOT / ".github" / "workflows" / "test.yml")["jobs"]
    lanes = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    targets = {"lint", "test", "test-all", "test-docs", "test-oldest"}
    assert lanes == {f"make {target}" for target in targets}
    tested = jobs["tests"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: 3."
    promised = [c.rpartition(" ")[2] for c in project()["classifiers"] if c.startswith(prefix)]
    assert tested == promised
    assert project()["requires-python"] == f">={tested[0]}"


# --- the oldest versions


def test_oldest_versions_are_the_lower_bounds():
    asked = [*project()["dependencies"]]
    for extra, requirements in project()["optional-dependencies"].items():
        if extra not in (
            "test",
            "dev",
            "docs",
        ):  # the versions of our tools are no promise to users
            asked += requirements
    bounds = dict(re.findall(r"^([\w-]+)>=([\w.]+)", "\n".join(asked), re.MULTILINE))
    assert {"torch", "triton", "numba"} <= set(bounds)
    text = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE))
    for name, bound in bounds.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pinned[name]), name


# --- hooks and attributes


def hooks():
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    return {hook["id"]: hook for hook in repository["hooks"]}


def test_hooks_use_the_ruff_of_the_gate():
    for name in ("ruff-check", "ruff-format"):
        assert hooks()[name]["entry"].startswith(".venv/bin/ruff " + name.removeprefix("ruff-"))
    assert "ruff==" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        ("dist/gq_triton-0.1.0-py3-none-any.whl", True),
        ("dist/gq_triton-0.1.0.tar.gz", True),
        ("dist/.gitignore", True),
        ("dist/state.py", False),
        ("dist/routes/base.py", False),
        ("kernels/README.md", False),
        ("out/gq_triton-0.1.0.tar.gz", False),
    ],
)
def test_hook_keeps_build_output_out_of_dist(path, refused):
    hook = hooks()["dist-holds-only-sources"]
    matches = re.search(hook["files"], path) and not re.search(hook["exclude"], path)
    assert bool(matches) == refused


@pytest.mark.parametrize(
    ("path", "attribute", "value"),
    [
        ("dist/state.py", "linguist-generated", "unset"),
        ("dist/routes/base.py", "linguist-vendored", "unset"),
        ("dist/state.py", "linguist-detectable", "set"),
        ("dist/state.py", "eol", "lf"),
        ("docs/study/rules/results.csv", "diff", "unset"),
        ("docs/study/rules/digits-longtail-scores.png", "text", "unset"),
        ("docs/design.md", "linguist-documentation", "set"),
    ],
)
def test_git_takes_dist_for_source_and_results_for_data(path, attribute, value):
    # The tests also run from the source archive, which has no .git to ask.
    if not (ROOT / ".git").exists():
        pytest.skip("attributes are git's, and this is no checkout")
    asked = subprocess.run(
        ["git", "check-attr", attribute, path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert asked.stdout.strip() == f"{path}: {attribute}: {value}"
