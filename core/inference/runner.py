"""Interface between engine and backend: one forward pass over the new tokens of several sequences.

N tokens, R sequences, M pages of the longest of them, W tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from telechat_twins.core.model.config import ModelConfig


@dataclass(frozen=True)
class Step:
    """The new tokens of all sequences, one sequence after another; everything int32.

    ``ids``, ``positions`` [N]. ``scaling_lengths`` [N]: the length that decides a token's rotary scaling. ``slots``
    [N]: where its keys and values go, page * page_size + place. ``starts`` [R + 1]: the tokens of sequence r are
    starts[r] .. starts[r + 1] - 1; those with a single one come first. ``lengths`` [R]: the keys of a sequence, its new
    ones included. ``tables`` [R, M]: its pages, filled up with the blank one. ``wanted`` [W], one at least: tokens
    among the N.
    """

    ids: np.ndarray
    positions: np.ndarray
    scaling_lengths: np.ndarray
    slots: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    tables: np.ndarray
    wanted: np.ndarray

    @property
    def wants_all(self) -> bool:
        """Whether ``wanted`` is every token, in order, as when all sequences have one."""
        return len(self.wanted) == len(self.ids)

    @cached_property
    def singles(self) -> int:
        """How many sequences, all at the beginning, have one token each."""
        counts = np.diff(self.starts)
        return int(np.argmax(counts != 1)) if (counts != 1).any() else len(counts)


class Runner(Protocol):
    """A model with its weights, and pages for keys and values of all layers: each backend's ``generate.Runner``."""

    config: ModelConfig
    num_pages: int
    page_size: int

    def run(self, step: Step) -> np.ndarray:
        """Store keys and values of the new tokens; logits [W, V] float32 of the wanted ones."""


def sequence_groups(step: Step) -> list[tuple[int, int]]:
    """Runs [first, last) of sequences whose attention can be taken together: those with a single token, if there are
    any, and each of the others alone."""
    singles = step.singles
    return [*([(0, singles)] if singles else []), *((r, r + 1) for r in range(singles, len(step.lengths)))]


def key_slots(tables: np.ndarray, lengths: np.ndarray, page_size: int) -> np.ndarray:
    """Where the keys of sequences lie, int32 [R, T] for the longest; places beyond a sequence's end are on the blank
    page, whose contents are zeros."""
    places = np.arange(max(int(lengths.max()), 1), dtype=np.int32)
    slots = tables[:, places // page_size] * np.int32(page_size) + places % page_size
    return np.where(places < lengths[:, None], slots, np.int32(0))
