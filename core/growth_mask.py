"""The masks of a model that is growing: which parts are new, and how far they count.

Masked structural growth (Yao et al., arXiv 2305.02869): a larger model starts as exactly the smaller one, because what
is new is multiplied by c = 0, and c then rises to 1 over ``anneal_steps`` steps. What is multiplied:

    channels of the stream   norms weight their statistics with the mask and multiply their output by it
    heads                    the output of a head, before the attention's output matrix
    ffn neurons              what enters the down matrix
    blocks                   h becomes c * block(h) + (1 - c) * h

The published code masks q, k and v of new heads and the input of new neurons. With grouped queries a new head may share
the keys and values of an old one, so that only its output can be masked; and a mask on the columns of the output and
down matrices is the same thing at c = 0 and 1, and one rule. At c = 1 nothing of this is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from core.errors import UserError
from core.schema import option

if TYPE_CHECKING:  # which holds a GrowthMask itself
    from core.config import ModelConfig

# float16 holds it, and exp of it is 0 beside any logit within 5e4.
PADDING_LOGIT = -6.0e4


@dataclass(frozen=True, kw_only=True)
class GrowthMask:
    """State of a model between two sizes: the sizes it had, and the mask c."""

    mask: float = option(help="c, how far what is new counts", min=0.0, max=1.0)
    start_step: int = option(0, help="training step at which c was 0", min=0)
    anneal_steps: int = option(help="steps until c is 1", min=1)
    hidden_size: int = option(help="channels that were there; they come first", min=1)
    ffn_hidden_size: int = option(help="ffn neurons that were there; they come first", min=1)
    num_heads: int = option(help="heads that were there", min=1)
    num_kv_heads: int = option(help="kv heads that were there", min=1)
    new_layers: tuple[int, ...] = option((), help="blocks that are new", min=0)

    def at_step(self, step: int) -> float | None:
        """The mask at a training step; None when it has done its work."""
        c = (step - self.start_step) / self.anneal_steps
        return None if c >= 1.0 else max(c, 0.0)


def new_channels(size: int, old: int) -> np.ndarray:
    """bool [size]: which entries of an axis are new when the old ones come first."""
    return np.arange(size) >= old


def head_map(old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Which old head each new one continues, int [H]; -1: none. ``old`` and ``new`` are (heads, kv heads).

    Head i reads kv head i // (heads / kv heads), so an old head must stay with its keys (facts: appending query heads
    to grouped ones regroups them all). Old heads come first in their group, and old groups first; a group that becomes
    smaller is cut into neighbouring groups with copies of its keys. UserError when the old groups have no place.
    """
    groups, kv = kv_map(old, new), new[1]
    before, after = old[0] // old[1], new[0] // kv
    heads = np.full((kv, after), -1)
    cut = max(1, before // after)
    for group, source in enumerate(groups):
        if source >= 0:
            first = group % cut * after
            count = min(after, before - first)
            heads[group, :count] = source * before + first + np.arange(count)
    return heads.reshape(-1)


def kv_map(old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Which old kv head each new one continues, int [K]; -1: none; one old head may have several copies."""
    if new[0] % new[1]:
        raise UserError(f"num_kv_heads: {new[1]} does not divide num_heads {new[0]}")
    before, after = old[0] // old[1], new[0] // new[1]
    if before > after and before % after:
        raise UserError(
            f"num_heads {new[0]} with num_kv_heads {new[1]}: groups of {after} heads cannot hold the groups of "
            f"{before} that the model has (num_heads {old[0]}, num_kv_heads {old[1]}); keep {before} heads a group, "
            f"more, or a divisor of {before}"
        )
    copies = max(1, before // after)
    if old[1] * copies > new[1]:
        raise UserError(
            f"num_kv_heads {new[1]}: groups of {after} heads need {old[1] * copies} kv heads to keep the model's "
            f"{old[1]} groups of {before} (num_heads {old[0]}); give num_kv_heads {old[1] * copies} or more, or larger "
            "groups"
        )
    groups = np.full(new[1], -1)
    groups[: old[1] * copies] = np.arange(old[1] * copies) // copies
    return groups


def new_heads(mask: GrowthMask, num_heads: int, num_kv_heads: int) -> np.ndarray:
    """bool [H]: which heads are new."""
    return head_map((mask.num_heads, mask.num_kv_heads), (num_heads, num_kv_heads)) < 0


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
