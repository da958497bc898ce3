# pyright: basic
"""Compile every kernel ahead of time and print one JSON line per kernel, case and architecture.

The script runs in a separate process without TRITON_INTERPRET: an interpreted kernel cannot be
compiled. No GPU is needed. ``test_kernel_compile.py`` checks the lines that
``python tests/engines/compile_kernels.py`` prints.
"""

import json
import os
import sys
import tempfile

import torch
import triton
import triton.language as tl
from kernel_lines import (
    Record,
    Wanted,
    compile_for_all,
    forget_lines,
    keys_of,
    line_of,
    options_of,
    source_of,
)
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget

from gq_triton.kernels import adamw, finite, lloyd, push, sgd, statistics, sums, weigh
from gq_triton.kernels.combine import CHUNK as COMBINE_CHUNK
from gq_triton.kernels.combine import _combine_kernel
from gq_triton.kernels.combine_all import _combine_all_kernel
from gq_triton.kernels.combine_rows import _combine_rows_kernel
from gq_triton.kernels.gradient_products import BLOCK as PRODUCTS_BLOCK
from gq_triton.kernels.gradient_products import NUM_WARPS as PRODUCTS_WARPS
from gq_triton.kernels.gradient_products import SIDE, _position_kernel, _whole_kernel
from gq_triton.kernels.group import NUM_WARPS as GROUP_WARPS
from gq_triton.kernels.group import TILE_B as GROUP_TILE_B
from gq_triton.kernels.group import TILE_K as GROUP_TILE_K
from gq_triton.kernels.group import _group_kernel
from gq_triton.kernels.launch import CHUNK, THREADS, TRITON_DTYPE, block_size
from gq_triton.kernels.sums_all import _sums_all_kernel
from gq_triton.kernels.tiles import Device, precision_of, strip_of, tile_of
from gq_triton.kernels.weight_grad import NARROW_WARPS
from gq_triton.kernels.weight_kernels import FREE, depthwise_kernel, weight_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
if hasattr(HIPBackend, "path_to_rocm_lld"):
    del TARGETS["gfx942"]  # Triton 3.4 has no linker of its own, but asks ROCm for one
F32, BF16, F64 = tl.float32, tl.bfloat16, tl.float64
TABLE = {
    "rows": "*i64:16", "starts": "*i64:16", "n_tensors": "i32", "ticket": "*i64:16",
    "finite_ptr": "*u8",
}  # fmt: skip
AMP = {"length_ptr": "*i64", "grad_scale_ptr": "*fp32", "found_inf_ptr": "*fp32", "lr_ptr": "*fp32"}
FULL = {
    "P_DTYPE": F32, "G_DTYPE": F32, "Q_DTYPE": F32, "B_DTYPE": F32, "M_DTYPE": F32,
    "V_DTYPE": F32, "C_DTYPE": F32, "DTYPE": F32, "DECAY": True, "NESTEROV": False,
    "MAXIMIZE": False, "FIRST": False, "L": 5, "ALIGNED": True, "CHUNK": CHUNK,
    "THREADS": THREADS,
    "BLOCK": block_size(torch.float32),
}  # fmt: skip
NARROW = dict.fromkeys(("P_DTYPE", "G_DTYPE", "Q_DTYPE", "B_DTYPE", "M_DTYPE", "V_DTYPE"), BF16)
WIDE = dict.fromkeys(NARROW, F64)
RING_CASES = {
    "float32": ({}, {}),
    "bfloat16 queue": ({"Q_DTYPE": BF16}, {}),
    "queue in bytes": ({"Q_DTYPE": tl.uint8}, {}),
    "all bfloat16": (NARROW | {"BLOCK": block_size(torch.bfloat16), "STOCHASTIC": True}, {}),
    "float64": (WIDE | {"C_DTYPE": F64, "BLOCK": block_size(torch.float64)}, {}),
    "unaligned": ({"ALIGNED": False}, {}),
    "loss scaler, effective length": ({}, AMP),
    "L = 12": ({"L": 12}, {}),
    "L = 20": ({"L": 20}, {}),
}  # fmt: skip


COMBINE = {
    "sums": "*fp32:16", "stride_sums": "i32:16", "queue": "*fp32:16", "stride_queue": "i32:16",
    "queued_ptr": "*i64", "inverse_shares": "*fp64", "mixture": "*fp64", "sigma_scales": "*fp64",
    "weighted": "*fp32:16", "raw": "*fp32:16", "partials": "*fp64", "flags": "*u8", "n": "i32:16",
    "n_clusters": "i32",
}  # fmt: skip
COMBINED = {
    "C_DTYPE": F32, "L": 5, "CHUNK": COMBINE_CHUNK, "BLOCK": block_size(torch.float32),
    "THREADS": THREADS, "REPAIR": False, "Q_DTYPE": F32,
}  # fmt: skip
F64_COMBINE = dict.fromkeys(("sums", "queue", "weighted", "raw"), "*fp64:16")
STATISTICS = {
    "queue": "*fp32:16", "stride_queue": "i32:16", "queued_ptr": "*i64", "length_ptr": "*i64",
    "center": "*fp32:16", "rate": "*fp32:16", "n": "i32:16",
}  # fmt: skip
F64_STATISTICS = dict.fromkeys(("queue", "center", "rate"), "*fp64:16")
STATISTICS_CASES = {
    "float32": ({}, {}),
    "bfloat16 queue": ({}, {"queue": "*bf16:16"}),
    "float64": ({"C_DTYPE": F64}, F64_STATISTICS),
    "L = 12": ({"L": 12}, {}),
    "L = 20": ({"L": 20}, {}),
}
COMBINE_CASES = {
    "float32": ({}, {}),
    "bfloat16 queue": ({"Q_DTYPE": BF16}, {"queue": "*bf16:16"}),
    "statistics": ({"L": 2}, {"queued_ptr": None}),
    "statistics of bfloat16": ({"L": 2, "Q_DTYPE": BF16}, {"queued_ptr": None}),
    "float64": ({"C_DTYPE": F64, "Q_DTYPE": F64, "BLOCK": block_size(torch.float64)}, F64_COMBINE),
    "unaligned": ({}, {"stride_sums": "i32", "stride_queue": "i32", "n": "i32"}),
    "loss scaler, effective length": ({}, AMP),
    "L = 12": ({"L": 12}, {}),
    "L = 20": ({"L": 20}, {}),
    "repair": ({"REPAIR": True}, {}),
}
COMBINE_ALL = {
    "rows": "*i64", "starts": "*i64", "n_tensors": "i32", "inverse_shares": "*fp64",
    "mixture": "*fp64", "sigma_scales": "*fp64", "partials": "*fp64", "flags": "*u8",
    "n_clusters": "i32",
}  # fmt: skip
COMBINED_ALL = COMBINED | {"S_DTYPE": F32, "W_DTYPE": F32, "ALIGNED": True}
COMBINE_ALL_CASES = {
    "float32": ({}, {}),
    "bfloat16 queue": ({"Q_DTYPE": BF16}, {}),
    "bfloat16 parameters": ({"Q_DTYPE": BF16, "W_DTYPE": BF16}, {}),
    "float64": (
        {"S_DTYPE": F64, "W_DTYPE": F64, "Q_DTYPE": F64, "C_DTYPE": F64,
         "BLOCK": block_size(torch.float64)}, {},
    ),
    "unaligned": ({"ALIGNED": False}, {}),
    "loss scaler, effective length": ({}, AMP),
    "L = 12": ({"L": 12}, {}),
    "L = 20": ({"L": 20}, {}),
    "repair": ({"REPAIR": True}, {}),
}  # fmt: skip
COMBINE_ROWS = {
    "grads": "*fp32:16", "order": "*i64", "keys": "*i64", "n": "i32", "queue": "*fp32:16",
    "stride_queue": "i64:16", "queued_ptr": "*i64", "inverse_shares": "*fp64", "mixture": "*fp64",
    "sigma_scales": "*fp64", "weighted": "*fp32:16", "raw": "*fp32:16", "partials": "*fp64",
    "flag": "*u8", "width": "i32:16", "n_rows": "i32", "n_clusters": "i32",
}  # fmt: skip
COMBINED_ROWS = {
    "C_DTYPE": F32, "Q_DTYPE": F32, "L": 5, "TILE": 512, "REPAIR": False, "num_warps": 8,
}  # fmt: skip
COMBINE_ROWS_CASES = {
    "float32": ({}, {}),
    "bfloat16": ({"Q_DTYPE": BF16}, {"queue": "*bf16:16", "grads": "*bf16:16"}),
    "float64": ({"C_DTYPE": F64, "Q_DTYPE": F64},
                dict.fromkeys(("grads", "queue", "weighted", "raw"), "*fp64:16")),
    "narrow": ({"TILE": 32, "num_warps": 1}, {"width": "i32"}),
    "loss scaler, effective length": ({}, AMP),
    "L = 12": ({"L": 12}, {}),
    "L = 20": ({"L": 20}, {}),
    "repair": ({"REPAIR": True}, {}),
}  # fmt: skip
SUMS = {
    "dy": "*fp32:16", "x": "*fp32:16", "mean": "*fp32", "rstd": "*fp32", "order": "*i64",
    "offsets": "*i64", "shifts": "*fp32:16", "scales": "*fp32:16", "sum_shifts": "*fp32:16",
    "sum_scales": "*fp32:16", "tickets": "*i32:16", "positions": "i32:16", "n": "i32:16",
    "n_clusters": "i32",
}  # fmt: skip
IMAGES = {"per_group": "i32", "stride_stat": "i32"}
PARTS = {"C_DTYPE": F32, "K": 16, "PART": sums.ROWS}
ROW_TILES = PARTS | {"TILE_R": sums.TILE // 128, "TILE_C": 128}
IMAGE_TILES = PARTS | {"TILE_C": sums.TILE // 128, "TILE_S": 128, "PART": 1, "TILE_M": 16}
BF16_ROWS = {"dy": "*bf16:16", "x": "*bf16:16"}
F64_ROWS = dict.fromkeys(("dy", "x", "shifts", "scales", "sum_shifts", "sum_scales"), "*fp64:16")
ODD = {"n": "i32", "positions": "i32"}
NO_NORM = dict.fromkeys(("x", "mean", "rstd", "scales", "sum_scales"))
SUMS_CASES = {
    "float32": ({}, {}),
    "bfloat16": ({}, BF16_ROWS),
    "float64": ({"C_DTYPE": F64}, F64_ROWS | {"mean": "*fp64", "rstd": "*fp64"}),
    "shifts only": ({}, NO_NORM),
    "shifts only, bfloat16": ({}, BF16_ROWS | NO_NORM),
    "unaligned": ({}, ODD),
    "65 clusters": ({"K": 128}, {}),
}
NARROW_ROWS = {"one column": {"TILE_C": 1, "TILE_R": sums.TILE, "PART": sums.TILE}}
SUMS_ALL = {
    "rows": "*i64:16", "starts": "*i64:16", "n_layers": "i32", "order": "*i64:16",
    "offsets": "*i64:16", "parts": "*fp32:16", "tickets": "*i32:16", "n_clusters": "i32",
}  # fmt: skip
SUMMED_ALL = PARTS | {
    "G_DTYPE": F32, "X_DTYPE": F32, "S_DTYPE": F32, "ALIGNED": True, "IMAGES": False,
    "TILE_R": sums.TILE // 128, "TILE_C": 128, "N": 128,
}  # fmt: skip
ALL_IMAGES = {"IMAGES": True, "TILE_R": 128, "TILE_C": sums.TILE // 128, "PART": 8 * sums.ROWS}
SUMS_ALL_CASES = {
    "float32": ({}, {}),
    "bfloat16": ({"G_DTYPE": BF16, "X_DTYPE": BF16}, {}),
    "float64": (dict.fromkeys(("G_DTYPE", "X_DTYPE", "S_DTYPE", "C_DTYPE"), F64),
                {"parts": "*fp64:16"}),
    "unaligned": ({"ALIGNED": False}, {}),
    "65 clusters": ({"K": 128}, {}),
}  # fmt: skip
NARROW_IMAGES = {
    "one position": {"TILE_C": 128, "TILE_S": 1, "PART": sums.ROWS},
    "49 positions": {"TILE_C": sums.TILE // 64, "TILE_S": 64, "PART": 2},
}

GROUP = {
    "labels": "*i64", "order": "*i64", "offsets": "*i64", "table": "*fp64", "batch": "i32",
    "clusters": "i32", "width": "i32",
}  # fmt: skip
GROUP_TILES = {
    "TILE_B": GROUP_TILE_B, "TILE_K": GROUP_TILE_K, "STANDARD_ERROR": True,
    "num_warps": GROUP_WARPS,
}  # fmt: skip

PRODUCTS = {
    "a": "*fp32:16", "d": "*fp32:16", "c": "*fp32:16", "e": "*fp32:16", "dots": "*fp64",
    "norms": "*fp64:16", "B": "i32", "G": "i32", "T": "i32", "width": "i32:16", "height": "i32:16",
    "K": "i32", "R": "i32", "n_tiles": "i32", "dots_sample": "i32", "a_sample": "i32:16",
    "a_group": "i32:16", "a_place": "i32:16", "d_sample": "i32:16", "d_group": "i32:16",
    "d_place": "i32:16",
}  # fmt: skip
PRODUCT_TILES = {
    "a_step": 1, "d_step": 1, "BLOCK": PRODUCTS_BLOCK, "num_warps": PRODUCTS_WARPS,
}  # fmt: skip
# Positions innermost, as in the factors of a convolution.
INNERMOST = {"a_step": "i32", "d_step": "i32"}
PRODUCT_CASES = (
    ("gradient_position", "MLP", _position_kernel, {}, {"S": 32, "P": 1, "KT": 16, "RP": 1}),
    ("gradient_position", "images of bfloat16, three terms", _position_kernel,
     {"a": "*bf16:16", "d": "*bf16:16"} | INNERMOST,
     {"S": 1, "P": 32, "KT": 8, "RP": 4, "a_place": 1, "d_place": 1}),
    ("gradient_whole", "images", _whole_kernel, {"with_norms": "i32"} | INNERMOST,
     {"SIDE": SIDE, "KT": 64, "RP": 1, "a_place": 1, "d_place": 1}),
)  # fmt: skip

# The devices of the architectures, from which the tiles of products follow.
DEVICES = {
    "sm_80": Device(108, 166912), "sm_90": Device(132, 232448), "sm_100": Device(148, 232448),
    "gfx942": Device(304, 65536, amd=True),
}  # fmt: skip
WEIGHT = dict.fromkeys(FREE, "i32") | dict.fromkeys(
    ("dy_sample", "x_sample", "outputs", "inputs", "stride_k", "stride_o"), "i32:16"
)
WHOLE, TAPS, MIXED, FIRST, SPLITS = (
    {name: True} for name in ("WHOLE", "TAPS", "MIXED", "FIRST", "SPLITS")
)
# Type and precision of the factors, height and width of the product, constants.
WEIGHT_CASES = {
    "bfloat16, rows of one sample": (torch.bfloat16, False, 4096, WHOLE),
    "bfloat16": (torch.bfloat16, False, 4096, {}),
    "bfloat16, splits": (torch.bfloat16, False, 64, TAPS | MIXED | SPLITS),
    "float32, splits": (torch.float32, False, 64, SPLITS | FIRST),
    "bfloat16, taps": (torch.bfloat16, False, 4096, TAPS | WHOLE),
    "bfloat16, mixed taps": (torch.bfloat16, False, 4096, TAPS | MIXED),
    "bfloat16, smallest": (torch.bfloat16, False, 3, TAPS | MIXED),
    "tf32, mixed taps": (torch.float32, True, 4096, TAPS | MIXED),
    "float32, taps": (torch.float32, False, 4096, TAPS),
    "tf32, channels first": (torch.float32, True, 4096, TAPS | WHOLE | FIRST),
    "float32, channels first": (torch.float32, False, 4096, TAPS | FIRST),
    "tf32, mixed taps, channels first": (torch.float32, True, 4096, TAPS | MIXED | FIRST),
    "float64, channels first": (torch.float64, False, 4096, TAPS | FIRST),
    "float64, mixed taps": (torch.float64, False, 4096, TAPS | MIXED),
}
LLOYD = {
    "x": "*fp32:16", "published": "*fp32:16", "flag": "*u8", "labels": "*i64:16",
    "sizes_ptr": "*i64:16", "inertia_ptr": "*fp32", "n_iter": "*i64", "numbers": "*fp32:16",
    "info": "*i64:16", "B": "i32", "F": "i32:16", "K": "i32", "max_iter": "i32", "rows": "i32",
    "n_parts": "i32",
}  # fmt: skip
LLOYD_TILES = {
    "TILE_B": lloyd.TILE // 128, "TILE_F": 128, "KP": 8, "ZERO": False,
    "num_warps": lloyd.NUM_WARPS,
}  # fmt: skip
# Few: the first two take longest of all kernels to compile.
LLOYD_CASES = (
    ("lloyd", "bfloat16", {}, {"x": "*bf16:16"}),
    ("lloyd", "128 clusters", {"KP": 128}, {}),
    ("iterate", "one feature", {"TILE_B": lloyd.TILE // 16, "TILE_F": 16, "F": 1}, {"F": None}),
    ("unit", "float32", {}, {}),
    ("mean", "float32", {}, {}),
    ("label", "float32", {}, {}),
)


# sm_90 compiles every case. The others compile these, and all of them where the variable is set,
# as `make test-all` does: it takes twice as long.
EVERY_CASE = os.environ.get("GQ_TRITON_EVERY_CASE") == "1"
USUAL = {
    "float32", "plain", "all bfloat16", "bfloat16", "bfloat16, rows of one sample",
    "bfloat16, taps", "one feature",
}  # fmt: skip


def scalars(kernel: triton.JITFunction) -> dict[str, str]:
    """Return the types of the kernel's floating scalars, which its annotations fix."""
    return {p.name: p.annotation_type for p in kernel.params if p.annotation_type}


def cases():
    """Yield (kernel name, case name, kernel, runtime types, constants)."""
    for name, kernel, width in (
        ("weigh", weigh._weigh_kernel, 6),
        ("push", push._push_kernel, 6),
        ("gqsgd", sgd._gqsgd_kernel, 8),
        ("gqadamw", adamw._gqadamw_kernel, 10),
    ):
        more = {"partials": "*fp32"} if name == "weigh" else {"place": "i32"}
        types = TABLE | {k: v for k, v in more.items() if k in kernel.arg_names} | scalars(kernel)
        for case, (constants, extra) in RING_CASES.items():
            used = {key: value for key, value in extra.items() if key in kernel.arg_names}
            yield name, case, kernel, types | used, FULL | constants | {"W": width}
    kernel = _combine_kernel
    for case, (constants, extra) in COMBINE_CASES.items():
        used = {key: value for key, value in extra.items() if key in kernel.arg_names}
        merged = (COMBINE | scalars(kernel) | used).items()
        types = {key: text for key, text in merged if text is not None}
        yield "combine", case, kernel, types, COMBINED | constants
    kernel = _combine_all_kernel
    for case, (constants, extra) in COMBINE_ALL_CASES.items():
        used = {key: value for key, value in extra.items() if key in kernel.arg_names}
        types = COMBINE_ALL | scalars(kernel) | used
        yield "combine_all", case, kernel, types, COMBINED_ALL | constants
    kernel = _combine_rows_kernel
    for case, (constants, changed) in COMBINE_ROWS_CASES.items():
        changed = {key: text for key, text in changed.items() if key in kernel.arg_names}
        types = COMBINE_ROWS | scalars(kernel) | changed
        yield "combine_rows", case, kernel, types, COMBINED_ROWS | constants
    settled = {"L": 5, "BLOCK": statistics.BLOCK, "C_DTYPE": F32}
    for case, (constants, changed) in STATISTICS_CASES.items():
        types = STATISTICS | changed
        yield "statistics", case, statistics._statistics_kernel, types, settled | constants
    yield from sums_cases()
    yield from weight_cases()
    for case, more in {"plain": {}, "weights": {"weights": "*fp32", "whole_ptr": "*fp64"}}.items():
        types = GROUP | scalars(_group_kernel) | more
        yield "group", case, _group_kernel, types, GROUP_TILES
    for name, case, constants, changed in LLOYD_CASES:
        kernel = getattr(lloyd, f"_{name}_kernel")
        merged = (LLOYD | scalars(kernel) | changed).items()
        types = {key: text for key, text in merged if text and key in kernel.arg_names}
        yield name, case, kernel, types, LLOYD_TILES | constants
    for name, case, kernel, changed, constants in PRODUCT_CASES:
        constants = PRODUCT_TILES | constants
        types = {key: text for key, text in (PRODUCTS | changed).items() if key in kernel.arg_names}
        fixed = {"a_place", "d_place"} & constants.keys()
        types = {key: text for key, text in types.items() if key not in fixed}
        constants = {key: value for key, value in constants.items() if key not in types}
        yield name, case, kernel, types, constants
    flags = {key: TABLE[key] for key in ("rows", "starts", "n_tensors")} | {"flags": "*u8"}
    wide = {"BLOCK": block_size(torch.float32, most=8), "W": 3}
    yield "all_finite", "float32", finite._all_finite_kernel, flags, FULL | wide
    narrow = {"DTYPE": BF16, "BLOCK": block_size(torch.bfloat16, most=8), "W": 3}
    yield "all_finite", "all bfloat16", finite._all_finite_kernel, flags, FULL | narrow
    total = {key: TABLE[key] for key in ("rows", "starts", "n_tensors", "finite_ptr")}
    total |= {"n_chunks": "i32", "partials": "*fp32", "sums": "*fp32"}
    yield "total", "float32", weigh._total_kernel, total, {"W": 6, "BLOCK": 128}


def sums_cases():
    """Yield the cases of the sums by cluster."""
    for name, kernel, types, tiles, narrow in (
        ("position_sums", sums._position_kernel, SUMS, ROW_TILES, NARROW_ROWS),
        ("channel_sums", sums._channel_kernel, SUMS | IMAGES, IMAGE_TILES, NARROW_IMAGES),
    ):
        more = {case: (constants, ODD) for case, constants in narrow.items()}
        for case, (constants, changed) in (SUMS_CASES | more).items():
            merged = {key: text for key, text in (types | changed).items() if text is not None}
            yield name, case, kernel, merged, tiles | constants
    for name, layout in (("sums_all", {}), ("sums_all, images", ALL_IMAGES)):
        for case, (constants, changed) in SUMS_ALL_CASES.items():
            constants = SUMMED_ALL | layout | constants
            yield name, case, _sums_all_kernel, SUMS_ALL | changed, constants


def weight_cases():
    """Yield the cases of the gradients of weights, whose tiles depend on the architecture."""
    for arch in TARGETS:
        device = DEVICES[arch]
        shared = {"rows": 2**20, "clusters": 8, "device": device}
        for case, (dtype, tf32, size, constants) in WEIGHT_CASES.items():
            if case not in USUAL and arch != "sm_90" and not EVERY_CASE:
                continue
            precision = precision_of(dtype, tf32, device)
            tile = tile_of(dtype, precision, size, size, 8, **shared)
            if "FIRST" in constants:
                tile = tile._replace(warps=NARROW_WARPS)
            more = {"BI": tile.inputs, "F_DTYPE": TRITON_DTYPE[dtype], "PRECISION": precision}
            more |= {"WHOLE": False, "TAPS": False, "MIXED": False, "FIRST": False} | constants
            yield "weight_grad", case, weight_kernel, *_weight_case(arch, dtype, tile, more)
        for dtype in (torch.float32, torch.float64):
            case, tile = str(dtype).removeprefix("torch."), strip_of(512, 72, **shared)
            more = {"SPLITS": dtype == torch.float32}
            yield "depthwise", case, depthwise_kernel, *_weight_case(arch, dtype, tile, more)


def _weight_case(arch, dtype, tile, constants):
    """Return types and constants of a case."""
    wide = torch.promote_types(dtype, torch.float32)
    names = {torch.bfloat16: "*bf16:16", torch.float32: "*fp32:16", torch.float64: "*fp64:16"}
    types = {"dy": names[dtype], "x": names[dtype], "order": "*i64", "offsets": "*i64"}
    if constants.pop("SPLITS", False):
        types |= {"out": names[wide], "tickets": "*i32:16"}
    return types | {"sums": names[wide]} | WEIGHT, constants | {
        "stride_i": 1, "BO": tile.outputs, "BR": tile.rows, "KP": 8, "C_DTYPE": TRITON_DTYPE[wide],
        "num_warps": tile.warps, "num_stages": tile.stages, "arch": arch,
    }  # fmt: skip


def wanted_of(case: str, constants: dict) -> Wanted:
    """Return the architectures that compile a case."""
    one = constants.get("arch", None if EVERY_CASE or case in USUAL else "sm_90")
    targets = TARGETS if one is None else {one: TARGETS[one]}
    return {arch: (target, options_of(constants, target)) for arch, target in targets.items()}


def main() -> None:
    """Print one JSON line per kernel, case and architecture.

    With ``--record`` every kernel is compiled, and recorded. `make test-all` compiles all, too. Any
    other run reads from the record what has not changed.
    """
    forget_lines()
    recording, record, written = "--record" in sys.argv, Record(), {}
    known = {} if recording or EVERY_CASE else record.lines
    with tempfile.TemporaryDirectory() as folder:
        for name, case, kernel, types, constants in cases():
            source, wanted = source_of(kernel, types, constants), wanted_of(case, constants)
            keys = keys_of(source, wanted) if recording or record.lines else {}
            lines = {arch: known[key] for arch, key in keys.items() if key in known}
            absent = {arch: one for arch, one in wanted.items() if arch not in lines}
            if absent:
                compiled = compile_for_all(source, absent, folder)
                lines |= {arch: line_of(one, constants.get("BLOCK")) for arch, one in compiled}
            for arch, line in lines.items():
                about = {"kernel": name, "case": case, "arch": arch, "key": keys.get(arch)}
                sys.stdout.write(json.dumps(about | line) + "\n")
            written |= {keys[arch]: line for arch, line in lines.items()} if keys else {}
    if recording:
        record.write(written)


if __name__ == "__main__":
    main()
