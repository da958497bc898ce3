# pyright: basic
"""The law's kernels as compiled ahead of time: types of their arguments, and constants, by case."""

from collections.abc import Iterator

import torch
import triton.language as tl
from kernel_lines import Case, scalars

from gq_triton.kernels import adamw, finite, push, sgd, statistics, weigh
from gq_triton.kernels.combine import CHUNK as COMBINE_CHUNK
from gq_triton.kernels.combine import _combine_kernel
from gq_triton.kernels.combine_all import _combine_all_kernel
from gq_triton.kernels.combine_rows import _combine_rows_kernel
from gq_triton.kernels.launch import CHUNK, THREADS, block_size

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


def law_cases() -> Iterator[Case]:
    """Yield the cases of the kernels that weight and queue gradients."""
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
    flags = {key: TABLE[key] for key in ("rows", "starts", "n_tensors")} | {"flags": "*u8"}
    wide = {"BLOCK": block_size(torch.float32, most=8), "W": 3}
    yield "all_finite", "float32", finite._all_finite_kernel, flags, FULL | wide
    narrow = {"DTYPE": BF16, "BLOCK": block_size(torch.bfloat16, most=8), "W": 3}
    yield "all_finite", "all bfloat16", finite._all_finite_kernel, flags, FULL | narrow
    total = {key: TABLE[key] for key in ("rows", "starts", "n_tensors", "finite_ptr")}
    total |= {"n_chunks": "i32", "partials": "*fp32", "sums": "*fp32"}
    yield "total", "float32", weigh._total_kernel, total, {"W": 6, "BLOCK": 128}
