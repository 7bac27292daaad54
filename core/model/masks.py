"""Growth masks as arrays: channels, heads and neurons of a model that grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from telechat_twins.core.model.growth_mask import new_channels, new_heads

if TYPE_CHECKING:  # which holds a GrowthMask itself
    from telechat_twins.core.model.config import ModelConfig

# float16 holds it, and exp of it is 0 beside any logit within 5e4.
PADDING_LOGIT = -6.0e4


def masks(
    config: ModelConfig, c: float | None, columns: tuple[slice, slice]
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Masks over channels [E], and over the part of heads [H * D] and of neurons [F] that a rank holds (``columns``);
    float64, None where nothing of the whole axis is new. All None without ``config.growth`` or for c None."""
    growth = config.growth
    if growth is None or c is None:
        return None, None, None
    heads = np.repeat(new_heads(growth, config.num_heads, config.num_kv_heads), config.head_dim)
    return (
        _values(new_channels(config.hidden_size, growth.hidden_size), c),
        _values(heads, c, columns[0]),
        _values(new_channels(config.ffn_hidden_size, growth.ffn_hidden_size), c, columns[1]),
    )


def _values(new: np.ndarray, c: float, part: slice = slice(None)) -> np.ndarray | None:
    return np.where(new, c, 1.0)[part] if new.any() else None


def padding_bias(config: ModelConfig, first: int, rows: int) -> np.ndarray | None:
    """What takes the rows first .. first + rows - 1 of the vocabulary out of every softmax where they stand for no
    token: float64 [rows] to be added to logits, or None for a vocabulary without such rows."""
    if config.num_tokens == config.vocab_size:
        return None
    return np.where(first + np.arange(rows) < config.num_tokens, 0.0, PADDING_LOGIT)


def describe(config: ModelConfig) -> str:
    """What is growing in a model with ``growth``, for people: ``hidden 64 -> 96, 2 new blocks, at c = 0.25``."""
    mask = config.growth
    assert mask is not None
    pairs: Sequence[tuple[str, int, int]] = (
        ("hidden", mask.hidden_size, config.hidden_size),
        ("ffn", mask.ffn_hidden_size, config.ffn_hidden_size),
        ("heads", mask.num_heads, config.num_heads),
        ("kv heads", mask.num_kv_heads, config.num_kv_heads),
    )
    parts = [f"{name} {a} -> {b}" for name, a, b in pairs if a != b]
    if mask.new_layers:
        parts.append(f"{len(mask.new_layers)} new block{'s' if len(mask.new_layers) > 1 else ''}")
    return f"{', '.join(parts)}, at c = {mask.mask:g}"
