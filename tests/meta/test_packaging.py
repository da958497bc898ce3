"""The package, which must be the same on disk, in pyproject.toml and in the wheel."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Folders of the repository, and the names of the packages that are installed from them.
PLACES = {"gq_triton": "gq_triton", "kernels": "gq_triton.kernels", "dist": "gq_triton.dist"}

# Packages that must not be imported for somebody who only wants an optimizer.
HEAVY = {"matplotlib", "numba", "pandas", "rich", "scipy", "sklearn", "triton", "tyro"}
HEAVY |= {"torch._dynamo", "torch.distributed.tensor"}


def pyproject():
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(code, cwd, **env):
    """Return the standard output of `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def source_packages():
    """Return the installed name of every folder with an `__init__.py`; links are not followed."""
    found = set()
    for place, name in PLACES.items():
        for folder, children, files in os.walk(ROOT / place):
            children[:] = [c for c in children if not c.startswith((".", "__"))]
            if "__init__.py" in files:
                below = Path(folder).relative_to(ROOT / place).parts
                found.add(".".join((name, *below)))
    return found


def source_files():
    """Return the installed path of every file that belongs in the wheel."""
    found = set()
    for place, name in PLACES.items():
        for folder, children, files in os.walk(ROOT / place):
            children[:] = [c for c in children if not c.startswith((".", "__"))]
            below = Path(name.replace(".", "/")) / Path(folder).relative_to(ROOT / place)
            found.update(str(below / f) for f in files if f.endswith(".py") or f == "py.typed")
    return found


def test_every_folder_is_a_listed_package():
    setuptools = pyproject()["tool"]["setuptools"]
    listed = setuptools["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == source_packages()
    assert setuptools["package-dir"] == {name: place for place, name in PLACES.items()}


@pytest.mark.parametrize("place", ["kernels", "dist"])
def test_links_show_checkers_what_the_mapping_installs(place):
    link = ROOT / "gq_triton" / place
    if not link.is_symlink() and link.is_file():
        pytest.skip("this checkout turned links into text files; the mapping alone is in use")
    assert link.is_symlink()
    assert os.readlink(link) == f"../{place}"


@pytest.mark.parametrize("place", ["kernels", "dist"])
def test_repository_root_is_not_importable(place):
    spec = importlib.util.find_spec(place)
    ours = spec is not None and spec.origin == str(ROOT / place / "__init__.py")
    assert not ours, "the repository root is on sys.path: install gq_triton, set no PYTHONPATH"


def test_dist_holds_only_sources():
    # Builds write there by default, and `uv build` leaves a .gitignore that hides new sources.
    strangers = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "dist").rglob("*")
        if "__pycache__" not in path.parts and path.is_file() and path.suffix not in {".py", ".md"}
    ]
    assert not strangers, "build into another folder: python -m build --outdir out"


@pytest.mark.slow
def test_import_is_light(tmp_path):
    loaded = set(python("import sys, gq_triton; print(*sys.modules)", tmp_path).split())
    assert "gq_triton" in loaded
    assert not loaded & HEAVY


@pytest.mark.slow
def test_wheel_from_sdist_works_elsewhere(tmp_path):
    # A copy is built, because a build writes into the sources and an old egg-info can add files.
    source = tmp_path / "source"
    unwanted = (".*", "__pycache__", "*.egg-info", "build", "out", "runs", "site")
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*unwanted))
    out = tmp_path / "out"
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "kernels/__init__.py"} <= members
    linked = {"gq_triton/kernels", "gq_triton/dist"}
    assert not linked & {parent for name in members for parent in (name, name.rpartition("/")[0])}

    (wheel,) = out.glob("*.whl")
    version = pyproject()["project"]["version"]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    packed = {name for name in names if not name.startswith(f"gq_triton-{version}.dist-info/")}
    assert packed == source_files()
    assert "gq_triton/py.typed" in packed

    # find_spec("pip") would not do: setuptools' hook warns there once distutils was imported.
    if "pip" not in importlib.metadata.packages_distributions():
        pytest.skip("the wheel is right; installing it needs pip, which this environment lacks")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(wheel)], cwd=tmp_path, check=True)
    modules = ["gq_triton", "gq_triton.optim", "gq_triton.dist"]
    if importlib.util.find_spec("triton") is not None:
        modules.append("gq_triton.kernels")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import importlib\n"
        f"for name in {modules}: print(importlib.import_module(name).__file__)\n"
        "import importlib.metadata; print(importlib.metadata.version('gq_triton'))"
    )
    *files, installed = python(code, elsewhere, PYTHONPATH=str(site)).splitlines()
    assert installed == version
    assert [Path(f) for f in files] == [
        site / name.replace(".", "/") / "__init__.py" for name in modules
    ]
