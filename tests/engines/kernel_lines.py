# pyright: basic
"""One kernel, compiled ahead of time: what ``compile_kernels.py`` prints of it, and its record.

What a kernel compiles to follows from its source and that of all that it calls, the types, the
constants, the target, the options and Triton's version. ``kernel_lines.json`` records what is
printed by a hash of these. So a kernel that has not changed is not compiled; one whose text has
changed is, be it a comment. ``python tests/engines/compile_kernels.py --record`` compiles and
records all.
"""

import hashlib
import inspect
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gq_triton.kernels import sums
from gq_triton.kernels.launch import THREADS
from gq_triton.living import living

RECORD = Path(__file__).with_name("kernel_lines.json")
# A kernel's name, the name of the case, the kernel, the types of its arguments, and its constants.
Case = tuple[str, str, triton.JITFunction, dict[str, str], dict[str, Any]]
# By architecture, target and options.
Wanted = dict[str, tuple[GPUTarget, dict[str, int]]]


def scalars(kernel: triton.JITFunction) -> dict[str, str]:
    """Return the types of the kernel's floating scalars, which its annotations fix."""
    return {p.name: p.annotation_type for p in kernel.params if p.annotation_type}


def source_of(kernel: triton.JITFunction, types: dict, constants: dict) -> ASTSource:
    """Return a kernel for arguments; those that are neither typed nor named are None.

    A type ends in ``:16`` where a launch finds the argument divisible by 16, as in triton's tools.
    """
    unused = [name for name in kernel.arg_names if name not in types]
    hints = {name: text.partition(":") for name, text in types.items()}
    signature = {name: hints.get(name, ("constexpr",))[0] for name in kernel.arg_names}
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (at,): divisible for at, name in enumerate(signature) if types.get(name, "").endswith(":16")
    }
    return ASTSource(kernel, signature, {name: constants.get(name) for name in unused}, attributes)


def options_of(constants: dict, target: GPUTarget) -> dict[str, int]:
    """Return the options with which a launch compiles a kernel."""
    warps = 4 if constants.get("CHUNK") is None else THREADS // target.warp_size
    warps = sums.NUM_WARPS if "PART" in constants else warps
    options = {"num_warps": constants.get("num_warps", warps)}
    return options | ({"num_stages": constants["num_stages"]} if "num_stages" in constants else {})


def compile_for_all(source: ASTSource, wanted: Wanted, folder: str):
    """Yield each architecture, and the kernel compiled for it.

    The intermediate language that Triton's front end makes is the same for all of them. It is made
    for the first, which saves a sixth of the time.
    """
    path = Path(folder, f"{source.name}.ttir")
    for arch, (target, options) in wanted.items():
        first = arch == next(iter(wanted))
        compiled = triton.compile(source if first else str(path), target=target, options=options)
        if first:
            path.write_text(compiled.asm["ttir"])
        yield arch, compiled


def dumped(cubin: bytes, what: str) -> str:
    """Return what NVIDIA's cuobjdump says of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers, stack and shared memory of a cubin, and how many loops use the stack.

    Memory is in bytes.
    """
    text = dumped(cubin, "--dump-resource-usage")
    found = {n: int(re.findall(rf"{n}:(\d+)", text)[-1]) for n in ("REG", "STACK", "SHARED")}
    return found | {"STACK_LOOPS": stack_loops(cubin) if found["STACK"] else 0}


def stack_loops(cubin: bytes) -> int:
    """Return how many loops of a cubin access its stack."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", dumped(cubin, "-sass"))
    code = [(int(address, 16), instruction) for address, instruction in lines]
    targets = [(at, re.search(r"\bBRA\b.* 0x([0-9a-f]+)", instruction)) for at, instruction in code]
    loops = [(int(to[1], 16), at) for at, to in targets if to and int(to[1], 16) < at]
    uses = [at for at, instruction in code if re.match(r".*\b(LDL|STL)", instruction)]
    return sum(any(first <= at <= last for at in uses) for first, last in loops)


def line_of(compiled, block: int | None) -> dict[str, object]:
    """Return what is printed of a compiled kernel; ``block`` elements make up a block of it."""
    lines = re.findall(r"tt\.(?:load|store) .*", compiled.asm["ttgir"])
    layouts = re.findall(rf"tensor<{block}x!tt\.ptr<\w+>, (#\w+)>", "".join(lines))
    line: dict[str, object] = {"layouts": len(set(layouts))}
    if "cubin" in compiled.asm:
        line |= resources(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        line["accesses"] = Counter(re.findall(r"(?:ld|st)\.global[\w.:]*", ptx))
        line["products"] = Counter(re.findall(r"wgmma\.mma_async|tcgen05\.mma|\bmma\.sync", ptx))
        # Bytes of each copy from global to shared memory.
        line["copies"] = Counter(re.findall(r"cp\.async\.c[ag]\.[^;]*\], (0x\w+), ", ptx))
    return line


class Record:
    """The recorded lines.

    Attributes:
        lines: by key; none if another version of Triton wrote them, or this file reads other
            figures from a kernel.
    """

    def __init__(self) -> None:
        figures = "".join(map(inspect.getsource, (line_of, resources, stack_loops, dumped)))
        digest = hashlib.sha256(figures.encode()).hexdigest()[:32]
        self._of = {"triton": triton.__version__, "figures": digest}
        recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        same = all(recorded.get(name) == value for name, value in self._of.items())
        self.lines: dict[str, dict] = recorded["lines"] if same else {}

    def write(self, lines: dict[str, dict]) -> None:
        """Write the record anew, a kernel per line."""
        body = ",\n".join(f"{json.dumps(key)}: {json.dumps(line)}" for key, line in lines.items())
        RECORD.write_text(f'{json.dumps(self._of)[:-1]}, "lines": {{\n{body}\n}}}}\n')


def forget_lines() -> None:
    """Have Triton hash its functions without the lines of the files at which they begin.

    They are part of the hash, since a compiled kernel tells a debugger where it is. Call this
    before anything is hashed.
    """
    for function in living(triton.JITFunction):
        function.starting_line_number = 0


def keys_of(source: ASTSource, wanted: Wanted) -> dict[str, str]:
    """Return by architecture what a kernel's line is recorded by."""
    inputs = {arch: repr((source.hash(), *one, triton.__version__)) for arch, one in wanted.items()}
    return {arch: hashlib.sha256(text.encode()).hexdigest()[:32] for arch, text in inputs.items()}
