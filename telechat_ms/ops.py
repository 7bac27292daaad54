"""The operators of the decoder in MindSpore; kernels/mindspore/ops.py knows what serves each of them.

Shapes: B batch, S queries, T keys, H heads, K kv heads, D head dim, E hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeAlias

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from telechat_twins.core.inference.runner import Step
from telechat_twins.core.model.visibility import (
    Block,
    KeyRanges,
    block_ranges,
    causal_blocks,
    causal_ranges,
    mask_ranges,
)
from telechat_twins.kernels.int8 import Int8
from telechat_twins.kernels.mindspore import composite as composite
from telechat_twins.kernels.mindspore import ops as kernels
from telechat_twins.kernels.mindspore import paged as mindspore_paged
from telechat_twins.kernels.mindspore.adapters import adapted_linear
from telechat_twins.kernels.mindspore.composite import accurate, add_bias, operand, total
from telechat_twins.kernels.mindspore.ops import (
    Keys,
    add,
    add_rms_norm,
    cross_entropy,
    described,
    embedding,
    gelu,
    layer_norm,
    linear,
    rms_norm,
    rope_qk,
    swiglu,
)
from telechat_twins.kernels.mindspore.paged import Pages, page_dtype, paged_attention, rows_at, store_rows
from telechat_twins.kernels.reference import visible_keys

__all__ = [
    "Pages",
    "accurate",
    "adapted_linear",
    "add",
    "add_bias",
    "add_rms_norm",
    "attention",
    "attention_block",
    "attention_block_backward",
    "attention_blocks",
    "described",
    "cross_entropy",
    "embedding",
    "gelu",
    "hidden_keys",
    "key_ranges",
    "layer_norm",
    "linear",
    "linears",
    "masked_blocks",
    "merge_blocks",
    "operand",
    "page_dtype",
    "paged_attention",
    "place_pages",
    "place_rows",
    "positions",
    "rms_norm",
    "rope_qk",
    "rows_at",
    "shard_gradient",
    "shard_statistics",
    "store_rows",
    "swiglu",
    "total",
]

Visible: TypeAlias = Keys | list[Block]  # what queries see, as the attention that serves wants it
# What a block of keys shows: part by part, where the keys of each part are and what a query sees of them; or a mask.
Parts: TypeAlias = "list[tuple[slice, Keys]] | Tensor"


class LinearLayer(Protocol):
    """A layer x @ weight^T + bias that computes in the dtype ``compute``, and its adapter, if any, of ``dropped``."""

    weight: Tensor | Int8
    bias: Tensor | None
    compute: ms.Type
    lora_a: Tensor | None

    def __call__(self, x: Tensor, dropped: Tensor | None = None) -> Tensor: ...


def attention_blocks(num_queries: int, num_keys: int, doc_ids: np.ndarray | None) -> Visible:
    """Causal visibility inside documents in the form that ``attention`` takes, once a forward pass."""
    keys = kernels.keys_on_device(causal_ranges(num_queries, num_keys, doc_ids))
    return _masked(causal_blocks(num_queries, num_keys, doc_ids)) if keys is None else keys


def place_pages(step: Step, page_size: int, dtype: ms.Type) -> Pages:
    """Where keys and values, in ``dtype``, of one step of generation go and lie, as ``paged_attention`` takes it."""
    return mindspore_paged.place(step, page_size, dtype)


def place_rows(slots: np.ndarray, page_size: int, dtype: ms.Type) -> mindspore_paged.Rows:
    """Slots int32 [N] = page * page_size + place, as ``store_rows`` takes them for rows in ``dtype``."""
    return mindspore_paged.place_rows(slots, page_size, dtype)


def linears(x: Tensor, dropped: Tensor | None, *layers: LinearLayer) -> tuple[Tensor, ...]:
    """What each of several linear layers makes of x; of few rows in one call where an operator does that.

    ``dropped``: x as their adapters read it, None: x itself.
    """
    found = None
    if all(layer.lora_a is None for layer in layers):
        found = kernels.few_rows(x, [(layer.weight, layer.bias) for layer in layers], layers[0].compute)
    return tuple(layer(x, dropped) for layer in layers) if found is None else found


def positions(x: Tensor, wanted: Tensor) -> Tensor:
    """x [1, S, E] -> the rows ``wanted`` int32 [W] of it, [1, W, E]."""
    return kernels.embedding(x[0], wanted)[None]


def masked_blocks(blocks: Iterable[Block], num_queries: int, num_keys: int) -> Visible:
    """Blocks of core.model.visibility that cover ``num_queries``, in the form that ``attention`` takes."""
    parts = list(blocks)
    keys = kernels.keys_on_device(block_ranges(parts, num_queries, num_keys))
    return _masked(parts) if keys is None else keys


def _masked(blocks: Iterable[Block]) -> list[Block]:
    """With additive float32 masks [B or 1, 1, 1, q, keys]."""
    return [
        block._replace(visible=None if block.visible is None else composite.hidden_keys(block.visible))
        for block in blocks
    ]


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Softmax attention, scale 1/sqrt(D), softmax in float32 or wider.

    q [B, S, H, D], k and v [B, T, K, D] -> [B, S, H, D]. Query heads j*H/K .. (j+1)*H/K - 1 share kv head j, whose keys
    are never repeated.
    """
    if not isinstance(visible, Keys):
        return composite.attention(q, k, v, visible)
    if q.dtype == ms.float64:
        return composite.attention(q, k, v, [Block(0, q.shape[1], k.shape[1], visible.as_mask())])
    return kernels.attention(q, k, v, visible)


def hidden_keys(visible: np.ndarray) -> Parts:
    """A mask bool [B or 1, S, T] in the form that attention_block takes; made once a pass.

    Where a query's keys are not one run, as in a ring's own block when each document is zigzagged, they are one in each
    half of the keys. ValueError for a mask that this does not hold for.
    """
    if kernels.serving("attention") is None:
        return composite.hidden_keys(visible)
    num_keys = visible.shape[-1]
    try:
        parts = [(slice(0, num_keys), mask_ranges(visible))]
    except ValueError:
        halves = slice(0, num_keys // 2), slice(num_keys // 2, num_keys)
        parts = [(half, mask_ranges(visible[..., half])) for half in halves]
    return [(keys, _placed(ranges, keys.stop - keys.start)) for keys, ranges in parts]


def key_ranges(ranges: np.ndarray, num_keys: int) -> Parts:
    """Runs of keys int32 [B, S, 2], as core.model.visibility.KeyRanges has them, in the form that attention_block
    takes."""
    if kernels.serving("attention") is None:
        return composite.hidden_keys(visible_keys(ranges, num_keys))
    return [(slice(0, num_keys), _placed(ranges, num_keys))]


def attention_block(q: Tensor, k: Tensor, v: Tensor, hidden: Parts | None) -> tuple[Tensor, Tensor]:
    """Attention over one block of keys, so that blocks can be merged: out [B, H, S, D] and log-sum-exp [B, H, S, 1],
    both in float32 or wider.

    q [B, H, S, D], k and v [B, K, T, D]; ``hidden`` from ``hidden_keys``, or None when every query sees every key. A
    query that sees none of the keys gets zeros and -inf (composite: about -1e30), with which its output weighs nothing.
    """
    parts = _parts(q, k, hidden)
    if parts is None or isinstance(parts, Tensor):
        q, k, v = map(_wide, (q, k, v))
        return composite.attention_block(q, k, v, parts)
    out = log_sum_exp = None
    for rows, keys in parts:
        turned = (_turned(x) for x in (q, k[:, :, rows], v[:, :, rows]))
        more, more_lse = keys.module.attention(*turned, keys.device, out_f32=True)
        more, more_lse = _turned(more), more_lse.reshape(*more_lse.shape, 1)
        if out is None:
            out, log_sum_exp = more, more_lse
        else:
            out, log_sum_exp = merge_blocks(out, log_sum_exp, more, more_lse)
    return out, log_sum_exp


def attention_block_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Parts | None,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block, from the *final* log-sum-exp [B, H, S, 1] and ``delta`` = sum(out * grad_out) over D.

    With P = exp(scores - log_sum_exp), the block's part of the whole softmax: dV = P^T dO, dS = P * (dO V^T - delta),
    dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D) (FlashAttention, arXiv 2205.14135, appendix B). ``out``, the final
    output [B, H, S, D], is for an operator that computes delta itself (CANN's).
    """
    parts = _parts(q, k, hidden)
    if parts is None or isinstance(parts, Tensor):
        q, k, v, grad_out = map(_wide, (q, k, v, grad_out))
        return composite.attention_block_backward(q, k, v, parts, log_sum_exp, grad_out, delta)
    statistics, dq, pieces = q.shape[:3], None, []
    for rows, keys in parts:
        turned = (_turned(x) for x in (grad_out, q, k[:, :, rows], v[:, :, rows]))
        final = None if out is None else ops.cast(_turned(out), q.dtype)
        part, *d = keys.module.attention_backward(
            *turned,
            keys.device,
            final,
            log_sum_exp.reshape(statistics),
            delta=delta.reshape(statistics),
            out_f32=True,
        )
        dq = part if dq is None else dq + part
        pieces.append(d)
    dk, dv = (d[0] if len(d) == 1 else ops.concat(d, 1) for d in zip(*pieces, strict=True))
    return _turned(dq), _turned(dk), _turned(dv)


def merge_blocks(out: Tensor, log_sum_exp: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys from attention over each; [B, H, S, D] and [B, H, S, 1]."""
    module = kernels.serving("merge_blocks", out.dtype)
    if module is None:
        return composite.merge_blocks(out, log_sum_exp, more, more_lse)
    rows = out.shape[:3]
    merged, joint = module.merge_blocks(_turned(out), log_sum_exp.reshape(rows), _turned(more), more_lse.reshape(rows))
    return _turned(merged), joint.reshape(*rows, 1)


def shard_statistics(logits: Tensor, targets: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """log_sum_exp over the ``real`` columns of logits [N, C] and the target's logit where it is among them; [N] each.

    The columns are [first, first + C) of the vocabulary.
    """
    module = kernels.serving("cross_entropy", logits.dtype)
    serve = composite.cross_entropy_forward if module is None else module.cross_entropy_forward
    return serve(logits, targets, first, real)


def shard_gradient(
    logits: Tensor, targets: Tensor, first: int, real: int, log_sum_exp: Tensor, factor: Tensor
) -> Tensor:
    """d (factor * sum of losses) / d logits [N, C], from the log_sum_exp [N] over all ranks.

    A fused operator writes it over the logits.
    """
    module = kernels.serving("cross_entropy", logits.dtype)
    if module is None:
        return composite.cross_entropy_backward(logits, targets, first, real, log_sum_exp, factor)
    return module.cross_entropy_backward(logits, targets, first, real, log_sum_exp, factor.reshape(1))


def _turned(x: Tensor) -> Tensor:
    """[B, H, S, D] <-> [B, S, H, D], a view."""
    return ops.transpose(x, (0, 2, 1, 3))


def _wide(x: Tensor) -> Tensor:
    """Blocks are computed, and merged, in float32 or wider."""
    return x if x.dtype in (ms.float32, ms.float64) else ops.cast(x, ms.float32)


def _placed(ranges: np.ndarray, num_keys: int) -> Keys:
    """With the kind that lets an operator use a mode of its own."""
    kind, S = "ranges", ranges.shape[1]
    if not ranges[..., 0].any():
        if (ranges[..., 1] == num_keys).all():
            kind = "full"
        elif num_keys >= S and (ranges[..., 1] == np.arange(num_keys - S, num_keys) + 1).all():
            kind = "causal"
    keys = kernels.keys_on_device(KeyRanges(ranges, num_keys, kind))
    assert keys is not None  # callers have asked whether a fused operator serves
    return keys


def _parts(q: Tensor, k: Tensor, hidden: Parts | None) -> Parts | None:
    """Parts where a fused operator serves, else the mask of a composite one, which serves float64 too."""
    if isinstance(hidden, Tensor):
        return hidden
    if q.dtype == ms.float64:
        return None if hidden is None else ops.concat([keys.as_mask() for _, keys in hidden], -1)
    if hidden is not None or kernels.serving("attention") is None:
        return hidden
    S, T = q.shape[2], k.shape[2]
    return [(slice(0, T), _placed(np.tile(np.array([0, T], np.int32), (1, S, 1)), T))]
