"""Paged cache over a ring of ranks: placement of pages, assignment of tokens, and visible keys on each rank.

The engine numbers the pages of the whole ring. Page g > 0 lies on rank (g - 1) % R as that rank's page
(g - 1) // R + 1; every rank has a blank page 0 of its own. A token is computed on the rank that holds the page of its
slot, so keys and values are stored where they are computed, and the queries travel around the ring (pass-Q of arXiv
2411.01783: with chunked prompts the keys of the past are more than the queries of a chunk). A rank keeps the keys of a
sequence in order of position, so the keys that a query may see are a prefix of them.

Shapes: N tokens of a step, n tokens of the rank with the most, R ranks, B rows of queries, S queries a row, T keys.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from telechat_twins.core.inference.runner import Step


class RingBlock(NamedTuple):
    """Queries [first, last), B * S of them, with the keys of one rank that they attend to.

    ``slots`` int32 [B, T]: where the keys are stored, padded with the blank slot. Query i of row b sees keys
    [ranges[b, i, 0], ranges[b, i, 1]), which may be empty.
    """

    first: int
    last: int
    slots: np.ndarray
    ranges: np.ndarray


@dataclass(frozen=True)
class RankStep:
    """One rank's part of a step. Every rank has n tokens; shorter ones are padded, and the results of padding dropped.

    ``ids``, ``positions``, ``scaling_lengths`` int32 [n]. ``slots`` [m]: where the keys and values of the rank's m real
    tokens, the first of the n, are stored. ``wanted`` [w]: indices of tokens whose logits are wanted, padded likewise.
    ``order`` [W]: of the R * w rows of logits gathered from all ranks, the rows that the step wants. ``hops``: at hop h
    this rank has the queries of rank - h, and these blocks say which of its keys they see. ``owners`` int32 [n]: the
    adapter of each token.
    """

    ids: np.ndarray
    positions: np.ndarray
    scaling_lengths: np.ndarray
    slots: np.ndarray
    wanted: np.ndarray
    order: np.ndarray
    hops: list[list[RingBlock]]
    owners: np.ndarray

    @property
    def wants_all(self) -> bool:
        """Whether the logits of every token are wanted (Step.wants_all)."""
        return np.array_equal(self.wanted, np.arange(len(self.ids)))


def pages_of_rank(num_pages: int, ranks: int) -> int:
    """Pages on each rank when the ring has ``num_pages`` (core.inference.pages.PagePool), its blank page included."""
    return -(-(num_pages - 1) // ranks) + 1


def rank_step(step: Step, ranks: int, rank: int, page_size: int) -> RankStep:
    """The part of ``rank`` in a step on a ring of ``ranks``. All ranks derive their parts from the same step."""
    owner = (step.slots // page_size - 1) % ranks
    tokens = [np.flatnonzero(owner == r) for r in range(ranks)]
    most = max(map(len, tokens))
    mine = np.zeros(most, np.int64)
    mine[: len(tokens[rank])] = tokens[rank]
    page, place = np.divmod(step.slots[tokens[rank]], np.int32(page_size))

    wanted = [step.wanted[owner[step.wanted] == r] for r in range(ranks)]
    width = max(map(len, wanted))
    rows = np.zeros(width, np.int32)
    rows[: len(wanted[rank])] = np.searchsorted(tokens[rank], wanted[rank])
    order = np.empty(len(step.wanted), np.int64)
    for r in range(ranks):
        order[owner[step.wanted] == r] = r * width + np.arange(len(wanted[r]))

    keys = [_keys(step, row, ranks, rank, page_size) for row in range(len(step.lengths))]
    return RankStep(
        ids=step.ids[mine],
        positions=step.positions[mine],
        scaling_lengths=step.scaling_lengths[mine],
        slots=(((page - 1) // ranks + 1) * page_size + place).astype(np.int32),
        wanted=rows,
        order=order,
        hops=[_parts(step, tokens[(rank - hop) % ranks], keys) for hop in range(ranks)],
        owners=step.owners[mine],
    )


def _keys(step: Step, row: int, ranks: int, rank: int, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and slots, int32 [T] each, of a sequence's keys on ``rank``, in order of position."""
    length, inside = int(step.lengths[row]), np.arange(page_size, dtype=np.int32)
    pages = step.tables[row, : -(-length // page_size)] - 1
    held = np.flatnonzero(pages % ranks == rank).astype(np.int32)
    positions = (held[:, None] * np.int32(page_size) + inside).reshape(-1)
    slots = ((pages[held] // ranks + 1)[:, None] * np.int32(page_size) + inside).reshape(-1)
    there = positions < length
    return positions[there], slots[there].astype(np.int32)


def _parts(step: Step, tokens: np.ndarray, keys: list[tuple[np.ndarray, np.ndarray]]) -> list[RingBlock]:
    """Blocks of the queries of ``tokens`` against ``keys``: one for all sequences with a single token, and one for each
    other sequence. Queries that see no key at all are in no block."""
    rows = np.searchsorted(step.starts, tokens, side="right") - 1
    edges = [*np.flatnonzero(np.diff(rows, prepend=-1)).tolist(), len(tokens)]
    runs = list(itertools.pairwise(edges))  # one for each sequence
    singles = int(np.searchsorted(rows, step.singles))
    parts = []
    for group in (runs[:singles], *([run] for run in runs[singles:])):
        known = [keys[rows[first]] for first, _ in group]
        ends = [
            np.searchsorted(positions, step.positions[tokens[first:last]], side="right")
            for (first, last), (positions, _) in zip(group, known, strict=True)
        ]
        longest = max((int(end[-1]) for end in ends), default=0)
        if not longest:
            continue
        slots = np.zeros((len(group), longest), np.int32)
        for at, (_, found) in enumerate(known):
            slots[at, : len(found)] = found[:longest]
        ranges = np.zeros((*np.shape(ends), 2), np.int32)
        ranges[..., 1] = ends
        parts.append(RingBlock(group[0][0], group[-1][1], slots, ranges))
    return parts
