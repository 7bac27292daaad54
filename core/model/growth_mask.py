"""Growth masks of a model: the parts that are new, and their current weight.

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

from dataclasses import dataclass
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError
from telechat_twins.core.schema import option

if TYPE_CHECKING:  # every command reads a model's config, few of them count with arrays, whose import takes as long
    import numpy as np


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
    import numpy as np

    return np.arange(size) >= old


def head_map(old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Which old head each new one continues, int [H]; -1: none. ``old`` and ``new`` are (heads, kv heads).

    Head i reads kv head i // (heads / kv heads), so an old head must stay with its keys (facts: appending query heads
    to grouped ones regroups them all). Old heads come first in their group, and old groups first; a group that becomes
    smaller is cut into neighbouring groups with copies of its keys. UserError when the old groups have no place.
    """
    import numpy as np

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
    import numpy as np

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
