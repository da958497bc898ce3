"""The rules of saved tensors and of saved states of random number generators."""

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gq_triton.divided import dtensor
from gq_triton.saved.rules import must

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["REAL_TYPES", "GeneratorState", "Sharding", "TensorLike"]

# Floating types that the state of a parameter may have.
REAL_TYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Sharding(NamedTuple):
    """How a ``DTensor`` is divided among processes.

    Args:
        mesh: the processes.
        placements: how each dimension of the mesh divides the tensor.
        local_shape: shape of this process's part.
    """

    mesh: "DeviceMesh"
    placements: "tuple[Placement, ...]"
    local_shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorLike:
    """A dense tensor.

    Its strides are free, since its values are copied into memory of the layout that a step expects.

    Args:
        shape: its shape; None stands for a dimension of any size from 1.
        dtypes: its possible types.
        low: smallest allowed value; NaN passes unless ``nan`` is False.
        high: largest allowed value.
        nan: whether it may hold a NaN.
        finite: whether it must hold neither NaN nor infinity.
        whole: whether its values must be whole numbers.
        sharding: how a ``DTensor`` must be divided; None wants an ordinary tensor.
    """

    shape: tuple[int | None, ...]
    dtypes: Collection[torch.dtype] = REAL_TYPES
    low: float | None = None
    high: float | None = None
    nan: bool = True
    finite: bool = False
    whole: bool = False
    sharding: Sharding | None = None

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield the first problem of the tensor; its values are read last."""
        problem = self._of_metadata(value, path) or self._of_values(value, path)
        if problem is not None:
            yield problem

    def _of_metadata(self, value: Any, path: str) -> str | None:
        if not isinstance(value, Tensor):
            return must(path, "a tensor", value)
        if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta:
            kind = "on no device" if value.is_meta else str(value.layout)
            kind = "quantised" if value.is_quantized else kind
            return f"{path or 'it'} must be a dense tensor with values, got one that is {kind}"
        fits = len(value.shape) == len(self.shape) and all(
            size >= 1 if wanted is None else size == wanted
            for size, wanted in zip(value.shape, self.shape, strict=True)
        )
        if not fits:
            sizes = ["any" if size is None else str(size) for size in self.shape]
            wanted = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
            return f"{path or 'it'} must have shape {wanted}, got {tuple(value.shape)}"
        if value.dtype not in self.dtypes:
            names = " or ".join(str(dtype) for dtype in self.dtypes)
            return f"{path or 'it'} must be of type {names}, got {value.dtype}"
        return self._of_sharding(value, path)

    def _of_sharding(self, value: Tensor, path: str) -> str | None:
        wanted = self.sharding
        if wanted is None:
            divided = isinstance(value, dtensor())
            return f"{path or 'it'} must be an ordinary tensor, got a DTensor" if divided else None
        if not isinstance(value, dtensor()):
            return f"{path or 'it'} must be a DTensor as its parameter is, got an ordinary tensor"
        found = Sharding(value.device_mesh, value.placements, tuple(value.to_local().shape))
        if found != wanted:
            return (
                f"{path or 'it'} must be divided among the processes as its parameter is, by "
                f"{list(wanted.placements)} in parts of shape {wanted.local_shape}, got "
                f"{list(found.placements)} in parts of shape {found.local_shape}"
            )
        return None

    def _of_values(self, value: Tensor, path: str) -> str | None:
        values = value.detach()
        values = values.to_local() if isinstance(values, dtensor()) else values
        if not values.is_floating_point():
            values = values.to(torch.int64)  # a bound beyond a narrower type would wrap around
        else:
            if self.finite and not bool(values.isfinite().all()):
                return f"{path or 'it'} must be finite, got a NaN or an infinity"
            if not self.nan and bool(values.isnan().any()):
                return f"{path or 'it'} must not hold a NaN, got one"
            if self.whole and bool((values != values.round()).any()):
                return f"{path or 'it'} must be a whole number, got {_value_of(values)}"
        if self.low is not None and bool((values < self.low).any()):
            return f"{path or 'it'} must be at least {self.low:g}, got {_value_of(values.min())}"
        if self.high is not None and bool((values > self.high).any()):
            return f"{path or 'it'} must be at most {self.high:g}, got {_value_of(values.max())}"
        return None


def _value_of(values: Tensor) -> str:
    return f"{values.item():g}" if values.numel() == 1 else "others"


@dataclass(frozen=True)
class GeneratorState:
    """The state of a generator, as ``torch.Generator.get_state`` returns it.

    Args:
        device: device of the generator.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def problems(self, value: Any, path: str) -> Iterator[str]:
        """Yield a problem unless a generator of the device can go on from the value."""
        fits = isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1
        fits = fits and value.layout == torch.strided and not value.is_meta
        if not fits or not self._takes(value.cpu()):
            yield must(path, "the state of a random number generator", value)

    def _takes(self, state: Tensor) -> bool:
        generator = torch.Generator(self.device)
        if len(state) != len(generator.get_state()):
            return False
        try:
            generator.set_state(state.clone())
        except RuntimeError:
            return False
        return self.device.type != "cpu" or _within_its_numbers(state)


def _within_its_numbers(state: Tensor) -> bool:
    """Return whether a CPU generator in this state reads only its own 624 numbers.

    The state holds how many numbers are left and the index of the next one. Torch accepts any two
    values up to 624. With two that do not belong together a generator would read past its numbers.
    """
    left, _, following = struct.unpack_from("iiQ", bytes(state.tolist()), 8)
    return left + following == 625 or (left, following) == (1, 0)
