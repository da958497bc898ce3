"""The kernels as compiled ahead of time: no spills, vector loads, one layout."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import triton
from triton.backends.amd.compiler import HIPBackend

NVIDIA = ("sm_80", "sm_90", "sm_100")
RINGS = ("weigh", "push", "gqsgd", "gqadamw")
SUMS = ("position_sums", "channel_sums", "sums_all", "sums_all, images")
AMD = pytest.param(
    "gfx942",
    marks=pytest.mark.skipif(
        hasattr(HIPBackend, "path_to_rocm_lld"), reason="Triton before 3.5 needs ROCm's linker"
    ),
)
pytestmark = pytest.mark.slow


SCRIPT = Path(__file__).with_name("compile_kernels.py")


def lines_of(script, **variables):
    """Return the lines that a script prints in a process without the Triton interpreter.

    Triton caches compiled kernels in the user's folder, so that all checkouts share them. The key
    covers the source of the kernel and of all that it calls, the types, the target, the options
    and Triton's version: the next run compiles changed ones only.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@cache
def compiled():
    """Return one dict per kernel, case and architecture."""
    return [json.loads(line) for line in lines_of(SCRIPT)]


def select(*, kernels=None, case=None, archs=NVIDIA):
    """Return the chosen dicts, at least one."""
    chosen = [
        entry
        for entry in compiled()
        if entry["arch"] in archs
        and (kernels is None or entry["kernel"] in kernels)
        and (case is None or entry["case"] == case)
    ]
    assert chosen
    return chosen


@pytest.mark.parametrize("arch", [*NVIDIA, AMD])
def test_every_kernel_compiles(arch):
    kernels = {entry["kernel"] for entry in select(archs=(arch,))}
    clustered = {"combine", "combine_all", "statistics", *SUMS, "group"}
    clustered |= {"combine_rows", "weight_grad", "depthwise"}
    clustered |= {"lloyd", "unit", "mean", "iterate", "label"}
    if arch == "sm_90":  # on the others by make test-all
        clustered |= {"gradient_position", "gradient_whole"}
    kernels -= set() if arch == "sm_90" else {"gradient_position", "gradient_whole"}
    assert kernels == {*RINGS, *clustered, "all_finite", "total"}


def test_no_loop_spills():
    """One or two values may wait on the stack while the loop over full blocks runs."""
    assert [entry for entry in select() if entry["STACK"] > 16 or entry["STACK_LOOPS"]] == []
    spilled = {entry["kernel"] for entry in select() if entry["STACK"]}
    assert spilled <= {"combine_rows", "gqsgd", "gqadamw", *SUMS}


def test_float32_loads_and_stores_are_16_bytes_wide():
    """The loop over full blocks has one access of 16 bytes per tensor and row."""
    tensors = {"weigh": (6, 2), "push": (1, 1), "gqsgd": (8, 3), "gqadamw": (9, 4)}
    for entry in select(kernels=RINGS, case="float32"):
        loads, stores = tensors[entry["kernel"]]
        assert entry["accesses"]["ld.global.v4.b32"] == loads
        assert entry["accesses"]["st.global.v4.b32"] == stores
    for entry in select(kernels=("all_finite",)):
        assert entry["accesses"]["ld.global.v4.b32"] >= 1


def test_combine_loads_and_stores_are_16_bytes_wide():
    """There is one load per queue row, one of the sums in the loop over clusters, two stores."""
    for entry in select(kernels=("combine", "combine_all"), case="float32"):
        assert entry["accesses"]["ld.global.v4.b32"] == 5 + 1
        assert entry["accesses"]["st.global.v4.b32"] == 2


def test_sums_by_cluster_load_16_bytes():
    """A thread loads eight elements of each tensor; accesses are narrow without alignment."""
    for entry in select(kernels=SUMS, case="float32"):
        assert entry["accesses"]["ld.global.v4.b32"] == 2 * 2
    for entry in select(kernels=SUMS, case="bfloat16"):
        assert entry["accesses"]["ld.global.v4.b32"] == 2
    for entry in select(kernels=SUMS, case="unaligned"):
        assert "ld.global.v4.b32" not in entry["accesses"]


@pytest.mark.parametrize(
    ("arch", "product"),
    [("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma")],
)
def test_gradients_of_weights_use_tensor_cores(arch, product):
    """Factors go to shared memory by copies of 16 bytes, also where rows are looked up."""
    for case in ("bfloat16, rows of one sample", "bfloat16", "bfloat16, taps"):
        for entry in select(kernels=("weight_grad",), case=case, archs=(arch,)):
            assert set(entry["products"]) == {product}
            assert set(entry["copies"]) == {"0x10"}
    if arch == "sm_90":  # of images whose channels come first a copy has one element
        (entry,) = select(kernels=("weight_grad",), case="tf32, channels first", archs=(arch,))
        assert set(entry["products"]) == {product}
        assert set(entry["copies"]) == {"0x4"}


def test_float64_loads_are_16_bytes_wide():
    for entry in select(kernels=RINGS, case="float64"):
        # A push reads the gradient alone.
        least = 1 if entry["kernel"] == "push" else 6
        assert entry["accesses"]["ld.global.v2.b64"] >= least


def test_unaligned_tensors_get_no_vector_access():
    for entry in select(kernels=RINGS, case="unaligned"):
        assert not [name for name in entry["accesses"] if ".v2." in name or ".v4." in name]


def test_an_element_belongs_to_one_thread():
    """Different layouts would let a slot be overwritten before another thread has read it."""
    several = [e for e in select(kernels=RINGS, archs=(*NVIDIA, "gfx942")) if e["layouts"] != 1]
    assert several == []


TEXT = """
import triton

@triton.jit
def helper(x):
    return x * FACTOR

@triton.jit
def kernel(out):
    triton.language.store(out, helper(triton.language.load(out)))
"""
CHANGES = f"""
import importlib, json, linecache, os, sys
from pathlib import Path
sys.path.append({str(SCRIPT.parent)!r})
import triton
from kernel_lines import forget_lines, keys_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.dont_write_bytecode = True
for factor, shift in (("3.0", ""), ("5.0", ""), ("3.0", "# one line more\\n")):
    text = shift + {TEXT!r}.replace("FACTOR", factor)
    Path(__file__).with_name("changing.py").write_text(text)
    linecache.clearcache()
    sys.modules.pop("changing", None)
    kernel = importlib.import_module("changing").kernel
    forget_lines()
    source = ASTSource(kernel, {{"out": "*fp32"}}, {{}})
    target = GPUTarget("cuda", 80, 32)
    ptx = triton.compile(source, target=target).asm["ptx"]
    kept = len(os.listdir(os.environ["TRITON_CACHE_DIR"]))
    keys = [keys_of(source, {{"sm_80": (target, {{"num_warps": n}})}})["sm_80"] for n in (4, 8)]
    print(json.dumps(["0f40400000" in ptx, "0f40A00000" in ptx, kept, *keys]))  # 3.0 and 5.0
"""


def test_a_kernel_whose_helper_changed_is_compiled_anew_and_kept(tmp_path):
    script = tmp_path / "changes.py"
    script.write_text(CHANGES)
    found = [
        json.loads(line) for line in lines_of(script, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    ]
    assert [one[:3] for one in found] == [[True, False, 1], [False, True, 2], [True, False, 2]]
    # So it is with the record: the same code has the same key, wherever it stands in its file;
    # other code and other options have another one.
    first, second, third = (one[3:] for one in found)
    assert first == third
    assert len({*first, *second}) == 4


RECORD = json.loads(SCRIPT.with_name("kernel_lines.json").read_text())


@pytest.mark.rare
@pytest.mark.skipif(RECORD["triton"] != triton.__version__, reason="recorded with another Triton")
def test_kernels_compile_to_what_is_recorded():
    """make test-all compiles all kernels; elsewhere those that are recorded are not compiled."""
    recorded = RECORD["lines"]
    about = ("kernel", "case", "arch", "key")
    known = [entry for entry in compiled() if entry["key"] in recorded]
    for entry in known:
        line = {name: value for name, value in entry.items() if name not in about}
        assert line == recorded[entry["key"]], entry
    assert known
