"""Operators of the decoder in MindSpore; kernels/mindspore/ops.py selects their implementations.

Shapes: B batch, S queries, T keys, H heads, K kv heads, D head dim, E hidden, N rows, C columns of a vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from telechat_twins.core.inference.runner import Step
from telechat_twins.core.model.recomputed import Recomputed
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
from telechat_twins.kernels.mindspore.adapters import Adapted, adapted_linears
from telechat_twins.kernels.mindspore.composite import accurate, add_bias, operand, total, wide
from telechat_twins.kernels.mindspore.head_loss import Head, head_loss
from telechat_twins.kernels.mindspore.head_loss import serves as serves_head
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
    loss_logits,
    rms_norm,
    rope_qk,
    shared,
    swiglu,
)
from telechat_twins.kernels.mindspore.paged import Pages, page_dtype, paged_attention, rows_at, short_page, store_rows
from telechat_twins.kernels.reference import visible_keys

__all__ = [
    "Adapted",
    "Head",
    "Pages",
    "accurate",
    "adapted_linears",
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
    "head_loss",
    "gelu",
    "hidden_keys",
    "key_parts",
    "key_ranges",
    "layer_norm",
    "linear",
    "linears",
    "loss_logits",
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
    "serves_head",
    "shard_gradient",
    "shard_statistics",
    "shared",
    "short_page",
    "store_rows",
    "swiglu",
    "total",
    "wide",
]

Visible: TypeAlias = Keys | list[Block]  # visible keys, in the form of the selected attention
# Visible keys of a block: for each part its slice of the keys and the key ranges within it; or an additive mask.
Parts: TypeAlias = "list[tuple[slice, Keys]] | Tensor"


class _ServedAdapters(Protocol):
    """Adapters of generation beside a linear layer."""

    def added(self, out: Tensor, x: Tensor) -> Tensor: ...


Again: TypeAlias = Callable[[], Tensor]  # computes a tensor a second time, without gradients


class LinearLayer(Protocol):
    """A layer x @ weight^T + bias that computes in the dtype ``compute``, and its adapter, if any, of ``dropped``."""

    weight: Tensor | Int8
    bias: Tensor | None
    compute: ms.Type
    served: _ServedAdapters | None

    def adapted(self, bias: Tensor | None) -> Adapted | None: ...

    def __call__(self, x: Tensor, dropped: Tensor | None = None, again: Again | None = None) -> Tensor: ...


def attention_blocks(num_queries: int, num_keys: int, doc_ids: np.ndarray | None) -> Visible:
    """Causal visibility inside documents in the form that ``attention`` takes; made once per forward pass."""
    keys = kernels.keys_on_device(causal_ranges(num_queries, num_keys, doc_ids))
    return _masked(causal_blocks(num_queries, num_keys, doc_ids)) if keys is None else keys


def place_pages(step: Step, page_size: int, dtype: ms.Type) -> Pages:
    """Addressing of one generation step for ``paged_attention``, with keys and values in ``dtype``."""
    return mindspore_paged.place(step, page_size, dtype)


def place_rows(slots: np.ndarray, page_size: int, dtype: ms.Type) -> mindspore_paged.Rows:
    """Slots int32 [N] = page * page_size + place, in the form of ``store_rows`` for rows in ``dtype``."""
    return mindspore_paged.place_rows(slots, page_size, dtype)


def linears(x: Tensor, dropped: Tensor | None, *layers: LinearLayer, again: Again | None = None) -> tuple[Tensor, ...]:
    """Outputs of several linear layers for the same x; for few rows one fused call where available.

    ``dropped``: the input of their adapters; None: x itself. ``again`` computes x a second time, so that no backward
    pass need keep it.
    """
    adapted = [layer.adapted(layer.bias) for layer in layers]
    together = [one for one in adapted if one is not None]
    if again is not None:
        again = Recomputed(again, len(layers) - len(together) + bool(together))
    if together:
        trained = iter(adapted_linears(x, dropped, together, layers[0].compute, again))
        return tuple(
            layer(x, None, again) if one is None else next(trained) for layer, one in zip(layers, adapted, strict=True)
        )
    found = kernels.few_rows(x, [(layer.weight, layer.bias) for layer in layers], layers[0].compute)
    if found is None:
        reads = shared(x, len(layers))
        return tuple(layer(read, None, again) for layer, read in zip(layers, reads, strict=True))
    return tuple(
        out if layer.served is None else layer.served.added(out, x) for out, layer in zip(found, layers, strict=True)
    )


def positions(x: Tensor, wanted: Tensor) -> Tensor:
    """Rows ``wanted`` int32 [W] of x [1, S, E]: [1, W, E]."""
    return kernels.embedding(x[0], wanted)[None]


def masked_blocks(blocks: Iterable[Block], num_queries: int, num_keys: int) -> Visible:
    """Blocks of core.model.visibility that cover ``num_queries``, in the form that ``attention`` takes."""
    parts = list(blocks)
    keys = kernels.keys_on_device(block_ranges(parts, num_queries, num_keys))
    return _masked(parts) if keys is None else keys


def _masked(blocks: Iterable[Block]) -> list[Block]:
    """The blocks with additive float32 masks [B or 1, 1, 1, queries, keys]."""
    return [
        block._replace(visible=None if block.visible is None else composite.hidden_keys(block.visible))
        for block in blocks
    ]


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Softmax attention, scale 1/sqrt(D), softmax in float32 or wider.

    q [B, S, H, D], k and v [B, T, K, D] -> [B, S, H, D]. Query heads j*H/K .. (j+1)*H/K - 1 share kv head j; keys and
    values are not repeated.
    """
    if not isinstance(visible, Keys):
        return composite.attention(q, k, v, visible)
    if q.dtype == ms.float64:
        return composite.attention(q, k, v, [Block(0, q.shape[1], k.shape[1], visible.as_mask())])
    return kernels.attention(q, k, v, visible)


def hidden_keys(visible: np.ndarray) -> Parts:
    """A mask bool [B or 1, S, T] in the form that ``attention_block`` takes; made once per forward pass.

    The visible keys of a query are contiguous, or contiguous in each half of the keys (the diagonal block of a ring
    whose documents are split in zigzag order). Raises ValueError for any other mask.
    """
    if kernels.serving("attention") is None:
        return composite.hidden_keys(visible)
    num_keys = visible.shape[-1]
    try:
        parts = [(slice(0, num_keys), mask_ranges(visible))]
    except ValueError:
        halves = slice(0, num_keys // 2), slice(num_keys // 2, num_keys)
        parts = [(half, mask_ranges(visible[..., half])) for half in halves]
    return key_parts(parts)


def key_ranges(ranges: np.ndarray, num_keys: int) -> Parts:
    """Key ranges int32 [B, S, 2] (core.model.visibility.KeyRanges) in the form that ``attention_block`` takes."""
    return key_parts([(slice(0, num_keys), ranges)])


def key_parts(parts: Sequence[tuple[slice, np.ndarray]]) -> Parts:
    """Key ranges [B, S, 2] of parts of the keys (core.parallel.sequence.ranges_between) in the form that
    ``attention_block`` takes."""
    if kernels.serving("attention") is None:
        return composite.hidden_keys(
            np.concatenate([visible_keys(ranges, keys.stop - keys.start) for keys, ranges in parts], -1)
        )
    return [(keys, _placed(ranges, keys.stop - keys.start)) for keys, ranges in parts]


def attention_block(q: Tensor, k: Tensor, v: Tensor, hidden: Parts | None) -> tuple[Tensor, Tensor]:
    """Partial attention over one block of keys, for ``merge_blocks``: out [B, H, S, D] and log_sum_exp [B, H, S, 1],
    both in float32 or wider.

    q [B, H, S, D], k and v [B, K, T, D]; ``hidden`` from ``hidden_keys``, or None when every query attends to every
    key. A query without visible keys gives zeros and -inf (composite: about -1e30), which have weight 0 when merged.
    """
    parts = _parts(q, k, hidden)
    if parts is None or isinstance(parts, Tensor):
        q, k, v = map(wide, (q, k, v))
        return composite.attention_block(q, k, v, parts)
    out = log_sum_exp = None
    for rows, keys in parts:
        # Fused operators take [B, S, H, D] and return log_sum_exp [B, H, S].
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
    """dq, dk, dv of one block, from the *final* log_sum_exp [B, H, S, 1] and ``delta`` = sum(out * grad_out) over D.

    With P = exp(scores - log_sum_exp), the block's part of the whole softmax: dV = P^T dO, dS = P * (dO V^T - delta),
    dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D) (FlashAttention, arXiv 2205.14135, appendix B). ``out``, the final
    output [B, H, S, D], is read only by an operator that computes delta itself (CANN's).
    """
    parts = _parts(q, k, hidden)
    if parts is None or isinstance(parts, Tensor):
        q, k, v, grad_out = map(wide, (q, k, v, grad_out))
        return composite.attention_block_backward(q, k, v, parts, log_sum_exp, grad_out, delta)
    statistics, dq, pieces = q.shape[:3], None, []
    # Parts are disjoint slices of the keys: dq is their sum, dk and dv are their concatenation.
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
    """Statistics of a vocabulary shard, logits [N, C] of the columns [first, first + C): (log_sum_exp over the ``real``
    first columns, the target's logit, 0 where another rank has it or it is IGNORE), both [N].

    Over ranks, log_sum_exp = log(sum(exp(log_sum_exp of each rank))) and the target's logit is the sum: the token loss
    is their difference.
    """
    module = kernels.serving("cross_entropy", logits.dtype)
    serve = composite.cross_entropy_forward if module is None else module.cross_entropy_forward
    return serve(logits, targets, first, real)


def shard_gradient(
    logits: Tensor, targets: Tensor, first: int, real: int, log_sum_exp: Tensor, factor: Tensor
) -> Tensor:
    """d (factor * sum of losses) / d logits [N, C] of a shard, from the log_sum_exp [N] over all ranks.

    A fused operator overwrites the logits with it.
    """
    module = kernels.serving("cross_entropy", logits.dtype)
    if module is None:
        return composite.cross_entropy_backward(logits, targets, first, real, log_sum_exp, factor)
    return module.cross_entropy_backward(logits, targets, first, real, log_sum_exp, factor.reshape(1))


def _turned(x: Tensor) -> Tensor:
    """[B, H, S, D] <-> [B, S, H, D]."""
    return ops.transpose(x, (0, 2, 1, 3))


def _placed(ranges: np.ndarray, num_keys: int) -> Keys:
    """The ranges on the device, with the kind ("full", "causal") for which an operator has a mode without a mask."""
    kind, S = "ranges", ranges.shape[1]
    if not ranges[..., 0].any():
        if (ranges[..., 1] == num_keys).all():
            kind = "full"
        elif num_keys >= S and (ranges[..., 1] == np.arange(num_keys - S, num_keys) + 1).all():
            kind = "causal"
    keys = kernels.keys_on_device(KeyRanges(ranges, num_keys, kind))
    assert keys is not None  # callers take this path only with a fused operator
    return keys


def _parts(q: Tensor, k: Tensor, hidden: Parts | None) -> Parts | None:
    """``hidden`` for a fused operator, else the additive mask of the composite one, which also computes float64."""
    if isinstance(hidden, Tensor):
        return hidden
    if q.dtype == ms.float64:
        return None if hidden is None else ops.concat([keys.as_mask() for _, keys in hidden], -1)
    if hidden is not None or kernels.serving("attention") is None:
        return hidden
    S, T = q.shape[2], k.shape[2]
    return [(slice(0, T), _placed(np.tile(np.array([0, T], np.int32), (1, S, 1)), T))]
