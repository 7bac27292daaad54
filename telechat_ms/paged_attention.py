"""Attention whose keys and values are kept in pages, for generation."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor

from telechat_twins.telechat_ms import ops
from telechat_twins.telechat_ms.model import Decoder


def apply_paged_attention(stage: Decoder, num_pages: int, page_size: int) -> None:
    """Let every block of a stage keep its keys and values, each in ``num_pages`` pages of its own."""
    for block in stage.layers.values():
        heads = block.attn.k.weight.shape[0] // block.attn.head_dim
        shape = (num_pages, page_size, heads, block.attn.head_dim)
        block.attn.core = PagedAttention(shape, ops.page_dtype(stage.dtypes.compute))


class PagedAttention:
    """ops.attention of one step's tokens, q [1, N, H, D], k and v [1, N, K, D], and of all before them.

    Keys are kept rotated and scaled, in the compute dtype. The blank page is read and never written: zeros.
    """

    def __init__(self, shape: tuple[int, ...], dtype: ms.Type) -> None:
        self.k, self.v = (ms.mint.zeros(shape, dtype=dtype) for _ in "kv")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pages: ops.Pages) -> Tensor:
        return ops.paged_attention(q, k, v, self.k, self.v, pages)
