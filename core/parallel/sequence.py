"""Context-parallel split of a sequence, and the keys that are visible to each rank's queries.

A row of S tokens is padded to S_pad, and its places (token positions in the padded row) are divided among the ring's R
ranks, n = S_pad / R each. Zigzag: the row is cut into 2R equal chunks and rank r takes chunks r and 2R-1-r. With R = 2:

    chunk   0   1   2   3
    rank    0   1   1   0

Cut into R contiguous pieces, the last rank would have almost all of the causal work. In zigzag order a rank's early
chunk, with few visible keys, is paired with a late one, with many, so all ranks have equal work. Moreover, after the
first step of the ring (a rank's own keys: the causal triangle) every step is a full rectangle without a mask: keys of a
rank before are visible in their first half to all queries, keys of a rank after are visible as a whole to the second
half of the queries (``visible_part``).

A ring rank's n places are cut once more into ``ulysses`` equal pieces. Ulysses' all-to-all gathers the n places before
attention, so masks concern ring ranks only. Labels are shifted before the split (core.model.batch), so no rank needs a
token of another rank for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.model.lora_dropout import LoraDropout
from telechat_twins.core.model.visibility import Block, causal_ranges
from telechat_twins.core.parallel.layout import Layout, sequence_multiple


@dataclass(frozen=True, eq=False)
class Visibility:
    """Data for attention masks between ring ranks (n = S_pad / R places each, Ulysses gathered).

    ``method``: how queries reach the keys of other ring ranks. "plain": there is one ring rank; "ring": key/value
    blocks travel around the ring, with the masks of ``mask_between``; "allgather": keys are gathered and sorted
    (``gather_order``), with the masks of ``query_blocks``.
    index [R, B or 1, n] int32: place in the padded row of each token of each ring rank. doc_ids [R, B, n] int32: the
    document at those places, or None when documents are not isolated.
    """

    method: str
    index: np.ndarray
    doc_ids: np.ndarray | None = None

    @property
    def ring(self) -> int:
        return self.index.shape[0]

    @property
    def length(self) -> int:
        """n, the places of a ring rank."""
        return self.index.shape[2]


@dataclass(frozen=True, eq=False)
class LocalBatch:
    """What one context-parallel rank holds of a batch, s = S_pad / cp places.

    input_ids, targets, positions [B, s] int32 (padding: id 0, target IGNORE, positions counting on). ``seq_len`` is the
    true S of the whole row: it decides the rotary scaling. index [B or 1, s] int32: place in the padded row. weights
    [B, s] float32 (padding: 0) and reference [B] float64 as in Batch. dropout: masks of the adapters' inputs at these
    places, or None.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    visibility: Visibility
    seq_len: int
    index: np.ndarray
    weights: np.ndarray | None = None
    reference: np.ndarray | None = None
    dropout: LoraDropout | None = None


def split_batch(batch: Batch, layout: Layout, cp_rank: int) -> LocalBatch:
    """The part of ``batch`` [B, S] for context-parallel rank ``cp_rank`` = r * ulysses + u.

    Isolated documents: if every document of every row, the padding at the end included, has a length divisible by 2R,
    each document is split in zigzag order by itself, and a rank's first chunks of all documents come before its second
    ones. Otherwise the row is split as a whole and the method is "allgather".
    """
    r, u = divmod(cp_rank, layout.ulysses)
    seq_len = batch.input_ids.shape[1]
    padded = pad_batch(batch, sequence_multiple(layout))
    method, index = choose_places(padded, layout.ring)
    doc_ids = None
    if padded.doc_ids is not None:
        doc_ids = np.stack([_take(padded.doc_ids, places) for places in index])
    piece = index.shape[2] // layout.ulysses
    own = np.ascontiguousarray(index[r][:, u * piece : (u + 1) * piece])
    return LocalBatch(
        input_ids=_take(padded.input_ids, own),
        targets=_take(padded.targets, own),
        positions=_take(padded.positions, own),
        visibility=Visibility(method, index, doc_ids),
        seq_len=seq_len,
        index=own,
        weights=None if padded.weights is None else _take(padded.weights, own),
        reference=padded.reference,
    )


def pad_batch(batch: Batch, multiple: int) -> Batch:
    """``batch`` with rows lengthened to a multiple: ids 0, targets IGNORE, weights 0, positions counting on, a document
    of its own when documents are isolated."""
    missing = -batch.input_ids.shape[1] % multiple
    if not missing:
        return batch

    def lengthen(values: np.ndarray, fill: np.ndarray | int) -> np.ndarray:
        tail = np.broadcast_to(np.asarray(fill, values.dtype), (len(values), missing))
        return np.concatenate([values, tail], axis=1, dtype=values.dtype)

    positions = batch.positions[:, -1:] + np.arange(1, missing + 1)
    doc_ids = None if batch.doc_ids is None else lengthen(batch.doc_ids, int(batch.doc_ids.max()) + 1)
    return Batch(
        lengthen(batch.input_ids, 0),
        lengthen(batch.targets, IGNORE),
        lengthen(batch.positions, positions),
        doc_ids,
        None if batch.weights is None else lengthen(batch.weights, 0),
        batch.reference,
    )


def choose_places(padded: Batch, ring: int) -> tuple[str, np.ndarray]:
    """Method, and index [R, B or 1, n] int32 of the places of each ring rank, in its local order."""
    length = padded.input_ids.shape[1]
    if ring == 1:
        return "plain", np.arange(length, dtype=np.int32)[None, None]
    if padded.doc_ids is None:
        return "ring", zigzag_places([length], ring)[:, None]
    # Isolated documents may be split one by one only if each has whole chunks for all ranks; the masks of "ring" rely
    # on the two halves of a rank's places being the first and the second chunks.
    rows = [_document_lengths(ids) for ids in padded.doc_ids]
    even = [lengths for lengths in rows if lengths and all(n % (2 * ring) == 0 for n in lengths)]
    if len(even) == len(rows):
        return "ring", np.stack([zigzag_places(lengths, ring) for lengths in even], axis=1)
    return "allgather", zigzag_places([length], ring)[:, None]


def zigzag_places(lengths: Sequence[int], ring: int) -> np.ndarray:
    """index [R, n] int32 for a row made of documents of ``lengths``, each a multiple of 2R: rank r holds chunk r of
    every document, then chunk 2R-1-r of every document. Within each half the places increase."""
    chunks: list[list[np.ndarray]] = [[] for _ in range(2 * ring)]
    start = 0
    for length in lengths:
        places = np.arange(start, start + length, dtype=np.int32).reshape(2 * ring, -1)
        for chunk, part in zip(chunks, places, strict=True):
            chunk.append(part)
        start += length
    whole = [np.concatenate(parts) for parts in chunks]
    return np.stack([np.concatenate([whole[r], whole[2 * ring - 1 - r]]) for r in range(ring)])


def visible_part(q_rank: int, k_rank: int, length: int) -> tuple[slice, slice]:
    """Slices of a rank's queries and of another rank's keys, ``length`` of each, outside of which nothing is visible.

    The same rank: all queries, all keys. Keys of a rank before: all queries, the FIRST half of the keys. Keys of a rank
    after: the SECOND half of the queries, all keys.
    """
    # Rank q has the chunks q and 2R-1-q, rank k the chunks k and 2R-1-k. For k < q: k < q and k < 2R-1-q, so chunk k is
    # before both of q's; 2R-1-k is after both, and hidden. For k > q: k and 2R-1-k lie between q and 2R-1-q, so q's
    # first chunk sees neither and its second chunk sees both.
    half = length // 2
    queries = slice(half if k_rank > q_rank else 0, length)
    return queries, slice(0, half if k_rank < q_rank else length)


KeyParts = list[tuple[slice, np.ndarray]]


def ranges_between(visibility: Visibility, q_rank: int, k_rank: int) -> KeyParts | None:
    """Keys that the queries of ``visible_part`` of one ring rank see of another's, for the methods "ring" and "plain".

    None: all of them. Else parts of the keys with the range int32 [B or 1, queries, 2] that each query sees of a part,
    counted in it: one part, or both halves of the keys where the documents are split in zigzag order. Every query sees
    at least one key. No array of queries x keys is made: of a million tokens in ranges of 8 bytes, not of a terabyte.
    """
    if visibility.method == "allgather":
        raise ValueError("gathered keys have no blocks between ranks; see query_blocks")
    if visibility.doc_ids is None:
        # Local order is row order.
        length = visibility.length
        return [(slice(0, length), causal_ranges(length, length).ranges)] if q_rank == k_rank else None
    queries, keys = visible_part(q_rank, k_rank, visibility.length)
    same, half = q_rank == k_rank, visibility.length // 2
    halves = [part for part in (slice(0, half), slice(half, visibility.length)) if part.start < keys.stop]
    found = [_document_ranges(visibility, (q_rank, queries), (k_rank, part), same) for part in halves]
    if len(found) == 1:
        return [(keys, found[0])]
    # One range of each query where what it sees of the halves meets in their middle.
    (first, last), (start, stop) = (np.moveaxis(ranges, -1, 0) for ranges in found)
    none, nothing = first == last, start == stop
    if not (none | nothing | ((last == half) & (start == 0))).all():
        return [(part, ranges) for part, ranges in zip(halves, found, strict=True)]
    begin = np.where(none, np.where(nothing, 0, half + start), first)
    return [(keys, np.stack((begin, np.where(nothing, last, half + stop)), -1))]


def _document_ranges(
    visibility: Visibility, query: tuple[int, slice], key: tuple[int, slice], same: bool
) -> np.ndarray:
    """int32 [B, queries, 2]: keys of each query's document in a half of a rank's keys, in which documents are runs and
    places rise; ``same``: those that are not after the query, of the same rank."""
    assert visibility.doc_ids is not None
    q_docs, k_docs = (visibility.doc_ids[rank][:, part] for rank, part in (query, key))
    q_places, k_places = (visibility.index[rank][:, part] for rank, part in (query, key))
    ranges = np.zeros((*q_docs.shape, 2), np.int32)
    for row, (wanted, held) in enumerate(zip(q_docs, k_docs, strict=True)):
        documents, first, count = np.unique(held, return_index=True, return_counts=True)
        if np.count_nonzero(np.diff(held)) + 1 != len(documents):
            raise ValueError("doc_ids: the keys of a document must follow each other in each half of a rank's")
        at = np.minimum(np.searchsorted(documents, wanted), len(documents) - 1)
        begin, end = first[at], first[at] + count[at]
        if same:
            places = k_places[row % len(k_places)]
            end = np.minimum(end, np.searchsorted(places, q_places[row % len(q_places)], side="right"))
        seen = (documents[at] == wanted) & (begin < end)
        ranges[row] = np.where(seen[:, None], np.stack((begin, end), -1), 0)
    return ranges


def gather_order(visibility: Visibility) -> list[tuple[int, int]]:
    """(start, length) of the slices that, concatenated, bring keys gathered in rank order into row order.

    Needs one index for all rows, as method "allgather" has; ValueError otherwise.
    """
    if visibility.index.shape[1] != 1:
        raise ValueError("all rows must be split alike to share one order; found rows with different splits")
    order = np.argsort(visibility.index.reshape(-1))
    return [(int(run[0]), len(run)) for run in _runs(order)]


def query_blocks(visibility: Visibility, q_rank: int, block: int = 1024) -> Iterator[Block]:
    """Blocks of a ring rank's queries, each with the prefix of the sorted keys that it needs.

    ``first`` and ``last`` of a block count the rank's queries in local order, ``keys`` counts keys in row order. A
    block ends at the gap between two zigzag chunks, so that no query is computed against the keys in the gap.
    """
    places = visibility.index[q_rank, 0]
    row_docs = None
    if visibility.doc_ids is not None:
        row_docs = np.empty((visibility.doc_ids.shape[1], visibility.index.size), np.int32)
        row_docs[:, visibility.index.reshape(-1)] = np.concatenate(visibility.doc_ids, axis=1)
    start = 0
    for run in _runs(places):
        for first in range(start, start + len(run), block):
            last = min(first + block, start + len(run))
            rows = places[first:last]
            keys = int(rows[-1]) + 1
            visible = (np.arange(keys) <= rows[:, None])[None]
            if row_docs is not None:
                visible = visible & (row_docs[:, rows][:, :, None] == row_docs[:, None, :keys])
            yield Block(first, last, keys, None if visible.all() else visible)
        start += len(run)


def visible_pairs(visibility: Visibility, q_rank: int) -> list[float]:
    """Number of visible query-key pairs a row between ``q_rank`` and each ring rank (the mean over rows): the work of
    each step of the ring. For method "allgather" one number, for all keys."""
    if visibility.method == "allgather":
        blocks = list(query_blocks(visibility, q_rank))
        full = sum((b.last - b.first) * b.keys for b in blocks if b.visible is None)
        return [full + sum(float(b.visible.sum()) / len(b.visible) for b in blocks if b.visible is not None)]
    n, pairs = visibility.length, []
    for k_rank in range(visibility.ring):
        parts = ranges_between(visibility, q_rank, k_rank)
        if parts is None:
            pairs.append(n * n / 2)
        else:
            pairs.append(sum(float((ranges[..., 1] - ranges[..., 0]).sum()) / len(ranges) for _, ranges in parts))
    return pairs


def real_places(local: LocalBatch, seq_len: int) -> list[tuple[int, int, int]]:
    """Runs (local start, start in the row, length) of the rank's places before ``seq_len``, where the padding begins.

    For writing a rank's results into whole rows. ValueError where the rows of a batch are split differently.
    """
    if len(local.index) != 1:
        raise ValueError("all rows must be split alike to share their runs; found rows with different splits")
    runs, start = [], 0
    for run in _runs(local.index[0]):
        real = int((run < seq_len).sum())
        if real:
            runs.append((start, int(run[0]), real))
        start += len(run)
    return runs


def _take(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """rows [B, S] at places [B or 1, s] -> [B, s]."""
    if len(places) == 1:
        return np.ascontiguousarray(rows[:, places[0]])
    return np.take_along_axis(rows, places, axis=1)


def _runs(places: np.ndarray) -> list[np.ndarray]:
    """``places`` [n] cut where the next is not one more."""
    return np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)


def _document_lengths(ids: np.ndarray) -> list[int] | None:
    """Lengths of the documents of one row [S]; None when an id returns after another document. Such a document has two
    runs that see each other, which a zigzag split of each run does not provide for."""
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    if len(np.unique(ids[starts])) < len(starts):
        return None
    return np.diff(np.append(starts, len(ids))).tolist()
