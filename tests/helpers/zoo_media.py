"""Cases of the zoo for images and speech, built by Transformers from small configurations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zoo import Case, Inputs, Size, first_output, tokens
from zoo_text import built


def _image(size: Size, batch: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, size.image, size.image)}


def _spectrogram(size: Size, batch: int) -> Inputs:
    """Return features for Whisper, two frames for each position of its encoder, and tokens."""
    return {
        "input_features": torch.randn(batch, 8, 2 * size.length),
        "decoder_input_ids": tokens(size, batch)["input_ids"],
    }


def _sound(size: Size, batch: int) -> Inputs:
    return {"input_values": torch.randn(batch, 20 * size.length + 4)}


def _mel(size: Size, batch: int) -> Inputs:
    return {"input_values": torch.randn(batch, 4 * size.length, 16)}


def _captioned(size: Size, batch: int) -> Inputs:
    return tokens(size, batch) | _image(size, batch)


def _both(output: Any) -> list[Tensor]:
    """Return the embeddings of text and image, so that the loss of a sample is its own."""
    return [output.text_embeds, output.image_embeds]


def _pooled(output: Any) -> list[Tensor]:
    return [output.pooler_output]


def _built(kind: str, head: str, size: Size, own: Callable[[Size], dict[str, Any]]) -> nn.Module:
    return built(kind, head, size, **own(size))


def _case(
    name: str,
    kind: str,
    inputs: Callable,
    own: Callable[[Size], dict[str, Any]],
    head: str = "AutoModel",
    outputs: Callable = first_output,
) -> Case:
    group = "speech" if inputs in (_spectrogram, _sound, _mel) else "vision"
    build = partial(_built, kind, head, own=own)
    return Case(name, group, build, inputs, outputs, "transformers")


def _patches(size: Size) -> dict[str, Any]:
    return {"image_size": size.image, "patch_size": size.image // 4}


def _stages(size: Size) -> list[int]:
    return [size.width, 2 * size.width]


def _waves(size: Size) -> dict[str, Any]:
    return {
        "conv_dim": [size.width] * 2, "conv_kernel": [10, 3], "conv_stride": [5, 4],
        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
    }  # fmt: skip


def _two_towers(size: Size) -> dict[str, Any]:
    return {
        "text_config": {
            "hidden_size": size.width, "num_hidden_layers": size.depth,
            "num_attention_heads": size.heads, "intermediate_size": 2 * size.width,
            "vocab_size": size.vocabulary, "max_position_embeddings": size.length,
            "eos_token_id": size.vocabulary - 1,
        },
        "vision_config": _patches(size) | {
            "hidden_size": size.width, "num_hidden_layers": size.depth,
            "num_attention_heads": size.heads, "intermediate_size": 2 * size.width,
        },
        "projection_dim": size.width,
    }  # fmt: skip


_CLASSIFIER = "AutoModelForImageClassification"

MEDIA = [
    _case("ViT", "vit", _image, _patches, _CLASSIFIER),
    _case("DeiT", "deit", _image, _patches, "DeiTForImageClassification"),
    _case("BEiT", "beit", _image, lambda s: _patches(s) | {
        "use_relative_position_bias": True, "layer_scale_init_value": 0.5}, _CLASSIFIER),
    _case("DINOv2", "dinov2", _image, _patches, _CLASSIFIER),
    _case("SigLIP's vision", "siglip_vision_model", _image, _patches, outputs=_pooled),
    _case("Swin", "swin", _image, lambda s: {
        "image_size": [s.image] * 2, "patch_size": [s.image // 8] * 2, "embed_dim": s.width,
        "depths": [2, 2], "num_heads": [s.heads] * 2, "window_size": 2}, _CLASSIFIER),
    _case("Swin v2", "swinv2", _image, lambda s: {
        "image_size": [s.image] * 2, "patch_size": [s.image // 8] * 2, "embed_dim": s.width,
        "depths": [2, 2], "num_heads": [s.heads] * 2, "window_size": 2}, _CLASSIFIER),
    _case("ConvNeXt", "convnext", _image, lambda s: {
        "num_stages": 2, "hidden_sizes": _stages(s), "depths": [1, 1],
        "layer_scale_init_value": 0.5}, _CLASSIFIER),
    _case("ResNet", "resnet", _image, lambda s: {
        "embedding_size": s.width, "hidden_sizes": _stages(s), "depths": [1, 1],
        "layer_type": "basic"}, _CLASSIFIER),
    _case("SegFormer", "segformer", _image, lambda s: {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": _stages(s),
        "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, s.heads],
        "mlp_ratios": [2, 2], "decoder_hidden_size": s.width}, "AutoModelForSemanticSegmentation"),
    _case("CLIP", "clip", _captioned, _two_towers, outputs=_both),
    _case("Whisper", "whisper", _spectrogram, lambda s: {"num_mel_bins": 8},
          "AutoModelForSpeechSeq2Seq"),
    _case("Wav2Vec2", "wav2vec2", _sound, _waves),
    _case("HuBERT", "hubert", _sound, lambda s: _waves(s) | {"feat_extract_norm": "layer"}),
    _case("Audio spectrogram transformer", "audio-spectrogram-transformer", _mel, lambda s: {
        "num_mel_bins": 16, "max_length": 4 * s.length, "patch_size": 8, "frequency_stride": 8,
        "time_stride": 8}),
]  # fmt: skip
