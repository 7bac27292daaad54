"""Paged cache over a ring of ranks: placement of pages, assignment of tokens, and visible keys on each rank.

An engine counts the pages of the whole ring. Page g > 0 lies on rank (g - 1) % R as its page (g - 1) // R + 1; every
rank has a blank page 0 of its own. A token is computed by the rank that has the page of its slot, so keys and values
stay where they are made. Queries go round (pass-Q of arXiv 2411.01783: while a prompt is read in pieces the past is
longer than a piece), and of a sequence's keys on one rank a query sees the first few, for these are in order.

N tokens of a step, n of the rank with the most of them, R ranks, B rows of queries, S queries of a row, T keys.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from telechat_twins.core.inference.runner import Step


class RingBlock(NamedTuple):
    """Queries [first, last), B * S of them, and where the keys of a rank lie that they meet: ``slots`` int32 [B, T],
    blank ones at the end; query i of row b sees keys [ranges[b, i, 0], ranges[b, i, 1]), none for some."""

    first: int
    last: int
    slots: np.ndarray
    ranges: np.ndarray


@dataclass(frozen=True)
class RankStep:
    """What one rank does in a step. Every rank has as many tokens, filled up by padding whose results are dropped.

    ``ids``, ``positions``, ``scaling_lengths`` int32 [n]. ``slots`` [m]: where keys and values of the first m tokens
    go, those that are this rank's. ``wanted`` [w]: tokens among the n, filled up likewise; of the R * w rows that come
    together from all ranks, ``order`` [W] are those that the step wanted. ``hops``: at hop h the queries of rank - h
    are here, and meet these parts of the keys.
    """

    ids: np.ndarray
    positions: np.ndarray
    scaling_lengths: np.ndarray
    slots: np.ndarray
    wanted: np.ndarray
    order: np.ndarray
    hops: list[list[RingBlock]]

    @property
    def wants_all(self) -> bool:
        """As Step has it."""
        return np.array_equal(self.wanted, np.arange(len(self.ids)))


def pages_of_rank(num_pages: int, ranks: int) -> int:
    """Pages that each rank keeps of ``num_pages`` (core.inference.pages.PagePool), its blank one included."""
    return -(-(num_pages - 1) // ranks) + 1


def rank_step(step: Step, ranks: int, rank: int, page_size: int) -> RankStep:
    """The part of ``rank`` in a step of a ring of ``ranks``; every rank cuts the same step."""
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
    )


def _keys(step: Step, row: int, ranks: int, rank: int, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and slots, int32 [T] each, of what ``rank`` has of a sequence's keys."""
    length, inside = int(step.lengths[row]), np.arange(page_size, dtype=np.int32)
    pages = step.tables[row, : -(-length // page_size)] - 1
    held = np.flatnonzero(pages % ranks == rank).astype(np.int32)
    positions = (held[:, None] * np.int32(page_size) + inside).reshape(-1)
    slots = ((pages[held] // ranks + 1)[:, None] * np.int32(page_size) + inside).reshape(-1)
    there = positions < length
    return positions[there], slots[there].astype(np.int32)


def _parts(step: Step, tokens: np.ndarray, keys: list[tuple[np.ndarray, np.ndarray]]) -> list[RingBlock]:
    """How the queries of ``tokens`` meet ``keys``: those of sequences with a single one together, if there are any, and
    the others sequence by sequence. What meets no key at all is in no part."""
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
