# pyright: basic
"""The sizes of the tiles of matrix products, by a rule: nothing is timed when a kernel first runs.

Timing would run a kernel several times, and its result, other tiles, would change from run to run.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch

from gq_triton.kernels.weight_kernels import MULTIPLIES_FLOAT64

__all__ = [
    "Device",
    "Tile",
    "cdiv",
    "device_of",
    "power_of_2",
    "precision_of",
    "strip_of",
    "tile_of",
]

# Outputs, inputs and rows of the largest tile: as large as registers allow without a stack. Devices
# with much shared memory (sm_90, sm_100) multiply from there, and keep no factors in registers.
MUCH_SHARED = 200 * 1024
LARGEST = {
    "half": (128, 256, 64),
    "half, small": (128, 128, 64),
    "tf32": (128, 128, 32),
    "tf32, small": (128, 64, 32),
    "float32": (128, 64, 16),
    # All products of a block of rows are in registers where Triton does not multiply float64.
    "float64": (64, 64, 16) if MULTIPLIES_FLOAT64 else (16, 16, 16),
}
# The smallest area to which a tile is divided so that more programs run, and most copies under way.
SMALLEST, MOST_STAGES = 64 * 64, 4
# Least width and height of a product on tensor cores.
LEAST = 16
# Bytes of shared memory that are not for tiles: barriers.
RESERVED = 1024
# Rows below which a share of a cluster is not worth a program.
SHARE = 512
# Elements and most channels of a tile in which each channel is added up by itself.
STRIP, MOST_CHANNELS = 2048, 64


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


class Device(NamedTuple):
    """What a rule has to know of a device.

    Attributes:
        programs: how many programs run at once if each takes a multiprocessor.
        shared: bytes of shared memory that one program can take.
        amd: whether the device is one of AMD's.
    """

    programs: int
    shared: int
    amd: bool = False


class Tile(NamedTuple):
    """The tile of one launch.

    Attributes:
        outputs: height, BO.
        inputs: width, BI.
        rows: rows that are multiplied at a time, BR.
        warps: warps of a program.
        stages: blocks of rows under way to shared memory.
        splits: programs that share the rows of a cluster.
    """

    outputs: int
    inputs: int
    rows: int
    warps: int
    stages: int
    splits: int


@cache
def device_of(device: torch.device) -> Device:
    """Return what a rule has to know of a device.

    The interpreter, on the CPU, counts as a small one; ``meta``, which runs nothing, as an H100.
    """
    if device.type != "cuda":
        return Device(4, 96 * 1024) if device.type == "cpu" else Device(132, 227 * 1024)
    known = torch.cuda.get_device_properties(device)
    shared = getattr(known, "shared_memory_per_block_optin", 0) or known.shared_memory_per_block
    return Device(known.multi_processor_count, shared, torch.version.hip is not None)


def precision_of(dtype: torch.dtype, tf32: bool, device: Device) -> str:
    """Return Triton's name for the precision of a product: only float32 has a choice."""
    return "tf32" if tf32 and dtype == torch.float32 and not device.amd else "ieee"


@lru_cache(maxsize=1024)
def tile_of(
    dtype: torch.dtype, precision: str, height: int, width: int, products: int, rows: int,
    clusters: int, device: Device,
) -> Tile:  # fmt: skip
    """Return the tile for products ``(height, width)``, each a sum over ``rows / clusters`` rows.

    It is the largest that still makes two programs for each multiprocessor; below 64 x 64 the rows
    of a cluster are split instead.

    Args:
        dtype: type of the factors.
        precision: as ``precision_of`` returns it.
        height: columns of the left factor.
        width: columns of the right factor.
        products: number of such products, for all clusters.
        rows: rows of the factors.
        clusters: among how many products the rows are divided.
        device: the device.
    """
    kind = {2: "half", 4: "tf32" if precision == "tf32" else "float32", 8: "float64"}
    name = kind[dtype.itemsize]
    if f"{name}, small" in LARGEST and (device.amd or device.shared < MUCH_SHARED):
        name += ", small"
    most_outputs, most_inputs, block = LARGEST[name]
    outputs = min(most_outputs, max(LEAST, power_of_2(height)))
    inputs = min(most_inputs, max(LEAST, power_of_2(width)))

    def programs() -> int:
        return products * cdiv(height, outputs) * cdiv(width, inputs)

    while outputs * inputs > SMALLEST and programs() < 2 * device.programs:
        if inputs >= outputs:
            inputs //= 2
        else:
            outputs //= 2
    splits = splits_of(programs(), rows // clusters, device)
    large = outputs * inputs > SMALLEST or dtype.itemsize == 8
    stages = stages_of((outputs, inputs, block), dtype, device)
    return Tile(outputs, inputs, block, 8 if large else 4, stages, splits)


@lru_cache(maxsize=1024)
def strip_of(channels: int, products: int, rows: int, clusters: int, device: Device) -> Tile:
    """Return the tile for products of one column each, which are added up element by element.

    Args:
        channels: columns of both factors.
        products: number of such products, for all clusters.
        rows: rows of the factors.
        clusters: among how many products the rows are divided.
        device: the device.
    """
    outputs = min(MOST_CHANNELS, power_of_2(channels))
    programs, block = products * cdiv(channels, outputs), STRIP // outputs
    splits = splits_of(programs, rows // clusters, device)
    return Tile(outputs, 1, block, 8, 2, splits)


def splits_of(programs: int, rows: int, device: Device) -> int:
    """Return by how many programs the rows of a cluster are shared.

    To share them costs memory, and time to add up the parts. Half the multiprocessors are enough to
    do without.

    Args:
        programs: how many programs there are without sharing.
        rows: rows of a cluster of mean size.
        device: the device.
    """
    if 2 * programs >= device.programs:
        return 1
    return max(1, min(cdiv(2 * device.programs, programs), rows // SHARE))


def stages_of(tile: tuple[int, int, int], dtype: torch.dtype, device: Device) -> int:
    """Return how many blocks of rows fit into shared memory at a time, at most four."""
    outputs, inputs, block = tile
    fit = (device.shared - RESERVED) // ((outputs + inputs) * block * dtype.itemsize)
    # For AMD's devices one block of those that are counted is in registers.
    return max(1, min(MOST_STAGES, fit + device.amd))
