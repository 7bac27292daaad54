"""The operators of the decoder in PyTorch. Shapes: B batch, S queries, T keys, H heads, K kv heads, D head dim."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.batch import IGNORE
from core.visibility import Block, causal_blocks

_HIDDEN = -1.0e30  # the score of a key that must not be seen; finite, so a masked row cannot make a NaN


def device() -> torch.device:
    """Where models of this process live: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias, operands and result in ``compute``, accumulated in float32 or wider."""
    return F.linear(x.to(compute), weight.to(compute), None if bias is None else bias.to(compute))


def add_bias(x: Tensor, bias: Tensor, compute: torch.dtype) -> Tensor:
    """x [..., E] + bias [E] rounded to ``compute``, in the dtype of x."""
    return x + bias.to(compute).to(x.dtype)


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
    return masked_blocks(causal_blocks(num_queries, num_keys, doc_ids))


def masked_blocks(blocks: Iterable[Block]) -> list[Block]:
    """Blocks of core.visibility with their masks as tensors [B or 1, 1, q, keys]."""
    return [
        block._replace(visible=None if block.visible is None else torch.from_numpy(block.visible).to(device())[:, None])
        for block in blocks
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


def attention_block(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over one block of keys, so that blocks can be merged: out [B, H, S, D] and log-sum-exp [B, H, S, 1].

    q [B, H, S, D], k and v [B, K, T, D] in the dtype that computes, float32 or wider; ``hidden`` from ``hidden_keys``,
    or None when every query sees every key. A query that sees none of the keys gets a log-sum-exp of about -1e30, with
    which its output weighs nothing.
    """
    scores = _block_scores(q, k, hidden)
    log_sum_exp = torch.logsumexp(scores, -1, keepdim=True)
    out = torch.matmul(torch.exp(scores - log_sum_exp), v)  # [B, K, H/K * S, D]
    return out.reshape(q.shape), log_sum_exp.reshape(*q.shape[:3], 1)


def attention_block_backward(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, log_sum_exp: Tensor, grad_out: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block, from the *final* log-sum-exp [B, H, S, 1] and ``delta`` = sum(out * grad_out) over D.

    With P = exp(scores - log_sum_exp), the block's part of the whole softmax: dV = P^T dO, dS = P * (dO V^T - delta),
    dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D) (FlashAttention, arXiv 2205.14135, appendix B).
    """
    B, H, S, D = q.shape
    rows = (B, k.shape[1], H // k.shape[1] * S, -1)
    grad_out = grad_out.reshape(rows)
    probabilities = torch.exp(_block_scores(q, k, hidden) - log_sum_exp.reshape(rows))
    dv = torch.matmul(probabilities.transpose(-1, -2), grad_out)
    grad_scores = probabilities * (torch.matmul(grad_out, v.transpose(-1, -2)) - delta.reshape(rows)) * D**-0.5
    dq = torch.matmul(grad_scores, k).reshape(q.shape)
    dk = torch.matmul(grad_scores.transpose(-1, -2), q.reshape(rows))
    return dq, dk, dv


def merge_blocks(out: Tensor, log_sum_exp: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys from attention over each; [B, H, S, D] and [B, H, S, 1].

    out - sigmoid(b - a) * (out - more) and a - logsigmoid(a - b) stay finite whatever the sizes of a and b.
    """
    apart = more_lse - log_sum_exp
    return out - torch.sigmoid(apart) * (out - more), log_sum_exp - F.logsigmoid(-apart)


def hidden_keys(visible: np.ndarray) -> Tensor:
    """A mask bool [B or 1, S, T] in the form that attention_block takes, [B or 1, 1, 1, S, T]; made once a pass."""
    return torch.from_numpy(~visible[:, None, None]).to(device())


def _block_scores(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    """q k^T / sqrt(D) [B, K, H/K * S, T]; hidden keys at -1e30."""
    B, H, S, D = q.shape
    K, T = k.shape[1:3]
    scores = torch.matmul(q.reshape(B, K, H // K * S, D), k.transpose(-1, -2)) * D**-0.5
    if hidden is None:
        return scores
    return scores.view(B, K, H // K, S, T).masked_fill(hidden, _HIDDEN).view(scores.shape)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of -log softmax(logits)[target], logits [B, S, V] in the loss dtype; IGNORE counts nothing."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), ignore_index=IGNORE, reduction="sum")
