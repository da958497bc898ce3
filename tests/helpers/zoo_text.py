"""Cases of the zoo for language, built by Transformers from small configurations."""

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from zoo import Case, Inputs, Size, first_output, tokens

# What configurations call the numbers of ``Size``, in that order; each takes those that it knows.
_NAMES = {
    "width": ("hidden_size", "d_model", "embedding_size", "n_embd", "dim"),
    "heads": ("num_attention_heads", "num_heads", "n_heads", "encoder_attention_heads",
              "decoder_attention_heads", "num_key_value_heads"),
    "depth": ("num_hidden_layers", "num_layers", "n_layers", "encoder_layers", "decoder_layers"),
    "length": ("max_position_embeddings", "n_positions", "max_source_positions",
               "max_target_positions"),
    "vocabulary": ("vocab_size",),
}  # fmt: skip
_DOUBLE = ("intermediate_size", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim",
           "ffn_dim", "d_inner")  # fmt: skip


def configuration(kind: str, size: Size, **own: Any) -> Any:
    """Return the configuration of a Transformers model in a size, without dropout.

    Args:
        kind: the ``model_type``.
        size: its numbers, where the configuration has them.
        **own: what is set besides.
    """
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    known = {entry.name for entry in dataclasses.fields(made)}
    given: dict[str, Any] = {"use_cache": False, "decoder_start_token_id": 1, "eos_token_id": 2}
    given |= {"pad_token_id": 1, "bos_token_id": 1, "head_dim": size.width // size.heads}
    given |= dict.fromkeys(_DOUBLE, 2 * size.width)
    for number, names in _NAMES.items():
        given |= {name: getattr(size, number) for name in names}
    own_names = {made.attribute_map.get(name, name): value for name, value in own.items()}
    given = {made.attribute_map.get(name, name): value for name, value in given.items()}
    given = {name: value for name, value in given.items() if name in known}
    for name, value in made().to_dict().items():
        if "drop" in name and isinstance(value, float):
            given[name] = 0.0
    return made(**given | own_names)


def built(kind: str, head: str, size: Size, **own: Any) -> nn.Module:
    """Return the model of a configuration.

    Args:
        kind: the ``model_type``.
        head: the class of Transformers, or one of its ``Auto`` classes.
        size: the size of the model.
        **own: what is set besides; ``experts_implementation`` is no part of a configuration.
    """
    import transformers

    how = {n: own.pop(n) for n in ("experts_implementation",) if n in own}
    config, made = configuration(kind, size, **own), getattr(transformers, head)
    return made.from_config(config, **how) if head.startswith("Auto") else made(config)


def _masked(size: Size, batch: int) -> Inputs:
    """Return tokens ``(B, T)`` of which the last ones of some samples are padding."""
    mask = torch.ones(batch, size.length, dtype=torch.int64)
    mask[::2, -2:] = 0
    return tokens(size, batch) | {"attention_mask": mask}


def _pairs(size: Size, batch: int) -> Inputs:
    """Return tokens for an encoder and, one fewer, for a decoder."""
    other = tokens(size, batch)["input_ids"][:, 1:]
    return tokens(size, batch) | {"decoder_input_ids": other}


def _checkpointed(kind: str, head: str, size: Size) -> nn.Module:
    model: Any = built(kind, head, size)
    # The name that Transformers 5 gives to what was gradient_checkpointing_enable.
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)()
    return model


def _lora(kind: str, targets: list[str], size: Size) -> nn.Module:
    peft = importlib.import_module("peft")  # an extra of nobody: only the table's program needs it
    model: Any = built(kind, "AutoModelForCausalLM", size)
    options = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    return peft.get_peft_model(model, options)


def _text(
    name: str, kind: str, head: str = "AutoModelForCausalLM", inputs: Callable = tokens,
    features: str | None = None, **own: Any,
) -> Case:  # fmt: skip
    build = partial(_build, kind, head, own)
    return Case(name, "language", build, inputs, first_output, "transformers", features)


def _build(kind: str, head: str, own: dict[str, Any], size: Size) -> nn.Module:
    return built(kind, head, size, **{n: v(size) if callable(v) else v for n, v in own.items()})


_MASKED, _SEQUENCE = "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"

TEXT = [
    _text("GPT-2", "gpt2"),
    _text("GPT-Neo", "gpt_neo", attention_types=lambda s: [[["global"], s.depth]]),
    _text("GPT-NeoX", "gpt_neox"),
    _text("GPT-J", "gptj", rotary_dim=4),
    _text("CodeGen", "codegen", n_head=4, rotary_dim=4),
    _text("OPT", "opt", word_embed_proj_dim=lambda s: s.width),
    _text("BLOOM", "bloom"),
    _text("Llama", "llama"),
    _text("Mistral", "mistral"),
    _text("Qwen2", "qwen2"),
    _text("Qwen3", "qwen3"),
    _text("Phi", "phi"),
    _text("Phi-3", "phi3"),
    _text("Gemma", "gemma"),
    _text("Gemma 2", "gemma2"),
    _text("Gemma 3", "gemma3_text"),
    _text("OLMo 2", "olmo2"),
    _text("StableLM", "stablelm"),
    _text("Falcon", "falcon"),
    _text("MPT", "mpt"),
    # torch has no grouped product in float64
    _text("Mixtral", "mixtral", num_local_experts=3, experts_implementation="eager"),
    _text("Mamba", "mamba", state_size=4),
    _text("Mamba-2", "mamba2", state_size=4, n_groups=1, chunk_size=4, expand=2,
          num_heads=lambda s: 2 * s.heads, head_dim=lambda s: s.width // s.heads),
    _text("BERT", "bert", _MASKED, _masked),
    _text("RoBERTa", "roberta", _MASKED, _masked,
          max_position_embeddings=lambda s: s.length + 2),
    _text("DistilBERT", "distilbert", _MASKED, _masked),
    _text("ALBERT", "albert", _MASKED, _masked, embedding_size=8),
    _text("ELECTRA", "electra", _MASKED, _masked, embedding_size=8),
    _text("DeBERTa", "deberta", _MASKED, _masked, relative_attention=True,
          pos_att_type=["p2c", "c2p"]),
    _text("DeBERTa-v2", "deberta-v2", _MASKED, _masked, relative_attention=True,
          pos_att_type=["p2c", "c2p"], position_buckets=4, norm_rel_ebd="layer_norm",
          share_att_key=True, conv_kernel_size=3),
    _text("XLNet", "xlnet", features="lm_loss", d_head=lambda s: s.width // s.heads),
    _text("MPNet", "mpnet", _MASKED, _masked, max_position_embeddings=lambda s: s.length + 2),
    _text("ModernBERT", "modernbert", _MASKED, _masked),
    _text("T5", "t5", _SEQUENCE, _pairs, d_kv=8),
    _text("BART", "bart", _SEQUENCE, _pairs),
    _text("Pegasus", "pegasus", _SEQUENCE, _pairs),
    _text("Marian", "marian", _SEQUENCE, _pairs),
    Case("GPT-2 with checkpointing", "language",
         partial(_checkpointed, "gpt2", "AutoModelForCausalLM"), tokens, first_output,
         "transformers"),
    Case("GPT-2 with LoRA", "language", partial(_lora, "gpt2", ["c_attn"]), tokens, first_output,
         "peft"),
    Case("Llama with LoRA", "language", partial(_lora, "llama", ["q_proj", "v_proj"]), tokens,
         first_output, "peft"),
]  # fmt: skip
