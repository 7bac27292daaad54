"""Operators of the decoder in PyTorch; kernels/pytorch/ops.py selects their implementations.

Shapes: B batch, S queries, T keys, H heads, K kv heads, D head dim, E hidden, N rows, C columns of a vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

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
from telechat_twins.kernels.pytorch import ops as kernels
from telechat_twins.kernels.pytorch import paged as torch_paged
from telechat_twins.kernels.pytorch.adapters import Adapted, adapted_linears
from telechat_twins.kernels.pytorch.head_loss import Head, head_loss
from telechat_twins.kernels.pytorch.head_loss import serves as serves_head
from telechat_twins.kernels.pytorch.ops import (
    add,
    add_bias,
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
from telechat_twins.kernels.pytorch.paged import Pages, page_dtype, paged_attention, rows_at, short_page, store_rows
from telechat_twins.kernels.pytorch.weights import Matrix, several

__all__ = [
    "Adapted",
    "Head",
    "Pages",
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
    "device",
    "embedding",
    "head_loss",
    "gelu",
    "hidden_keys",
    "key_parts",
    "key_ranges",
    "layer_norm",
    "linear",
    "linears",
    "masked_blocks",
    "merge_blocks",
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
    "short_page",
    "store_rows",
    "swiglu",
]

Visible: TypeAlias = KeyRanges | list[Block]  # visible keys, in the form of the selected attention
# Visible keys of a block: for each part its slice of the keys and the key ranges within it.
Parts: TypeAlias = list[tuple[slice, KeyRanges]]

Again: TypeAlias = Callable[[], Tensor]  # computes a tensor a second time, without gradients


class _ServedAdapters(Protocol):
    """Adapters of generation beside a linear layer."""

    def added(self, out: Tensor, x: Tensor) -> Tensor: ...


class LinearLayer(Protocol):
    """A layer x @ weight^T + bias that computes in the dtype ``compute``, and its adapter, if any, of ``dropped``."""

    weight: Matrix
    bias: Tensor | None
    compute: torch.dtype
    served: _ServedAdapters | None

    def adapted(self, bias: Tensor | None) -> Adapted | None: ...

    def __call__(self, x: Tensor, dropped: Tensor | None = None, again: Again | None = None) -> Tensor: ...


def device() -> torch.device:
    """Device of this process's models: the accelerator if there is one."""
    return torch.device(kernels.default_device())


def attention_blocks(num_queries: int, num_keys: int, doc_ids: np.ndarray | None) -> Visible:
    """Causal visibility inside documents in the form that ``attention`` takes; made once per forward pass.

    As blocks, a single one without a mask stands for causal attention of a whole sequence, a mode of PyTorch's
    operator.
    """
    if not kernels.takes_blocks():
        return kernels.place_ranges(causal_ranges(num_queries, num_keys, doc_ids), device())
    if doc_ids is None and num_queries == num_keys:
        return [Block(0, num_queries, num_keys, None)]
    return masked_blocks(causal_blocks(num_queries, num_keys, doc_ids), num_queries, num_keys)


def place_pages(step: Step, page_size: int, dtype: torch.dtype) -> Pages:
    """Addressing of one generation step for ``paged_attention``, with keys and values in ``dtype``."""
    return torch_paged.place(step, page_size, dtype, device())


def place_rows(slots: np.ndarray, page_size: int, dtype: torch.dtype) -> Tensor:
    """Slots int32 [N] = page * page_size + place, in the form of ``store_rows`` for rows in ``dtype``."""
    return torch_paged.place_rows(slots, device())


def linears(x: Tensor, dropped: Tensor | None, *layers: LinearLayer, again: Again | None = None) -> tuple[Tensor, ...]:
    """Outputs of several linear layers for the same x; for few rows one fused call where available.

    ``dropped``: the input of their adapters; None: x itself. ``again`` computes x a second time, so that no backward
    pass need keep it.
    """
    adapted = [layer.adapted(layer.bias) for layer in layers]
    together = [one for one in adapted if one is not None]
    if not together and (few := several(x, [layer.weight for layer in layers], [layer.bias for layer in layers])):
        return tuple(
            out if layer.served is None else layer.served.added(out, x) for out, layer in zip(few, layers, strict=True)
        )
    if not together and layers[0].compute == x.dtype and all(layer.served is None for layer in layers):
        found = kernels.linears(x, [layer.weight for layer in layers], [layer.bias for layer in layers], again)
        if found is not None:
            return found
    if again is not None:
        again = Recomputed(again, len(layers) - len(together) + bool(together))
    trained = iter(adapted_linears(x, dropped, together, layers[0].compute, again) if together else ())
    return tuple(
        layer(x, None, again) if one is None else next(trained) for layer, one in zip(layers, adapted, strict=True)
    )


def positions(x: Tensor, wanted: Tensor) -> Tensor:
    """Rows ``wanted`` int32 [W] of x [1, S, E]: [1, W, E]."""
    return x.index_select(1, wanted)


def masked_blocks(blocks: Iterable[Block], num_queries: int, num_keys: int) -> Visible:
    """Blocks of core.model.visibility that cover ``num_queries``, in the form that ``attention`` takes."""
    parts = list(blocks)
    if not kernels.takes_blocks():
        return kernels.place_ranges(block_ranges(parts, num_queries, num_keys), device())
    return [
        block._replace(visible=None if block.visible is None else torch.from_numpy(block.visible).to(device())[:, None])
        for block in parts
    ]


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Softmax attention, scale 1/sqrt(D), softmax in float32 or wider.

    q [B, S, H, D], k and v [B, T, K, D] -> [B, S, H, D]. Query heads j*H/K .. (j+1)*H/K - 1 share kv head j.
    """
    return kernels.attention(q, k, v, visible)


def attention_block(q: Tensor, k: Tensor, v: Tensor, hidden: Parts | None) -> tuple[Tensor, Tensor]:
    """Partial attention over one block of keys, for ``merge_blocks``: out [B, H, S, D] and log_sum_exp [B, H, S, 1],
    both in float32 or wider.

    q [B, H, S, D], k and v [B, K, T, D]; ``hidden`` from ``hidden_keys``, or None when every query attends to every
    key. A query without visible keys gives zeros and -inf, which have weight 0 when merged.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = log_sum_exp = None
    for keys, ranges in _parts(q, k, hidden):
        more, more_lse = kernels.attention_block(q, k[:, keys], v[:, keys], ranges)
        if out is None:
            out, log_sum_exp = more, more_lse
        else:
            out, log_sum_exp = kernels.merge_blocks(out, log_sum_exp, more, more_lse)
    assert out is not None and log_sum_exp is not None  # at least one part
    return out.transpose(1, 2), log_sum_exp[..., None]


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
    q, k, v, grad_out = (x.transpose(1, 2) for x in (q, k, v, grad_out))
    out = None if out is None else out.transpose(1, 2)
    sums: tuple[Tensor, ...] = ()
    for keys, ranges in _parts(q, k, hidden):
        found = kernels.attention_block_backward(
            grad_out, q, k[:, keys], v[:, keys], ranges, out, log_sum_exp[..., 0], delta[..., 0]
        )
        if k.shape[1] != found[1].shape[1]:  # a part: its dk and dv [B, part, K, D] in their place among all keys
            whole = [torch.zeros(k.shape, dtype=d.dtype, device=d.device) for d in found[1:]]
            for target, d in zip(whole, found[1:], strict=True):
                target[:, keys] = d
            found = (found[0], *whole)
        sums = tuple(a + b for a, b in zip(sums, found, strict=True)) if sums else found
    return tuple(d.transpose(1, 2) for d in sums)  # type: ignore[return-value]


def merge_blocks(out: Tensor, log_sum_exp: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys from attention over each; [B, H, S, D] and [B, H, S, 1]."""
    merged, joint = kernels.merge_blocks(
        out.transpose(1, 2), log_sum_exp[..., 0], more.transpose(1, 2), more_lse[..., 0]
    )
    return merged.transpose(1, 2), joint[..., None]


def hidden_keys(visible: np.ndarray) -> Parts:
    """A mask bool [B or 1, S, T] in the form that ``attention_block`` takes; made once per forward pass.

    The visible keys of a query are contiguous, or contiguous in each half of the keys (the diagonal block of a ring
    whose documents are split in zigzag order). Raises ValueError for any other mask.
    """
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
    return [(keys, _placed(ranges, keys.stop - keys.start)) for keys, ranges in parts]


def shard_statistics(logits: Tensor, targets: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """Statistics of a vocabulary shard, logits [N, C] of the columns [first, first + C): (log_sum_exp over the ``real``
    first columns, the target's logit, 0 where another rank has it or it is IGNORE), both [N].

    Over ranks, log_sum_exp = log(sum(exp(log_sum_exp of each rank))) and the target's logit is the sum: the token loss
    is their difference.
    """
    return kernels.shard_statistics(logits, targets, first, real)


def shard_gradient(
    logits: Tensor, targets: Tensor, first: int, real: int, log_sum_exp: Tensor, factor: Tensor
) -> Tensor:
    """d (factor * sum of losses) / d logits [N, C] of a shard, from the log_sum_exp [N] over all ranks.

    A fused operator overwrites the logits with it.
    """
    return kernels.shard_gradient(logits, targets, first, real, log_sum_exp, factor)


def _placed(ranges: np.ndarray, num_keys: int) -> KeyRanges:
    """The ranges on the device, with the kind ("full", "causal") for which an operator has a mode without a mask."""
    kind = "ranges"
    if not ranges[..., 0].any():
        S = ranges.shape[1]
        if (ranges[..., 1] == num_keys).all():
            kind = "full"
        elif num_keys >= S and (ranges[..., 1] == np.arange(num_keys - S, num_keys) + 1).all():
            kind = "causal"
    return kernels.place_ranges(KeyRanges(ranges, num_keys, kind), device())


def _parts(q: Tensor, k: Tensor, hidden: Parts | None) -> Parts:
    """``hidden``, or the range of all keys for every query; q [B, S, H, D], k [B, T, K, D]."""
    if hidden is not None:
        return hidden
    return [
        (slice(0, k.shape[1]), _placed(np.tile(np.array([0, k.shape[1]], np.int32), (1, q.shape[1], 1)), k.shape[1]))
    ]
