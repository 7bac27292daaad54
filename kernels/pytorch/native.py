"""PyTorch's fused operators, differentiated by autograd: "torch" on an accelerator; the CPU uses its attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.model.visibility import Block


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """The normalisation is fused; the product with the weight is a pass of its own, for the released models' order of
    rounding."""
    return F.rms_norm(x, (x.shape[-1],), None, eps).to(out_dtype) * weight.to(out_dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps).to(out_dtype)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of the token losses, logits [N, V], targets [N], in float32 or wider."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets.long(), ignore_index=IGNORE, reduction="sum")


def attention(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]) -> Tensor:
    """q [B, S, H, D], k and v [B, T, K, D] -> [B, S, H, D]; blocks of core.model.visibility with masks as tensors
    [B or 1, 1, queries, keys]. A block without a mask and with as many keys as queries stands for causal attention."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = [
        F.scaled_dot_product_attention(
            q[:, :, first:last],
            k[:, :, :keys],
            v[:, :, :keys],
            attn_mask=visible,
            is_causal=visible is None and last - first == keys,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        for first, last, keys, visible in blocks
    ]
    return (out[0] if len(out) == 1 else torch.cat(out, 2)).transpose(1, 2)


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask. The query heads of a kv head are stacked as further queries of it, [B, K, H/K * S, D],
    so that keys and values are not repeated."""
    B, S, H, D = q.shape
    rows = q.transpose(1, 2).reshape(B, k.shape[2], -1, D)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2))
    return out.reshape(B, H, S, D).transpose(1, 2)
