"""The page pool: nobody's page is given away, none is lost, and full pages are found again."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.inference.pages import BLANK, PagePool, first_name, page_name, pool_size


def test_pages_are_counted_by_their_holders():
    pool = PagePool(4, 2)
    first, second = pool.take(), pool.take()
    assert {first, second, pool.take()} == {1, 2, 3} and pool.available == 0
    with pytest.raises(IndexError, match="every page is held"):
        pool.take()
    pool.share(first)
    pool.give_back([first, second])
    assert pool.available == 1 and pool.holders(first) == 1
    pool.give_back([first])
    assert pool.available == 2
    pool.check()


def test_named_pages_wait_until_their_memory_is_needed():
    pool = PagePool(4, 2)
    pages = [pool.take() for _ in range(3)]
    for page, name in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.name(page, name)
    pool.give_back(pages)
    assert pool.available == 3 and [pool.find(n) for n in (b"a", b"b", b"c")] == pages
    # The end of a sequence goes first: its beginning is of use without it.
    assert pool.take() == pages[2] and pool.find(b"c") is None
    pool.share(pages[0])
    assert pool.take() == pages[1]
    assert pool.available == 0 and pool.find(b"a") == pages[0]
    pool.check()


def test_the_page_that_was_named_first_stays_the_known_one():
    pool = PagePool(4, 2)
    first, second = pool.take(), pool.take()
    pool.name(first, b"a")
    pool.name(second, b"a")
    assert pool.find(b"a") == first
    pool.give_back([second])
    pool.check()
    pool.forget([first])
    assert pool.find(b"a") is None
    pool.give_back([first])
    pool.check()
    assert pool.available == 3


def test_sizes():
    pool = PagePool(pool_size(9, 4), 4)
    assert pool.num_pages == 4 and pool.capacity == 12 and pool.pages_for(9) == 3 and pool.pages_for(8) == 2
    with pytest.raises(ValueError, match="needs 2 pages or more"):
        PagePool(1, 4)


def test_a_name_tells_everything_apart():
    scaling = np.array([[10000.0, 1.0]] * 2)
    names = {
        page_name(b"", [1, 2], scaling),
        page_name(b"", [2, 1], scaling),
        page_name(page_name(b"", [1, 2], scaling), [1, 2], scaling),
        page_name(b"", [1, 2], scaling + [1.0, 0.0]),
        page_name(b"", [1, 2], scaling + [0.0, 0.1]),
    }
    assert len(names) == 5
    assert page_name(b"", [1, 2], scaling.copy()) in names


def test_a_salt_tells_first_pages_apart():
    scaling = np.array([[10000.0, 1.0]] * 2)
    salts = ["", "a", "b", "a/", "\ud800"]
    assert first_name("") == b"" and {len(first_name(salt)) for salt in salts[1:]} == {32}
    assert len({page_name(first_name(salt), [1, 2], scaling) for salt in salts}) == len(salts)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_random_holders_never_share_unasked_and_lose_nothing(seed, num_pages):
    rng, pool = random.Random(seed), PagePool(num_pages, 2)
    held: list[list[int]] = []  # by holder
    names = 0
    for _ in range(60):
        what = rng.random()
        if what < 0.4 and pool.available:
            page = pool.take()
            assert page != BLANK and not any(page in pages for pages in held)
            held.append([page])
        elif what < 0.6 and held:
            pool.give_back(held.pop(rng.randrange(len(held))))
        elif what < 0.8 and held:
            names += 1
            pool.name(rng.choice(rng.choice(held)), str(rng.randrange(6)).encode())
        else:
            page = pool.find(str(rng.randrange(6)).encode())
            if page is not None:
                pool.share(page)
                held.append([page])
        pool.check()
    for pages in held:
        pool.give_back(pages)
    pool.check()
    assert pool.available == num_pages - 1


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda pool: pool._free.append(pool._free[0]), "free twice"),
        (lambda pool: pool._free.pop(), "lost"),
        (lambda pool: pool.give_back([pool.take()] * 2), "two states"),
        (lambda pool: pool._free.append(pool.take()), "two states|free twice"),
        (lambda pool: pool._idle.update({pool._free[0]: None}), "two states"),
        (lambda pool: pool._names.update({1: b"x"}), "do not fit"),
    ],
)
def test_the_check_sees_a_pool_that_is_wrong(fault, says):
    pool = PagePool(4, 2)
    fault(pool)
    with pytest.raises(AssertionError, match=says):
        pool.check()
