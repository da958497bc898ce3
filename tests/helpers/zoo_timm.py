"""Cases of the zoo from timm: its own modules, with small images and few layers."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from zoo import Case, Size, first_output, pictures


def _built(name: str, size: Size, own: Callable[[Size], dict[str, Any]]) -> nn.Module:
    timm = importlib.import_module("timm")  # only the table's program needs it
    return timm.create_model(name, num_classes=5, **own(size))


def _case(name: str, own: Callable[[Size], dict[str, Any]] = lambda s: {}) -> Case:
    return Case(f"timm {name}", "vision, timm", partial(_built, name, own=own), pictures,
                first_output, "timm")  # fmt: skip


def _plain(size: Size) -> dict[str, Any]:
    return {
        "img_size": size.image, "patch_size": size.image // 4, "embed_dim": size.width,
        "depth": size.depth, "num_heads": size.heads,
    }  # fmt: skip


def _square(size: Size) -> dict[str, Any]:
    return {"img_size": size.image}


def _windows(size: Size) -> dict[str, Any]:
    return {
        "img_size": size.image, "patch_size": size.image // 8, "embed_dim": size.width,
        "depths": (2, 2), "num_heads": (size.heads, size.heads), "window_size": 2,
    }  # fmt: skip


TIMM = [
    _case("vit_tiny_patch16_224", _plain),
    _case("deit3_small_patch16_224", _plain),
    _case("deit_tiny_distilled_patch16_224", _plain),
    _case("beit_base_patch16_224", _plain),
    _case("eva02_tiny_patch14_224", _plain),
    _case("cait_xxs24_224", lambda s: _plain(s) | {"init_values": 0.5}),
    _case("xcit_nano_12_p16_224", lambda s: _plain(s) | {"patch_size": 8}),
    _case("mixer_s16_224", _square),
    _case("resmlp_12_224", _square),
    _case("swin_tiny_patch4_window7_224", _windows),
    _case("swinv2_tiny_window8_256", _windows),
    _case("convnext_atto", lambda s: {
        "depths": (1, 1, 1, 1), "dims": [s.width] * 4, "ls_init_value": 0.5}),
    _case("convnextv2_atto", lambda s: {"depths": (1, 1, 1, 1), "dims": [s.width] * 4}),
    _case("resnet18", lambda s: {"layers": (1, 1, 1, 1)}),
    _case("resnet26d", lambda s: {"layers": (1, 1, 1, 1), "base_width": 16}),
    _case("efficientnet_b0"),
    _case("mobilenetv3_small_050"),
    _case("regnetx_002"),
    _case("densenet121", lambda s: {"growth_rate": 8, "block_config": (1, 1, 1, 1)}),
    _case("maxvit_rmlp_pico_rw_256", _square),
    _case("coatnet_nano_rw_224", _square),
    _case("pvt_v2_b0", lambda s: {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)}),
    _case("poolformer_s12"),
    _case("levit_128s", _square),
]  # fmt: skip
