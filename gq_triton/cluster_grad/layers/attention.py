"""The forward pass of ``nn.MultiheadAttention`` with the samples in front.

Torch's own works in time-major order inside, and hands parameters of a submodule to one function.
Here each parameter meets rows of samples, so that stand-ins find its gradients by cluster, and the
module need not run again. Random numbers are drawn in torch's order.

Shapes: B samples, T queries, S keys, E numbers per position, H heads, D = E / H.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

__all__ = ["attend", "shows_parameters"]


def shows_parameters(module: nn.Module) -> bool:
    """Return whether a module is attention whose parameters ``attend`` can use."""
    if not isinstance(module, nn.MultiheadAttention):
        return False
    out: Any = module.out_proj
    if type(module).forward is not nn.MultiheadAttention.forward:
        return False
    if type(out).forward is not nn.Linear.forward:
        return False
    return not any(parametrize.is_parametrized(part) for part in (module, out))


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Any = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> Any:  # fmt: skip
    """Return what ``nn.MultiheadAttention.forward`` does; arguments and shapes are its own."""
    m: Any = module
    hinted = is_causal and key_padding_mask is None and not need_weights
    if not _taken(m, (query, key, value), key_padding_mask, attn_mask, is_causal):
        return type(module).forward(
            m, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
            is_causal,
        )  # fmt: skip
    q, k, v = _projected(m, query, key, value)
    mask = None if hinted else _mask(m, attn_mask, key_padding_mask, q)
    added = int(m.bias_k is not None) + int(m.add_zero_attn)
    if mask is not None and added:
        mask = F.pad(mask, (0, added))
    drop = m.dropout if m.training else 0.0
    weights = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        scores = scores if mask is None else scores + mask
        weights = scores.softmax(-1)
        weights = F.dropout(weights, drop) if drop else weights
        out = weights @ v
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        causal = is_causal and hinted
        out = F.scaled_dot_product_attention(q, k, v, mask, drop, causal)
    # Torch calls out_proj's function alone, not the hooks of the module.
    out = m.out_proj.forward(out.transpose(1, 2).flatten(2))
    # Torch's result is time-major in memory, in which order a dropout draws its random numbers.
    out = out.transpose(0, 1).contiguous()
    return (out.transpose(0, 1) if m.batch_first else out), weights


def _taken(m: Any, given: tuple[Tensor, ...], padding: Any, mask: Any, is_causal: bool) -> bool:
    """Return whether arguments have the shapes of a batch; torch says what is wrong with others."""
    query, key, value = given
    if any(tensor.dim() != 3 or tensor.is_nested for tensor in given):
        return False
    if is_causal and mask is None:
        return False
    masks = [one for one in (padding, mask) if one is not None]
    if any(one.dtype != torch.bool and not one.is_floating_point() for one in masks):
        return False
    time = 1 if m.batch_first else 0
    batch, length, source = query.shape[1 - time], query.shape[time], key.shape[time]
    if key.shape[:2] != value.shape[:2] or key.shape[1 - time] != batch:
        return False
    if padding is not None and padding.shape != (batch, source):
        return False
    shapes = (length, source), (batch * m.num_heads, length, source)
    return mask is None or tuple(mask.shape) in shapes


def _projected(m: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Return queries ``(B, H, T, D)``, keys and values ``(B, H, S, D)``."""
    same = query is key, key is value
    if not m.batch_first:
        query = query.transpose(0, 1)
        key = query if same[0] else key.transpose(0, 1)
        value = key if same[1] else value.transpose(0, 1)
    weight, bias, width = m.in_proj_weight, m.in_proj_bias, m.embed_dim
    if m._qkv_same_embed_dim and all(same):
        parts = [*F.linear(query, weight, bias).chunk(3, dim=-1)]
    elif m._qkv_same_embed_dim and torch.compiler.is_compiling():
        # A compiled graph cannot follow parts of a weight: all rows meet all of it.
        given = [query, key] if same[1] else [query, key, value]
        projected = F.linear(torch.cat(given, dim=1), weight, bias)
        each = [*projected.split([rows.shape[1] for rows in given], dim=1)]
        each.append(each[-1])
        parts = [each[place].chunk(3, dim=-1)[place] for place in range(3)]
    elif m._qkv_same_embed_dim and same[1]:
        biases = (None, None) if bias is None else bias.split([width, 2 * width])
        weights = weight.split([width, 2 * width])
        both = F.linear(key, weights[1], biases[1])
        parts = [F.linear(query, weights[0], biases[0]), *both.chunk(2, dim=-1)]
    else:
        weights = [m.q_proj_weight, m.k_proj_weight, m.v_proj_weight]
        weights = weight.chunk(3) if m._qkv_same_embed_dim else weights
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = query, key, value
        parts = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    batch = len(query)
    if m.bias_k is not None:
        for place, more in ((1, m.bias_k), (2, m.bias_v)):
            parts[place] = torch.cat([parts[place], more.expand(batch, 1, -1)], dim=1)
    parts = [part.unflatten(-1, (m.num_heads, m.head_dim)).transpose(1, 2) for part in parts]
    if m.add_zero_attn:
        parts[1:] = [F.pad(part, (0, 0, 0, 1)) for part in parts[1:]]
    return parts


def _mask(m: Any, mask: Any, padding: Tensor | None, q: Tensor) -> Any:
    """Return what is added to the scores ``(B, H, T, S)``; None where nothing is."""
    if mask is not None:
        mask = mask if mask.is_floating_point() else _masked(mask, q)
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (len(q), m.num_heads))
    if padding is not None:
        padding = padding if padding.is_floating_point() else _masked(padding, q)
        padding = padding[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask


def _masked(mask: Tensor, q: Tensor) -> Tensor:
    """Return minus infinity where a mask is true, else 0."""
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)
