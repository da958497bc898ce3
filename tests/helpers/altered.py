"""Saved states with one leaf altered: removed, renamed, of another type, shape or value."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

REAL = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Stands in the place of an entry that was removed.
REMOVED = object()
PLAIN = bool, int, float, str, type(None)
Path = tuple[Any, ...]


def leaves(state: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the path and the value of every entry of a nested state, containers too."""
    if isinstance(state, Mapping):
        entries = list(state.items())
    else:
        entries = list(enumerate(state)) if isinstance(state, (list, tuple)) else []
    for key, value in entries:
        yield (*path, key), value
        yield from leaves(value, (*path, key))


def with_value(state: Any, path: Path, value: Any, rename: Any = None) -> Any:
    """Return a state that has another value, or another name, at a path; the given one stays."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(state, Mapping):
        copied = dict(state)
        old = copied.pop(key)
        new = with_value(old, rest, value, rename)
        if new is not REMOVED:
            copied[key if rest or rename is None else rename] = new
        return copied
    entries = list(state)
    new = with_value(entries[key], rest, value, rename)
    entries[key : key + 1] = [] if new is REMOVED else [new]
    return entries


JUNK: tuple[Any, ...] = (
    None, True, -3, 0, 1, 7, 10**9, 2**53, 10**400, -1.5, 0.5, float("nan"), float("inf"),
    -float("inf"), "", "junk", b"junk", [], {}, [[{}]], {"a": {"b": [None]}}, (1, 2), torch.float32,
    torch.tensor(1.0), torch.tensor(-3), torch.tensor(2**60), torch.tensor(float("nan")),
    torch.tensor([1.0, 2.0]), torch.zeros(2, 3), torch.zeros(0), torch.tensor(1j),
    torch.tensor(True), torch.empty((), device="meta"), torch.eye(2).to_sparse(),
)  # fmt: skip


def others(value: Any) -> Iterator[Any]:
    """Yield values that are put in the place of a value."""
    yield REMOVED
    yield from JUNK
    if isinstance(value, Tensor):
        yield from _tensors(value.detach())
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from (value + 1, value - 1, -value, float(value), str(value), [value])
    elif isinstance(value, (list, tuple)):
        yield from (list(value[:-1]), [*value, *value[-1:]], [*value, None], list(value) * 2)
    elif isinstance(value, Mapping):
        yield list(value)
    elif isinstance(value, bytes):
        yield from (value[:-1], value + b"0", bytes(len(value)), b"\xff" * len(value))


def _tensors(value: Tensor) -> Iterator[Tensor]:
    for dtype in (*REAL, torch.float8_e4m3fn, torch.int32, torch.int64, torch.uint8, torch.bool):
        yield value.to(dtype)
    yield value.to(torch.complex64)
    yield value[None]
    yield value[..., None]
    yield value.reshape(-1)
    yield value.reshape(-1)[:-1]
    yield torch.cat([value.reshape(-1), value.reshape(-1)])
    yield value.reshape(-1)[:1].sum()
    yield torch.zeros_like(value).expand(2, *value.shape)
    yield value.flatten()[:1].sum().expand(value.shape)
    yield torch.empty_like(value, device="meta")
    if value.dim():
        yield value.to_sparse()
        yield value.transpose(0, -1)
        # The same values in another memory order, and with holes.
        yield value.transpose(0, -1).contiguous().transpose(0, -1)
        yield torch.stack([value, value], -1)[..., 0]
    if value.is_floating_point():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # deprecated; old files may hold it
            yield torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)
        for bad in (float("nan"), float("inf"), -float("inf"), -1.0, 0.5, 1e30):
            changed = value.clone()
            changed.reshape(-1)[-1:] = bad
            yield changed
    elif value.dtype == torch.int64:
        yield value + 1
        yield from (torch.full_like(value, number) for number in (-3, -1, 0, 1, 2**53, 2**62))


def alterations(state: Any) -> Iterator[tuple[Path, Any, Any]]:
    """Yield the path of an altered entry, the value in its place, and the whole altered state."""
    for path, value in leaves(state):
        for other in others(value):
            if type(other) is type(value) and isinstance(other, PLAIN) and other == value:
                continue
            yield path, other, with_value(state, path, other)
        if not isinstance(path[-1], int):
            yield path, REMOVED, with_value(state, path, value, rename="renamed")


def is_dense(value: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = REAL) -> bool:
    """Return whether a value is a dense tensor of a shape, of one of the types, with values."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
        and tuple(value.shape) == tuple(shape)
        and value.dtype in dtypes
    )


def refusal(load: Callable[[Any], None], state: Any) -> str | None:
    """Return why a state is refused; None where it is loaded."""
    try:
        load(state)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def check_door(
    state: Any,
    load: Callable[[Any], None],
    possible: Callable[[Path, Any], bool],
    fingerprint: Callable[[], Any],
    go_on: Callable[[], object],
    where: Callable[[Path], bool] = lambda path: True,
) -> tuple[int, int]:
    """Load every alteration of a state; return how many were loaded and how many refused.

    The door must refuse an impossible alteration in one sentence and change nothing. It must load a
    possible one, and training must go on.

    Args:
        state: a saved state.
        load: loads a state.
        possible: returns whether a value is possible at a path.
        fingerprint: returns what a refusal must leave unchanged.
        go_on: trains for a step.
        where: returns whether the entry at a path is altered at all.
    """
    taken = refused = 0
    before = fingerprint()
    for path, value, altered in alterations(state):
        if not where(path):
            continue
        what = f"{path}: {value!r:.200}"
        if possible(path, value):
            load(altered)
            go_on()
            load(state)
            before = fingerprint()
            taken += 1
            continue
        message = refusal(load, altered)
        assert message is not None, f"accepted {what}"
        assert "\n" not in message, what
        assert len(message) < 700, message
        assert any(word in message for word in ("saved", "loaded", "checkpoint")), message
        assert fingerprint() == before, what
        refused += 1
    assert taken
    assert refused
    return taken, refused
