"""How a step is shared out over a ring: in numpy, with the definitions of attention over pages, blocks and their merge.

What a ring's ranks find, each from its own pages, is what one process finds, to the rounding of float64.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.inference.pages import PagePool
from telechat_twins.core.inference.ring_pages import RankStep, pages_of_rank, rank_step
from telechat_twins.core.inference.runner import Step
from telechat_twins.kernels import reference
from tests.parity.test_paged_attention import step_of

SIZE, H, K, D = 4, 4, 2, 8
EXACT = 1e-12  # float64, sums of a few hundred products in another order


def attend(step: Step, shares: list[RankStep], pages: list[np.ndarray], x: list[np.ndarray]) -> np.ndarray:
    """Attention of q, k, v ``x`` [N, heads, D] by the ranks of ``shares``, each with its own pages [2, P, SIZE, K, D],
    whose keys and values it stores first; the rows of the tokens, in their order."""
    q, k, v = x
    ranks = len(shares)
    held = [np.flatnonzero((step.slots // SIZE - 1) % ranks == rank) for rank in range(ranks)]
    for share, tokens, rooms in zip(shares, held, pages, strict=True):
        for room, rows in zip(rooms, (k, v), strict=True):
            room.reshape(-1, K, D)[share.slots] = rows[tokens]
    out = np.full(q.shape, np.nan)
    for origin, tokens in enumerate(held):
        n = len(shares[origin].ids)
        queries = np.zeros((n, H, D))
        queries[: len(tokens)] = q[tokens]
        found, lse = np.zeros((1, n, H, D)), np.full((1, H, n), -np.inf)
        for rank, (share, rooms) in enumerate(zip(shares, pages, strict=True)):
            for part in share.hops[(rank - origin) % ranks]:
                rows = slice(part.first, part.last)
                keys, values = (room.reshape(-1, K, D)[part.slots] for room in rooms)
                visible = reference.visible_keys(part.ranges, part.slots.shape[1])
                block = queries[rows].reshape(len(part.slots), -1, H, D)
                more, more_lse = reference.attention(block, keys, values, visible)
                more, more_lse = more.reshape(1, -1, H, D), more_lse.transpose(1, 0, 2).reshape(1, H, -1)
                found[:, rows], lse[..., rows] = reference.merge_blocks(found[:, rows], lse[..., rows], more, more_lse)
        assert np.isfinite(found).all()
        out[tokens] = found[0, : len(tokens)]
    return out


def compared(sequences: tuple[tuple[int, int], ...], ranks: int, change: object = None) -> float:
    """How far a ring of ``ranks`` is from one process, with one rank's share changed by ``change``."""
    step, num_pages = step_of(SIZE, sequences, 3)
    random, N = np.random.default_rng(5), len(step.ids)
    x = [random.normal(size=(N, heads, D)) for heads in (H, K, K)]
    whole = random.normal(size=(2, num_pages, SIZE, K, D))
    whole[:, 0] = 0.0
    # What is not there is never a number, so that whoever reads it is seen.
    pages = [np.full((2, pages_of_rank(num_pages, ranks), SIZE, K, D), np.nan) for _ in range(ranks)]
    for page in range(1, num_pages):
        pages[(page - 1) % ranks][:, (page - 1) // ranks + 1] = whole[:, page]
    for rooms in pages:
        rooms[:, 0] = 0.0
    shares = [rank_step(step, ranks, rank, SIZE) for rank in range(ranks)]
    if change is not None:
        shares[1] = change(shares[1])
    places = step.slots, step.starts, step.lengths, step.tables
    expected = reference.paged_attention(*(a[None] for a in x), *whole, *places)[0]
    return float(np.abs(attend(step, shares, pages, x) - expected).max())


LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 90)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(sequences=LENGTHS, ranks=st.integers(2, 5))
def test_a_ring_sees_what_one_process_sees(sequences, ranks):
    """Sequences of new tokens behind old ones, single tokens first."""
    sequences = sorted(((new, new + old) for new, old in sequences), key=lambda one: one[0] != 1)
    assert compared(tuple(sequences), ranks) < EXACT


MIXED = ((1, 30), (1, 9), (17, 41), (33, 33))


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_the_ranks_have_adds_up_to_the_step(ranks):
    step, num_pages = step_of(SIZE, MIXED, 3)
    step = dataclasses.replace(step, wanted=np.array([51, 0, 1, 30, 18], np.int32))
    shares = [rank_step(step, ranks, rank, SIZE) for rank in range(ranks)]
    assert len({(len(share.ids), len(share.positions), len(share.wanted)) for share in shares}) == 1
    assert sum(len(share.slots) for share in shares) == len(step.ids)
    assert max(len(share.slots) for share in shares) == len(shares[0].ids)
    for rank, share in enumerate(shares):
        tokens = np.flatnonzero((step.slots // SIZE - 1) % ranks == rank)
        np.testing.assert_array_equal(share.positions[: len(tokens)], step.positions[tokens])
        np.testing.assert_array_equal(share.scaling_lengths[: len(tokens)], step.scaling_lengths[tokens])
        assert share.slots.min() >= SIZE and share.slots.max() < pages_of_rank(num_pages, ranks) * SIZE
        assert share.ids.dtype == share.slots.dtype == share.wanted.dtype == np.int32
        np.testing.assert_array_equal(share.order, shares[0].order)
    # Rows come together rank by rank; told by the slot, which no other token has.
    width = len(shares[0].wanted)
    rows = {
        at: (rank, int(share.slots[i]))
        for rank, share in enumerate(shares)
        for at, i in zip(range(rank * width, (rank + 1) * width), share.wanted, strict=True)
        if i < len(share.slots)
    }
    for at, token in zip(shares[0].order.tolist(), step.wanted, strict=True):
        page, place = divmod(int(step.slots[token]), SIZE)
        assert rows[at] == ((page - 1) % ranks, ((page - 1) // ranks + 1) * SIZE + place)


@pytest.mark.parametrize("num_pages", [2, 3, 10, 11])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_rank_has_its_part_of_the_pages(num_pages, ranks):
    """And a blank one: no page of the pool is anywhere else, or in two places."""
    pool, places = PagePool(num_pages), set()
    while pool.available:
        page = pool.take()
        places.add(((page - 1) % ranks, (page - 1) // ranks + 1))
    assert len(places) == num_pages - 1
    assert max(place for _, place in places) + 1 == pages_of_rank(num_pages, ranks) <= -(-num_pages // ranks) + 1


def one_key_too_far(share):
    """Where a query's keys of a rank end before all that are there, it sees one more."""
    hops = [
        [part._replace(ranges=np.minimum(part.ranges + [0, 1], part.slots.shape[1])) for part in parts]
        for parts in share.hops
    ]
    return dataclasses.replace(share, hops=hops)


def a_hop_left_out(share):
    return dataclasses.replace(share, hops=[*share.hops[:-1], []])


def hops_in_another_order(share):
    return dataclasses.replace(share, hops=share.hops[::-1])


def neighbours_slots(share):
    return dataclasses.replace(share, slots=np.roll(share.slots, 1))


@pytest.mark.parametrize("fault", [one_key_too_far, a_hop_left_out, hops_in_another_order, neighbours_slots])
def test_a_planted_fault_is_seen(fault):
    assert compared(MIXED, 2) < EXACT
    assert compared(MIXED, 2, fault) > 1e-2
