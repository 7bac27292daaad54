"""Sequences over context-parallel ranks: every place once, labels unmoved, all blocks together the one causal mask."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest

from telechat_twins.core.model.batch import IGNORE, Batch, shift_labels
from telechat_twins.core.parallel import sequence
from telechat_twins.core.parallel.layout import Layout, parse_layout, sequence_multiple
from telechat_twins.core.parallel.sequence import (
    Visibility,
    gather_order,
    query_blocks,
    ranges_between,
    real_places,
    split_batch,
    visible_pairs,
)

RNG = np.random.default_rng(11)
EVEN = [[16, 32, 16], [48, 16]]  # each divisible by 2R for R = 2, 4, 8
UNEVEN = [[16, 31, 17], [64]]


def batch(seq_len, rows=2, lengths=None):
    """Random tokens; ``lengths`` of the documents of each row isolate them."""
    ids = RNG.integers(0, 1000, (rows, seq_len)).astype(np.int32)
    targets = shift_labels(ids)
    if lengths is None:
        return Batch(ids, targets, np.tile(np.arange(seq_len, dtype=np.int32), (rows, 1)))
    doc_ids = np.stack([np.repeat(np.arange(len(row)), row) for row in lengths]).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths]).astype(np.int32)
    targets[:, :-1][doc_ids[:, 1:] != doc_ids[:, :-1]] = IGNORE
    return Batch(ids, targets, positions, doc_ids)


def shares(data, layout):
    return [split_batch(data, layout, c) for c in range(layout.cp)]


def unsplit(pieces, indexes):
    """Rows [B, S] from the pieces [B, s] of all context-parallel ranks and their indexes: the inverse of the split."""
    batch, piece = pieces[0].shape
    rows = np.empty((batch, piece * len(pieces)), pieces[0].dtype)
    for values, index in zip(pieces, indexes, strict=True):
        rows[np.arange(batch)[:, None], index] = values
    return rows


def check_split(data, layout):
    """The comparison of this file: all ranks' shares put together are the batch, places, labels and all."""
    pieces = shares(data, layout)
    seq_len, padded = data.input_ids.shape[1], pieces[0].index.shape[1] * layout.cp
    assert padded % sequence_multiple(layout) == 0 and 0 <= padded - seq_len < sequence_multiple(layout)
    for row in range(len(data.input_ids)):
        held = np.concatenate([piece.index[row % len(piece.index)] for piece in pieces])
        assert sorted(held) == list(range(padded)), "every place is held once"
    for name in ("input_ids", "targets", "positions"):
        whole = unsplit([getattr(piece, name) for piece in pieces], [piece.index for piece in pieces])
        np.testing.assert_array_equal(whole[:, :seq_len], getattr(data, name), err_msg=name)
        assert whole.dtype == np.int32
        if name == "targets":
            assert (whole[:, seq_len:] == IGNORE).all()
        if name == "positions":
            assert (np.diff(whole[:, seq_len - 1 :]) == 1).all(), "padding counts on"
    # What is next to a token in the row is its label, wherever the cut went.
    for piece in pieces:
        for row, place in np.ndindex(piece.input_ids.shape):
            at = piece.index[row % len(piece.index)][place]
            if at < seq_len:
                following = data.input_ids[row, at + 1] if at + 1 < seq_len else IGNORE
                assert piece.targets[row, place] in (following, IGNORE), (row, at)
                assert piece.input_ids[row, place] == data.input_ids[row, at]
        assert piece.seq_len == seq_len


def full_mask(visibility, rows):
    """bool [rows, S_pad, S_pad] by the definition: not after, and in the same document."""
    length = visibility.index.shape[0] * visibility.length
    visible = np.tile(np.tri(length, dtype=bool), (rows, 1, 1))
    if visibility.doc_ids is not None:
        for row in range(rows):
            docs = np.empty(length, int)
            for places, ids in zip(visibility.index, visibility.doc_ids, strict=True):
                docs[places[row % len(places)]] = ids[row]
            visible[row] &= docs[:, None] == docs[None, :]
    return visible


def ring_mask(visibility, rows):
    """The same, put together from the blocks of all ranks as a ring computes them."""
    ring = visibility.ring
    seen = np.zeros((rows, ring * visibility.length, ring * visibility.length), bool)
    for q_rank in range(ring):
        for k_rank in range(ring):
            parts = ranges_between(visibility, q_rank, k_rank)
            queries, keys = sequence.visible_part(q_rank, k_rank, visibility.length)
            for row in range(rows):
                q = visibility.index[q_rank][row % visibility.index.shape[1]][queries]
                k = visibility.index[k_rank][row % visibility.index.shape[1]][keys]
                block = np.ones((len(q), len(k)), bool)
                for part, ranges in parts or ():
                    first, last = (ranges[row % len(ranges)][:, end, None] for end in (0, 1))
                    places = np.arange(len(k))[part] - part.start
                    block[:, part] = (places >= first) & (places < last)
                assert block.any(axis=1).all(), "a query without keys has no log-sum-exp"
                seen[row][np.ix_(q, k)] |= block
    return seen


@pytest.mark.parametrize("documents", [False, True])
def test_ranges_of_a_long_ring_are_small(documents):
    """131,072 tokens a rank, whose mask would have 17 GB: the ranges have 8 bytes a query."""
    ring, length = 2, 1 << 17
    data = batch(ring * length, lengths=[[ring * length // 8] * 8] if documents else None, rows=1)
    visibility = split_batch(data, Layout(cp=ring), 0).visibility
    tracemalloc.start()
    try:
        made = [ranges_between(visibility, 0, rank) for rank in range(ring)]
        assert tracemalloc.get_traced_memory()[1] < 64 * length * 2
    finally:
        tracemalloc.stop()
    assert [part.stop - part.start for part, _ in made[0]] == ([length // 2] * 2 if documents else [length])
    assert {ranges.shape for _, ranges in made[0]} == {(1, length, 2)} and (made[1] is None) == (not documents)


def gathered_mask(visibility, rows):
    """The same from the blocks of the all-gather method, keys sorted by ``gather_order``."""
    total = visibility.ring * visibility.length
    gathered = visibility.index.reshape(-1)  # place of each gathered key
    keys_in_order = np.concatenate([gathered[start : start + n] for start, n in gather_order(visibility)])
    assert list(keys_in_order) == list(range(total))
    seen = np.zeros((rows, total, total), bool)
    for q_rank in range(visibility.ring):
        done = 0
        for block in query_blocks(visibility, q_rank, block=5):
            assert block.first == done and block.last - block.first <= 5
            done = block.last
            places = visibility.index[q_rank, 0, block.first : block.last]
            assert block.keys == places.max() + 1, "no more keys than needed"
            for row in range(rows):
                visible = np.True_ if block.visible is None else block.visible[row % len(block.visible)]
                seen[row][np.ix_(places, keys_in_order[: block.keys])] = visible
        assert done == visibility.length
    return seen


@pytest.mark.parametrize(
    ("text", "multiple"),
    [
        ("single", 1), ("tp4", 4), ("tp4.nosp", 1), ("ring2", 4), ("ring3", 6), ("ulysses4", 4), ("ulysses2.tp3", 6),
        ("ring2.ulysses2", 8), ("ring3.tp2", 6), ("ring2.tp4", 8), ("ring3.tp4", 12), ("ring3.tp4.nosp", 6),
    ],
)  # fmt: skip
def test_padding(text, multiple):
    layout = parse_layout(text)
    assert sequence_multiple(layout) == multiple
    if layout.sequence_parallel:
        assert multiple // layout.cp % layout.tp == 0
    check_split(batch(multiple), layout)
    check_split(batch(multiple + 1), layout)


@pytest.mark.parametrize(
    "text", ["single", "ring2", "ring3", "ring4", "ring8", "ulysses3", "ring2.ulysses2", "cp8.tp2"]
)
@pytest.mark.parametrize("seq_len", [1, 48, 61])
def test_all_shares_together_are_the_batch(text, seq_len):
    layout = parse_layout(text)
    data = batch(seq_len)
    check_split(data, layout)
    visibility = split_batch(data, layout, 0).visibility
    assert visibility.method == ("ring" if layout.ring > 1 else "plain")
    np.testing.assert_array_equal(ring_mask(visibility, 1), full_mask(visibility, 1))


def test_zigzag_by_hand():
    data = batch(16)
    held = [split_batch(data, Layout(cp=4), c).index[0].tolist() for c in range(4)]
    assert held == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    # A hybrid cuts what a ring rank holds, in that order: gathering a Ulysses group gives the ring rank's places.
    held = [split_batch(data, Layout(cp=4, ulysses=2), c).index[0].tolist() for c in range(4)]
    assert held == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("text", ["ring2.ulysses2", "ring4.ulysses2", "ulysses4", "ring2.ulysses3"])
@pytest.mark.parametrize("lengths", [None, EVEN, UNEVEN])
def test_a_ulysses_group_holds_one_ring_rank_in_order(text, lengths):
    layout = parse_layout(text)
    data = batch(64, lengths=lengths)
    check_split(data, layout)
    pieces = shares(data, layout)
    for r in range(layout.ring):
        group = [pieces[c].index for c in range(r * layout.ulysses, (r + 1) * layout.ulysses)]
        np.testing.assert_array_equal(np.concatenate(group, axis=1), pieces[0].visibility.index[r])


@pytest.mark.parametrize("ring", [2, 4, 8])
def test_documents_that_divide_are_zigzagged_each(ring):
    data, layout = batch(64, lengths=EVEN), Layout(cp=ring)
    check_split(data, layout)
    piece = split_batch(data, layout, 1)
    visibility = piece.visibility
    assert visibility.method == "ring" and visibility.index.shape == (ring, 2, 64 // ring)
    np.testing.assert_array_equal(ring_mask(visibility, 2), full_mask(visibility, 2))
    # Work is even within the documents, too.
    pairs = [sum(visible_pairs(visibility, r)) for r in range(ring)]
    documents = sum(map(len, EVEN)) / 2
    assert max(pairs) - min(pairs) <= documents * (16 / ring) ** 2


def test_padding_that_divides_is_a_document_of_its_own():
    """S = 60 with R = 2 and ulysses 2 is padded to 64: 4 places of padding, divisible by 2R."""
    data = batch(60, lengths=[[20, 40], [60]])
    visibility = split_batch(data, parse_layout("ring2.ulysses2"), 0).visibility
    assert visibility.method == "ring" and visibility.doc_ids.max() == 2
    np.testing.assert_array_equal(ring_mask(visibility, 2), full_mask(visibility, 2))


@pytest.mark.parametrize("ring", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("seq_len", "lengths"),
    [
        (64, UNEVEN),
        (61, [[20, 41], [61]]),  # tail padding of 3
        (61, [[1] * 61, [60, 1]]),
    ],
)
def test_other_documents_are_gathered(ring, seq_len, lengths):
    data = batch(seq_len, lengths=lengths)
    check_split(data, Layout(cp=ring))
    visibility = split_batch(data, Layout(cp=ring), ring - 1).visibility
    assert visibility.method == "allgather" and visibility.index.shape[1] == 1
    np.testing.assert_array_equal(gathered_mask(visibility, 2), full_mask(visibility, 2))
    assert len(gather_order(visibility)) == 2 * ring - 1  # the last rank's two chunks are neighbours
    with pytest.raises(ValueError, match="query_blocks"):
        ranges_between(visibility, 0, 0)
    needed = sum(visible_pairs(visibility, r)[0] for r in range(ring))
    assert needed == full_mask(visibility, 2).sum() / 2


@pytest.mark.parametrize("ring", [2, 3, 4, 8])
def test_a_document_that_divides_by_the_ring_alone_is_gathered(ring):
    """A zigzag needs 2R chunks: a length of R tokens, or of 3R, has no halves for every rank."""
    for lengths in ([ring, 3 * ring], [2 * ring, ring, ring], [3 * ring, 5 * ring]):
        seq_len = sum(lengths)
        assert seq_len % (2 * ring) == 0 and all(n % ring == 0 for n in lengths)
        data = batch(seq_len, rows=1, lengths=[lengths])
        check_split(data, Layout(cp=ring))
        visibility = split_batch(data, Layout(cp=ring), 0).visibility
        assert visibility.method == "allgather"
        np.testing.assert_array_equal(gathered_mask(visibility, 1), full_mask(visibility, 1))


def test_a_document_that_comes_back_is_not_zigzagged():
    """Equal ids see each other across what is between; the halves of a zigzag per document would not."""
    data = batch(48, rows=1, lengths=[[16, 16, 16]])
    back = dataclasses.replace(data, doc_ids=np.repeat(np.array([[0, 1, 0]], np.int32), 16, axis=1))
    assert split_batch(data, Layout(cp=2), 0).visibility.method == "ring"
    visibility = split_batch(back, Layout(cp=2), 0).visibility
    assert visibility.method == "allgather"
    np.testing.assert_array_equal(gathered_mask(visibility, 1), full_mask(visibility, 1))


@pytest.mark.parametrize("lengths", [EVEN, UNEVEN])
def test_documents_without_a_ring(lengths):
    visibility = split_batch(batch(64, lengths=lengths), parse_layout("ulysses2"), 1).visibility
    assert visibility.method == "plain" and visibility.index.shape == (1, 1, 64)
    np.testing.assert_array_equal(ring_mask(visibility, 2), full_mask(visibility, 2))
    np.testing.assert_array_equal(gathered_mask(visibility, 2), full_mask(visibility, 2))


@pytest.mark.parametrize("ring", [2, 3, 4, 8])
def test_causal_work_is_equal_on_all_ranks(ring):
    visibility = split_batch(batch(61), Layout(cp=ring), 0).visibility
    work = np.array([visible_pairs(visibility, r) for r in range(ring)])
    n = visibility.length
    assert (work.sum(axis=1) == work[0].sum()).all()
    assert (work[~np.eye(ring, dtype=bool)] == n * n / 2).all(), "every step after the first is the same"
    assert work.sum() == (ring * n) * (ring * n + 1) / 2
    # Contiguous shares would not be: the comparison can fail.
    contiguous = Visibility("allgather", np.arange(ring * n).reshape(ring, 1, n))
    assert visible_pairs(contiguous, 0)[0] < visible_pairs(contiguous, ring - 1)[0] / ring


@pytest.mark.parametrize("text", ["single", "ring2", "ring3.ulysses2", "ring8", "ulysses2"])
def test_writing_back_by_runs(text):
    layout, data = parse_layout(text), batch(61)
    rows = np.full((2, 61), -1)
    for piece in shares(data, layout):
        for start, place, length in real_places(piece, piece.seq_len):
            rows[:, place : place + length] = piece.input_ids[:, start : start + length]
    np.testing.assert_array_equal(rows, data.input_ids)


def test_rows_that_are_split_differently_have_no_common_runs():
    piece = split_batch(batch(64, lengths=EVEN), Layout(cp=2), 0)
    with pytest.raises(ValueError, match="rows must be split alike"):
        real_places(piece, 64)
    with pytest.raises(ValueError, match="rows must be split alike"):
        gather_order(piece.visibility)


good_part = sequence.visible_part
good_places = sequence.zigzag_places
good_split = sequence.split_batch


def other_keys(q_rank, k_rank, length):
    """Planted fault: the second half of the keys of a rank before."""
    queries, keys = good_part(q_rank, k_rank, length)
    return queries, slice(length // 2, length) if k_rank < q_rank else keys


def other_queries(q_rank, k_rank, length):
    """Planted fault: the first half of the queries for keys of a rank after."""
    queries, keys = good_part(q_rank, k_rank, length)
    return slice(0, length // 2) if k_rank > q_rank else queries, keys


def wrong_places(lengths, ring):
    """Planted fault: rank r's second chunk is 2R-r instead of 2R-1-r."""
    right = good_places(lengths, ring)
    half = right.shape[1] // 2
    return np.concatenate([right[:, :half], np.roll(right[:, half:], 1, axis=0)], axis=1)


def shift_after_split(data, layout, cp_rank):
    """Planted fault: each rank shifts the labels of its own share."""
    piece = good_split(data, layout, cp_rank)
    return dataclasses.replace(piece, targets=shift_labels(piece.input_ids))


@pytest.mark.parametrize(
    ("name", "fault"),
    [("visible_part", other_keys), ("visible_part", other_queries), ("zigzag_places", wrong_places)],
)
@pytest.mark.parametrize("lengths", [None, EVEN])
def test_a_wrong_half_is_seen(monkeypatch, name, fault, lengths):
    data = batch(64, lengths=lengths)
    monkeypatch.setattr(sequence, name, fault)
    visibility = split_batch(data, Layout(cp=4), 0).visibility
    assert (ring_mask(visibility, 2) != full_mask(visibility, 2)).any()


def test_labels_shifted_after_the_split_are_seen(monkeypatch):
    data, layout = batch(48), Layout(cp=2)
    check_split(data, layout)
    monkeypatch.setitem(globals(), "split_batch", shift_after_split)
    with pytest.raises(AssertionError, match="targets"):
        check_split(data, layout)


def test_blocks_of_queries_are_small_and_whole():
    visibility = split_batch(batch(64, lengths=UNEVEN), Layout(cp=2), 0).visibility
    assert [(b.first, b.last, b.keys) for b in query_blocks(visibility, 0, block=10)] == [
        (0, 10, 10), (10, 16, 16), (16, 26, 58), (26, 32, 64),
    ]  # fmt: skip
    assert [(b.first, b.last, b.keys) for b in query_blocks(visibility, 1)] == [(0, 32, 48)]
