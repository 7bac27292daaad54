"""Blocks of rows in which the loss of the head is computed, by both twins and by the planner."""

from __future__ import annotations


def head_blocks(rows: int, vocab_size: int, ffn_hidden_size: int, trained: bool = False) -> list[slice]:
    """Blocks of rows whose logits are computed together: about 2^21 numbers, or fewer where the last block's input of
    ``ffn.down``, [rows, ffn_hidden_size], was smaller, so that they fit where it was freed; and at least 128 rows, so
    that the head's matrix is not read and packed more often than its products hide. Twice as much of a ``trained``
    head, whose gradient is read and written once more for every block."""
    count = max(128, min(1 << 21, rows * ffn_hidden_size) // vocab_size) << trained
    return [slice(first, min(first + count, rows)) for first in range(0, rows, count)]


def trained_by_rows(rows: int, vocab_size: int, hidden_size: int, width: int) -> bool:
    """Whether the loss of a trained head is computed by blocks of ``rows`` on a CPU; ``width``: bytes of a logit.

    Logits below 64 MiB stay near the caches, where blocks save little. The head's gradient, [vocab_size, hidden_size],
    which blocks keep in float32 from the forward pass on, must not be larger than the logits that they spare.
    """
    return rows * vocab_size * width > 1 << 26 and rows * width >= hidden_size * 4
