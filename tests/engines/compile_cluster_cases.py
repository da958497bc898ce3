# pyright: basic
"""The clusters' kernels as compiled ahead of time: types of arguments, and constants, by case."""

from collections.abc import Iterator

import torch
import triton.language as tl
from compile_targets import EVERY_CASE, TARGETS, USUAL
from kernel_lines import Case, scalars

from gq_triton.kernels import lloyd, sums
from gq_triton.kernels.gradient_products import BLOCK as PRODUCTS_BLOCK
from gq_triton.kernels.gradient_products import NUM_WARPS as PRODUCTS_WARPS
from gq_triton.kernels.gradient_products import SIDE, _position_kernel, _whole_kernel
from gq_triton.kernels.group import NUM_WARPS as GROUP_WARPS
from gq_triton.kernels.group import TILE_B as GROUP_TILE_B
from gq_triton.kernels.group import TILE_K as GROUP_TILE_K
from gq_triton.kernels.group import _group_kernel
from gq_triton.kernels.launch import TRITON_DTYPE
from gq_triton.kernels.sums_all import _sums_all_kernel
from gq_triton.kernels.tiles import Device, precision_of, strip_of, tile_of
from gq_triton.kernels.weight_grad import NARROW_WARPS
from gq_triton.kernels.weight_kernels import FREE, depthwise_kernel, weight_kernel

F32, BF16, F64 = tl.float32, tl.bfloat16, tl.float64
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


def cluster_cases() -> Iterator[Case]:
    """Yield the cases of the kernels that group samples and sum gradients by group."""
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
