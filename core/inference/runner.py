"""Interface between engine and backend: one forward pass over the new tokens of several sequences.

Shapes: N tokens, R sequences, M pages of the longest sequence, W tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from telechat_twins.core.model.config import ModelConfig


@dataclass(frozen=True)
class Step:
    """Input of a forward pass: the new tokens of all sequences, one sequence after another; all arrays int32.

    ``ids``, ``positions`` [N]. ``scaling_lengths`` [N]: the length that decides a token's rotary scaling. ``slots``
    [N]: where its keys and values are stored, page * page_size + offset. ``starts`` [R + 1]: sequence r has the tokens
    starts[r] .. starts[r + 1] - 1; sequences with a single token come first. ``lengths`` [R]: number of keys of a
    sequence, the new ones included. ``tables`` [R, M]: its pages, padded with the blank page. ``wanted`` [W]: indices
    of the tokens whose logits are wanted, at least one. ``adapters`` [R]: number of a sequence's adapter, 0 for none.
    """

    ids: np.ndarray
    positions: np.ndarray
    scaling_lengths: np.ndarray
    slots: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    tables: np.ndarray
    wanted: np.ndarray
    adapters: np.ndarray

    @property
    def owners(self) -> np.ndarray:
        """The adapter of each token, [N]."""
        return np.repeat(self.adapters, np.diff(self.starts))

    @property
    def wants_all(self) -> bool:
        """Whether the logits of every token are wanted, as when each sequence has one token."""
        return len(self.wanted) == len(self.ids)

    @cached_property
    def singles(self) -> int:
        """Number of sequences with a single token; they come first."""
        counts = np.diff(self.starts)
        return int(np.argmax(counts != 1)) if (counts != 1).any() else len(counts)


class Runner(Protocol):
    """A model with its weights and the pages of keys and values of all layers; a backend's ``generate.Runner``."""

    config: ModelConfig
    num_pages: int
    page_size: int

    def run(self, step: Step) -> np.ndarray:
        """Store keys and values of the new tokens. Returns the logits [W, V] float32 of the wanted ones."""


def sequence_groups(step: Step) -> list[np.ndarray]:
    """Sequences whose attention over gathered keys is one call, as indices [r]: those with a single token in groups of
    similar length, and each of the others alone.

    In a group every length is more than half of the longest, so that keys padded to the longest are at most twice the
    sum of the lengths: one long sequence does not multiply the cost of all the others.
    """
    groups: list[np.ndarray] = []
    longest_first = np.argsort(-step.lengths[: step.singles], kind="stable")
    while len(longest_first):
        lengths = step.lengths[longest_first]
        similar = max(1, np.count_nonzero(2 * lengths > lengths[0]))
        groups.append(np.sort(longest_first[:similar]))
        longest_first = longest_first[similar:]
    return [*groups, *(np.array([r]) for r in range(step.singles, len(step.lengths)))]


def single_order(step: Step, groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """The permutation of the tokens [N] int32 that puts those of each group of ``sequence_groups`` together, and its
    inverse; None if they are together already. Only sequences with a single token move."""
    order = np.arange(len(step.ids), dtype=np.int32)
    order[: step.singles] = np.concatenate([order[:0], *(group for group in groups if group[0] < step.singles)])
    if (np.diff(order) == 1).all():
        return None
    return order, np.argsort(order).astype(np.int32)


def key_slots(tables: np.ndarray, lengths: np.ndarray, page_size: int) -> np.ndarray:
    """Slots of the keys of R sequences, int32 [R, T], T keys in the longest; past a sequence's end, slot 0 of the blank
    page, whose contents are zeros."""
    places = np.arange(max(int(lengths.max()), 1), dtype=np.int32)
    slots = tables[:, places // page_size] * np.int32(page_size) + places % page_size
    return np.where(places < lengths[:, None], slots, np.int32(0))
