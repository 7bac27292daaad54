"""The operators of the decoder in PyTorch. Shapes: B batch, S queries, T keys, H heads, K kv heads, D head dim."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.batch import IGNORE
from core.visibility import Block, causal_blocks


def device() -> torch.device:
    """Where models of this process live: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias, operands and result in ``compute``, accumulated in float32 or wider."""
    return F.linear(x.to(compute), weight.to(compute), None if bias is None else bias.to(compute))


def embedding(table: Tensor, input_ids: Tensor) -> Tensor:
    """table [V, E], input_ids [B, S] -> [B, S, E]."""
    return F.embedding(input_ids, table)


def rms_norm(x: Tensor, weight: Tensor, eps: float, stat: torch.dtype, compute: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in ``stat``, cast to ``compute``, then times weight [E]: the released order."""
    x = x.to(stat)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x.to(compute) * weight.to(compute)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half rotation of x [B, S, H, D] by cos, sin [B or 1, S, 1, D/2], computed in the tables' dtype."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor, stat: torch.dtype) -> Tensor:
    """silu(gate) * up in ``stat``, returned in the dtype of ``gate``."""
    return (F.silu(gate.to(stat)) * up.to(stat)).to(gate.dtype)


def attention_blocks(num_queries: int, num_keys: int, doc_ids: np.ndarray | None) -> list[Block]:
    """Visibility as blocks of queries, once a forward pass. One block without a mask stands for plain causal attention
    of a whole sequence, for which the fused kernel needs none."""
    if doc_ids is None and num_queries == num_keys:
        return [Block(0, num_queries, num_keys, None)]
    return [
        block._replace(visible=None if block.visible is None else torch.from_numpy(block.visible).to(device())[:, None])
        for block in causal_blocks(num_queries, num_keys, doc_ids)
    ]


def attention(q: Tensor, k: Tensor, v: Tensor, blocks: list[Block]) -> Tensor:
    """Softmax attention, scale 1/sqrt(D), softmax in float32 or wider.

    q [B, S, H, D], k and v [B, T, K, D] -> [B, S, H, D]. Query heads j*H/K .. (j+1)*H/K - 1 share kv head j.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = []
    for first, last, keys, visible in blocks:
        whole_causal = visible is None and last - first == keys
        out.append(
            F.scaled_dot_product_attention(
                q[:, :, first:last],
                k[:, :, :keys],
                v[:, :, :keys],
                attn_mask=visible,
                is_causal=whole_causal,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return (out[0] if len(out) == 1 else torch.cat(out, 2)).transpose(1, 2)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of -log softmax(logits)[target], logits [B, S, V] in the loss dtype; IGNORE counts nothing."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), ignore_index=IGNORE, reduction="sum")
