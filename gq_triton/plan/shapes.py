"""The shapes of a model, which is built on the meta device, and how DDP and FSDP2 divide them."""

import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gq_triton.commands.refusal import Refusal
from gq_triton.extras import how_to_install

__all__ = ["Bucket", "Parameter", "Shapes", "buckets", "load", "shapes_of"]

# DDP's own: the first bucket is small, so that communication begins early.
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model: its shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        """The bytes of an element."""
        return self.dtype.itemsize

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    def shard(self, ranks: int) -> int:
        """Return the elements of the largest shard: FSDP2 divides the first dimension."""
        rows = self.shape[0] if self.shape else 1
        return -(-rows // ranks) * (self.numel // rows if rows else 0)


Bucket = list[Parameter]


@dataclass(frozen=True)
class Shapes:
    """What of a model the plan needs.

    Attributes:
        name: the model's name.
        units: the trainable parameters of each module that ``fully_shard`` divides, in the order of
            the forward pass. The first unit is the model itself, with what no block has.
        parameters: all of them, in the model's order.
    """

    name: str
    units: list[list[Parameter]]
    parameters: list[Parameter]

    @property
    def numel(self) -> int:
        """The number of elements of all parameters."""
        return sum(param.numel for param in self.parameters)

    @property
    def nbytes(self) -> int:
        """The bytes of all parameters."""
        return sum(param.numel * param.itemsize for param in self.parameters)


def shapes_of(name: str, model: nn.Module) -> Shapes:
    """Return the shapes of a model; its units are the blocks of its largest list of blocks.

    Raises:
        Refusal: the model has nothing to train.
    """
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    largest = max(lists, key=lambda blocks: _count(blocks.parameters()), default=nn.ModuleList())
    seen: set[nn.Parameter] = set()
    units: list[list[Parameter]] = []
    for module in (*largest, model):
        new = [p for p in module.parameters() if p.requires_grad and p not in seen]
        seen.update(new)
        units.append([Parameter(tuple(p.shape), p.dtype) for p in new])
    *blocks, root = units
    if not seen:
        raise Refusal(f"{name} must have parameters to train, and has none")
    order = [Parameter(tuple(p.shape), p.dtype) for p in model.parameters() if p in seen]
    return Shapes(name, [root, *(block for block in blocks if block)], order)


def _count(params: Iterable[nn.Parameter]) -> int:
    return sum(param.numel() for param in params)


def buckets(params: Iterable[Parameter]) -> list[Bucket]:
    """Return DDP's buckets in the order in which they are reduced: the last layers come first."""
    found: list[Bucket] = []
    open_: dict[torch.dtype, Bucket] = {}
    limits: dict[torch.dtype, int] = {}
    for param in reversed(list(params)):
        bucket = open_.setdefault(param.dtype, [])
        bucket.append(param)
        limit = limits.setdefault(param.dtype, _FIRST_BUCKET)
        if sum(p.numel * p.itemsize for p in bucket) >= limit:
            found.append(open_.pop(param.dtype))
            limits[param.dtype] = _BUCKET
    return found + list(open_.values())


def load(what: str) -> Shapes:
    """Return the shapes of a model of the user.

    Args:
        what: ``package.module:function``, which returns the model; or what names a configuration
            of Transformers: a file, a folder, a model type, or a name on its hub.

    Raises:
        Refusal: there is no such model.
    """
    module, colon, function = what.partition(":")
    if colon:
        return shapes_of(what, _built(what, module, function))
    return shapes_of(Path(what).stem, _configured(what))


def _built(what: str, module: str, function: str) -> nn.Module:
    if not module or not function.isidentifier():
        raise Refusal(f"a model must be package.module:function, got {what!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ImportError as reason:
        raise Refusal(f"{what} cannot be imported: {reason}") from reason
    finally:
        sys.path.pop(0)
    build = getattr(found, function, None)
    if not callable(build):
        raise Refusal(f"{module} must have a function {function} that returns the model")
    try:
        with torch.device("meta"):
            model = build()
    except Exception as reason:
        raise Refusal(f"{what} cannot be built on the meta device: {reason}") from reason
    if not isinstance(model, nn.Module):
        raise Refusal(f"{what} must return a torch.nn.Module, and returned {type(model).__name__}")
    return model


def _configured(what: str) -> nn.Module:
    try:
        import transformers
    except ModuleNotFoundError as absent:
        raise Refusal(
            f"{what} is no package.module:function, and a configuration needs transformers: "
            f"{how_to_install('frameworks')}"
        ) from absent
    config = _config(transformers, what)
    named = getattr(config, "architectures", None) or [None]
    kind = getattr(transformers, named[0] or "", None)
    try:
        with torch.device("meta"):
            if kind is not None:
                return kind(config)
            known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            auto: Any = transformers.AutoModelForCausalLM if known else transformers.AutoModel
            return auto.from_config(config)
    except Exception as reason:
        raise Refusal(f"{what} cannot be built on the meta device: {reason}") from reason


def _config(transformers: Any, what: str) -> Any:
    if what in transformers.CONFIG_MAPPING and not Path(what).exists():
        return transformers.CONFIG_MAPPING[what]()
    try:
        return transformers.AutoConfig.from_pretrained(what)
    except (OSError, ValueError, KeyError) as reason:
        raise Refusal(
            f"{what} must be package.module:function, a configuration file of Transformers or its "
            "folder, a model type, or a name that its hub can be asked for; Transformers says: "
            f"{str(reason).strip().splitlines()[0]}"
        ) from reason
