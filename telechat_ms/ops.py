"""The operators of the decoder in MindSpore. Shapes: B batch, S queries, T keys, H heads, K kv heads, D head dim.

MindSpore's CPU device has no bfloat16 matrix product (and no float16 accumulation rule to rely on). There the operands
are rounded to the compute dtype and multiplied in float32, and the result is rounded again: what a matrix unit does.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from core.batch import IGNORE
from core.visibility import Block, causal_blocks

_HIDDEN = -1.0e30  # added to a score that must not be seen; finite, so a masked row cannot make a NaN


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, compute: ms.Type) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias, operands and result in ``compute``, accumulated in float32 or wider."""
    flat = _operand(x, compute).reshape(-1, x.shape[-1])
    out = ops.MatMul(transpose_b=True)(flat, _operand(weight, compute))
    if bias is not None:
        out = out + ops.cast(ops.cast(bias, compute), out.dtype)
    return ops.cast(out, compute).reshape(*x.shape[:-1], weight.shape[0])


def embedding(table: Tensor, input_ids: Tensor) -> Tensor:
    """table [V, E], input_ids [B, S] -> [B, S, E]."""
    return ops.cast(ops.gather(_operand(table, table.dtype), input_ids, 0), table.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, stat: ms.Type, compute: ms.Type) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in ``stat``, cast to ``compute``, then times weight [E]: the released order."""
    x = ops.cast(x, stat)
    x = x * ops.rsqrt(ops.ReduceMean(keep_dims=True)(x * x, -1) + Tensor(eps, stat))
    return ops.cast(_operand(x, compute) * _operand(weight, compute), compute)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half rotation of x [B, S, H, D] by cos, sin [B or 1, S, 1, D/2], computed in the tables' dtype."""
    first, second = ops.split(ops.cast(x, cos.dtype), x.shape[-1] // 2, -1)
    return ops.cast(ops.concat((first * cos - second * sin, second * cos + first * sin), -1), x.dtype)


def swiglu(gate: Tensor, up: Tensor, stat: ms.Type) -> Tensor:
    """silu(gate) * up in ``stat``, returned in the dtype of ``gate``."""
    return ops.cast(ops.silu(ops.cast(gate, stat)) * ops.cast(up, stat), gate.dtype)


def attention_blocks(num_queries: int, num_keys: int, doc_ids: np.ndarray | None) -> list[Block]:
    """Visibility as blocks of queries with additive float32 masks [B or 1, 1, 1, q, keys], once a forward pass."""
    return [
        block._replace(visible=None if block.visible is None else _additive(block.visible))
        for block in causal_blocks(num_queries, num_keys, doc_ids)
    ]


def attention(q: Tensor, k: Tensor, v: Tensor, blocks: list[Block]) -> Tensor:
    """Softmax attention, scale 1/sqrt(D), softmax in float32 or wider.

    q [B, S, H, D], k and v [B, T, K, D] -> [B, S, H, D]. Query heads j*H/K .. (j+1)*H/K - 1 share kv head j, so they
    are stacked along the queries and the keys are never repeated.
    """
    B, S, H, D = q.shape
    K = k.shape[2]
    compute = q.dtype
    stat = compute if compute in (ms.float32, ms.float64) else ms.float32
    q, k, v = (_operand(ops.transpose(t, (0, 2, 1, 3)), compute) for t in (q, k, v))
    out = []
    for first, last, keys, hidden in blocks:
        rows = last - first
        q_block = q if rows == S else q[:, :, first:last]
        k_block, v_block = (t if keys == t.shape[2] else t[:, :, :keys] for t in (k, v))
        scores = ops.BatchMatMul(transpose_b=True)(q_block.reshape(B, K, H // K * rows, D), k_block)
        scores = ops.cast(scores, stat) * Tensor(D**-0.5, stat)
        if hidden is not None:
            scores = (scores.reshape(B, K, H // K, rows, keys) + ops.cast(hidden, stat)).reshape(scores.shape)
        weights = _operand(_softmax(scores), compute)
        out.append(ops.BatchMatMul()(weights, v_block).reshape(B, H, rows, D))
    joined = out[0] if len(out) == 1 else ops.concat(out, 2)
    return ops.cast(ops.transpose(joined, (0, 2, 1, 3)), compute)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of -log softmax(logits)[target], logits [B, S, V] in the loss dtype; IGNORE counts nothing."""
    flat = targets.reshape(-1, 1)
    counted = flat != IGNORE
    log_probs = ops.log_softmax(logits.reshape(-1, logits.shape[-1]), -1)
    picked = ops.gather_d(log_probs, 1, ops.cast(flat * counted, ms.int32))
    return -total(picked * ops.cast(counted, logits.dtype))


def total(x: Tensor) -> Tensor:
    """The sum of all elements, in the dtype of x.

    MindSpore's CPU kernel adds one by one: over 4096 token losses its float32 sum is off by 1e-6. There the sum runs in
    float64.
    """
    if ms.get_context("device_target") != "CPU":
        return ops.ReduceSum()(x)
    return ops.cast(ops.ReduceSum()(ops.cast(x, ms.float64)), x.dtype)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis, which is never given to the operator with length 1.

    On MindSpore's CPU device (2.9.0) the gradient of a softmax over an axis of length 1 leaves the kernel in a state
    that makes every later softmax gradient of the process wrong by tens of percent, without an error.
    """
    return ops.softmax(scores, -1) if scores.shape[-1] > 1 else ops.ones_like(scores)


def _operand(x: Tensor, compute: ms.Type) -> Tensor:
    """x rounded to ``compute``, in a dtype this device can multiply."""
    x = ops.cast(x, compute)
    if compute in (ms.bfloat16, ms.float16) and ms.get_context("device_target") == "CPU":
        return ops.cast(x, ms.float32)
    return x


def _additive(visible: np.ndarray) -> Tensor:
    return Tensor(np.where(visible, np.float32(0), np.float32(_HIDDEN))[:, None, None])
