"""Saved states of which hypothesis alters a leaf or two, with what no list holds."""

import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from altered import REMOVED, leaves, with_value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

EVERY_CASE = os.environ.get("GQ_TRITON_EVERY_CASE") == "1"
DTYPES = [
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu, torch.float4_e2m1fn_x2,
]  # fmt: skip
SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)
LAYOUTS = (
    "dense", "expanded", "transposed", "holes", "negated", "sparse_coo", "sparse_csr", "quantised",
    "nested", "meta", "parameter",
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.integers(),
    # Beyond what float64 holds, and beyond what Python prints.
    st.integers(53, 20_000).map(lambda bits: 1 << bits),
    st.floats(),
    st.complex_numbers(),
)
PLAIN = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=60), st.binary(max_size=60),
    st.sampled_from(DTYPES),
)  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn, like: Tensor | None = None) -> Tensor:
    """Draw a tensor; often of the shape, the type or the layout of another."""
    same = like is not None and like.layout == torch.strided
    shape = tuple(like.shape) if like is not None and draw(st.booleans()) else draw(SHAPES)
    dtype = (
        like.dtype if like is not None and draw(st.booleans()) else draw(st.sampled_from(DTYPES))
    )
    layout = "dense" if same and draw(st.booleans()) else draw(st.sampled_from(LAYOUTS))
    size, count = dtype.itemsize, math.prod(shape)
    unit = draw(st.binary(min_size=size, max_size=size))
    content = bytearray(unit * max(count, 1))
    if count and draw(st.booleans()):
        content[:size] = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        content = bytearray(byte & 1 for byte in content)
    values = torch.frombuffer(content, dtype=torch.uint8).view(dtype)
    return laid_out(values[:count].reshape(shape), layout)


def laid_out(value: Tensor, layout: str) -> Tensor:
    """Return a tensor in a layout; as it is, where its type or shape cannot have that."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # prototypes, and what is deprecated
            match layout:
                case "expanded":
                    return value[:1].expand(3, *value.shape[1:]) if value.dim() else value.expand(2)
                case "transposed":
                    return value.transpose(0, -1).contiguous().transpose(0, -1)
                case "holes":
                    return torch.stack([value, value], -1)[..., 0]
                case "negated":
                    return torch.complex(value, value).conj().imag
                case "sparse_coo":
                    return value.to_sparse()
                case "sparse_csr":
                    return value.to_sparse_csr()
                case "quantised":
                    return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)
                case "nested":
                    return torch.nested.nested_tensor([value, value])
                case "meta":
                    return value.to("meta")
                case "parameter":
                    return torch.nn.Parameter(value)
    except (RuntimeError, IndexError, NotImplementedError):
        pass
    return value


def values(old: Any) -> st.SearchStrategy[Any]:
    """Return what draws a value to stand in the place of another."""
    nested = st.recursive(
        PLAIN | tensors(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(
                st.text(max_size=5) | st.integers(-1, 3) | st.none(), inner, max_size=3
            )
        ),
        max_leaves=6,
    )
    drawn = st.just(REMOVED) | PLAIN | tensors() | nested
    if isinstance(old, Tensor):
        return drawn | tensors(old) | tensors(old)
    if isinstance(old, bool):
        return drawn | st.booleans()
    if isinstance(old, int):
        return drawn | st.integers(old - 3, old + 3) | st.integers(1, 2**62)
    if isinstance(old, float):
        return drawn | st.floats(0) | st.floats(0, 1)
    if isinstance(old, (list, tuple)):
        # Members of the old list, in any order and number.
        return drawn | (
            st.lists(st.sampled_from(list(old)), max_size=len(old) + 1) if old else drawn
        )
    return drawn


class Case:
    """A drawn state; hypothesis shows what was altered, and not the whole of it."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.alterations: list[str] = []

    def __repr__(self) -> str:
        return "; ".join(self.alterations)


def altered(state: Any, where: Callable[[Any], bool]) -> st.SearchStrategy[Case]:
    """Return what draws a state with one leaf altered, or two."""

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        drawn = Case(state)
        for _ in range(draw(st.integers(1, 2))):
            paths = [entry for entry in leaves(drawn.state) if where(entry[0])]
            if not paths:
                break
            # By depth first: else few of the outer containers would be drawn.
            depth = draw(st.sampled_from(sorted({len(path) for path, _ in paths})))
            at = draw(
                st.sampled_from([n for n, (path, _) in enumerate(paths) if len(path) == depth])
            )
            path, old = paths[at]
            new = draw(values(old))
            drawn.alterations.append(f"{path}: {described(new)}")
            drawn.state = with_value(drawn.state, path, new)
        return drawn

    return case()


def described(value: Any) -> str:
    """Return a drawn value in a few words."""
    if value is REMOVED:
        return "removed"
    if isinstance(value, Tensor):
        try:
            content = str(value.tolist())
        except (RuntimeError, NotImplementedError):
            content = f"of layout {value.layout}"
        return f"a tensor of type {value.dtype}: {content[:150]}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {[described(member) for member in value]}"
    if isinstance(value, dict):
        return f"dict of { {key: described(member) for key, member in value.items()} }"
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.150}"


def fuzz_door(
    state: Any,
    load: Callable[[Any], None],
    fingerprint: Callable[[], Any],
    go_on: Callable[[], object],
    where: Callable[[Any], bool] = lambda path: True,
    examples: int = 300,
) -> None:
    """Load states with a leaf or two altered; what is drawn is the same in every run.

    The gate takes at most 100 examples.

    Either a state is refused in one sentence, and nothing has changed then; or it is loaded, and
    training goes on.
    """
    outcomes = {"taken": 0, "refused": 0}
    load(state)
    before = fingerprint()

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=examples if EVERY_CASE else min(examples, 100),
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(altered(state, where))
    def check(case: Case) -> None:
        what = repr(case)
        load(state)
        assert fingerprint() == before, f"a former state left something: {what}"
        try:
            load(case.state)
        except (ValueError, TypeError) as error:
            message = str(error)
            assert "\n" not in message, what
            assert "Exceeds the limit" not in message, what
            assert len(message) < 700, what
            assert any(word in message for word in ("saved", "loaded", "checkpoint")), what
            assert fingerprint() == before, what
            outcomes["refused"] += 1
        else:
            go_on()
            outcomes["taken"] += 1

    check()
    load(state)
    assert all(outcomes.values()), outcomes
