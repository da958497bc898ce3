"""The layout of a model that ``fully_shard`` has divided: which rank holds what of a parameter.

Shapes: P elements of a parameter, W ranks that divide it, S elements of the largest shard, R rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from gq_triton.names import parameter_names

__all__ = ["Cut", "Layout", "Place", "Unit", "layout_of", "place_of", "sharded_parameters"]


@dataclass(frozen=True)
class Cut:
    """The cut of one parameter into W shards along one dimension.

    The shards are those of ``torch.chunk``: of equal size, the last ones smaller or empty. A shard
    is padded to the size of the largest one when it is sent.

    Attributes:
        shape: shape of the parameter.
        dim: the dimension that is cut. Other dimensions than 0 are cut evenly.
        world: W.
    """

    shape: torch.Size
    dim: int
    world: int

    @property
    def size(self) -> int:
        """S, the number of elements of the largest shard."""
        before, rows, behind = self._blocks
        return before * rows * behind

    @property
    def _blocks(self) -> tuple[int, int, int]:
        """Elements before the cut dimension, of it in the largest shard, and behind it."""
        rows = -(-self.shape[self.dim] // self.world)
        return self.shape[: self.dim].numel(), rows, self.shape[self.dim + 1 :].numel()

    def scatter(self, whole: Tensor, parts: Tensor) -> None:
        """Write a whole tensor ``(P,)`` into its shards ``(W, S)``, the padding as zeros."""
        if self.dim:
            before, rows, behind = self._blocks
            pieces = whole.view(before, self.world, rows, behind).movedim(1, 0)
            parts.unflatten(1, (before, rows, behind)).copy_(pieces)
            return
        full, rest = divmod(whole.numel(), max(self.size, 1))
        parts[:full].copy_(whole[: full * self.size].view(full, self.size))
        if full < self.world:
            parts[full:].zero_()
            parts[full, :rest].copy_(whole[full * self.size :])

    def gather(self, parts: Tensor) -> Tensor:
        """Return whole tensors ``(R, P)`` from their shards ``(W, R, S)``."""
        if self.dim:
            before, rows, behind = self._blocks
            pieces = parts.unflatten(2, (before, rows, behind)).permute(1, 2, 0, 3, 4)
            return pieces.reshape(parts.shape[1], -1)
        whole = parts.movedim(0, 1).reshape(parts.shape[1], -1)
        return whole[:, : self.shape.numel()]


class Place:
    """The processes among which a model is divided, and those that hold the same shards.

    Args:
        mesh: ``(shard,)`` of FSDP or ``(copy, shard)`` of HSDP.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        self.shard = self.groups[-1]
        self.world = mesh.size()
        self.copies = self.world // dist.get_world_size(self.shard)

    def add_up_(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place; every rank must call."""
        for group in self.groups:
            dist.all_reduce(tensor, group=group)
        return tensor

    def everywhere(self, value: object) -> list[object]:
        """Return the values of all ranks, in the order of the mesh; every rank must call."""
        values = [value]
        for group in reversed(self.groups):
            gathered: list[list[object]] = [[] for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(gathered, values, group=group)
            values = [one for part in gathered for one in part]
        return values

    @property
    def rank(self) -> int:
        """This rank's place in the order of the mesh."""
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None
        rank = 0
        for size, position in zip(self.mesh.shape, coordinate, strict=True):
            rank = rank * size + position
        return rank


@dataclass(frozen=True, eq=False)
class Unit:
    """The parameters of one FSDP module, which travel together.

    Attributes:
        cuts: by parameter name, how it is cut.
    """

    cuts: Mapping[str, Cut]

    def columns(self, names: list[str]) -> Iterator[tuple[str, Cut, slice]]:
        """Yield some of the parameters, in the unit's order, each with its columns in a row.

        A row holds one number for every element of each shard, one parameter after the other.
        """
        start = 0
        for name, cut in self.cuts.items():
            if name in names:
                yield name, cut, slice(start, start + cut.size)
                start += cut.size


@dataclass(frozen=True)
class Layout:
    """The layout of a sharded model.

    Attributes:
        place: the processes.
        units: by parameter name, the unit that it belongs to.
        members: by FSDP module, its parameters: the module that holds it, the attribute, the name.
        owners: by parameter name, the FSDP module.
    """

    place: Place
    units: Mapping[str, Unit]
    members: Mapping[nn.Module, list[tuple[nn.Module, str, str]]]
    owners: Mapping[str, nn.Module]

    def divisor(self, name: str) -> float:
        """Return the number by which ``fully_shard`` divides a sum of gradients over the ranks."""
        # The state has one group of parameters before torch 2.11, and then a list of them.
        owner: Any = self.owners[name]
        state = owner._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        factor = getattr(groups[0], "gradient_divide_factor", None)
        return float(self.place.world if factor is None else factor)


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Reshard the model, whose modules may show whole parameters, and return the shards by name."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return parameter_names(model)


def place_of(params: Mapping[str, Tensor]) -> Place:
    """Return the processes among which parameters are divided, those of the first DTensor."""
    return Place(next(p.device_mesh for p in params.values() if isinstance(p, DTensor)))


def layout_of(model: nn.Module, params: Mapping[str, Tensor]) -> Layout:
    """Return the layout of a model that ``fully_shard`` has divided throughout.

    Args:
        model: the model, resharded.
        params: its parameters by name.

    Raises:
        ValueError: a trainable parameter is divided otherwise, or not at all.
    """
    owners: dict[str, nn.Module] = {}
    members: dict[nn.Module, list[tuple[nn.Module, str, str]]] = {}
    names = {param: name for name, param in params.items()}

    def walk(module: nn.Module, owner: nn.Module | None) -> None:
        owner = module if isinstance(module, FSDPModule) else owner
        for attribute, param in module._parameters.items():
            if owner is not None and param is not None and param in names:
                owners.setdefault(names[param], owner)
                members.setdefault(owner, []).append((module, attribute, names[param]))
        for child in module.children():
            walk(child, owner)

    walk(model, None)
    trainable = {name: param for name, param in params.items() if param.requires_grad}
    meshes = {_mesh(name, param, owners): name for name, param in trainable.items()}
    if len(meshes) > 1:
        one, other = list(meshes.values())[:2]
        raise ValueError(
            f"{one} and {other} are divided on different meshes, and the samples of a step are "
            "counted on one: give all fully_shard calls one mesh, or leave n_clusters out"
        )
    if not trainable:
        raise ValueError("no parameter of the model needs a gradient")
    place = Place(next(iter(meshes)))
    world = dist.get_world_size(place.shard)
    cuts: dict[nn.Module, dict[str, Cut]] = {}
    for name, param in params.items():
        if name in owners and isinstance(param, DTensor):
            placement = param.placements[-1]
            if isinstance(placement, Shard):
                cut = Cut(param.shape, placement.dim, world)
                cuts.setdefault(owners[name], {})[name] = cut
    units = {owner: Unit(mine) for owner, mine in cuts.items()}
    return Layout(
        place,
        {name: unit for unit in units.values() for name in unit.cuts},
        members,
        owners,
    )


def _mesh(name: str, param: Tensor, owners: Mapping[str, nn.Module]) -> DeviceMesh:
    """Return the mesh on which ``fully_shard``, and nothing else, has divided a parameter.

    Raises:
        ValueError: it is divided otherwise, or not at all.
    """
    if not isinstance(param, DTensor):
        raise ValueError(
            f"{name} is not divided, and clusters need all trainable parameters divided: call "
            "fully_shard on the model itself after its layers, and build the GradQueue then"
        )
    *copies, last = param.placements
    alone = type(last) is Shard and all(isinstance(p, Replicate) for p in copies)
    if name not in owners or not alone or len(copies) > 1:
        raise ValueError(
            f"{name} is divided by parallelize_module (placements {tuple(param.placements)}), and "
            "clusters need whole layers, as fully_shard alone gives them: leave n_clusters out"
        )
    wanted, found = param.device_mesh.device_type, param.device.type
    if found not in (wanted, "meta"):
        raise ValueError(
            f"{name} lies on {found} and is used on {wanted} (CPUOffloadPolicy), and clusters need "
            "the queue where the layers are: leave the policy or n_clusters out"
        )
    return param.device_mesh
