"""Which key positions a query position may see, as small additive or boolean blocks.

The full S x S mask is never made: queries come in blocks, and a block needs only the keys up to its last row, which
also halves the work of causal attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Block(NamedTuple):
    """Queries [first, last) against keys [0, keys). ``visible`` is bool [B or 1, last - first, keys], None when all
    keys are visible."""

    first: int
    last: int
    keys: int
    visible: np.ndarray | None


def causal_blocks(
    num_queries: int, num_keys: int, doc_ids: np.ndarray | None = None, block: int = 1024
) -> Iterator[Block]:
    """Causal visibility of the last ``num_queries`` of ``num_keys`` positions, split into blocks of queries.

    With ``doc_ids`` [B, num_keys] attention stays inside one document.
    """
    offset = num_keys - num_queries
    for first in range(0, num_queries, block):
        last = min(first + block, num_queries)
        keys = offset + last
        rows = np.arange(offset + first, offset + last)
        if last - first == 1 and doc_ids is None:
            yield Block(first, last, keys, None)
            continue
        visible = (np.arange(keys)[None, :] <= rows[:, None])[None]  # [1, q, keys]
        if doc_ids is not None:
            visible = visible & (doc_ids[:, rows][:, :, None] == doc_ids[:, None, :keys])
        yield Block(first, last, keys, visible)
