# pyright: basic
"""The architectures for which kernels are compiled ahead of time, and which cases each compiles."""

import os

from kernel_lines import Wanted, options_of
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
if hasattr(HIPBackend, "path_to_rocm_lld"):
    del TARGETS["gfx942"]  # Triton 3.4 has no linker of its own, but asks ROCm for one

# sm_90 compiles every case. The others compile these, and all of them where the variable is set,
# as `make test-all` does: it takes twice as long.
EVERY_CASE = os.environ.get("GQ_TRITON_EVERY_CASE") == "1"
USUAL = {
    "float32", "plain", "all bfloat16", "bfloat16", "bfloat16, rows of one sample",
    "bfloat16, taps", "one feature",
}  # fmt: skip


def wanted_of(case: str, constants: dict) -> Wanted:
    """Return the architectures that compile a case."""
    one = constants.get("arch", None if EVERY_CASE or case in USUAL else "sm_90")
    targets = TARGETS if one is None else {one: TARGETS[one]}
    return {arch: (target, options_of(constants, target)) for arch, target in targets.items()}
