"""Paged key-value cache: allocation by reference count, and reuse of full pages by the digest of their prefix.

A page is counted by its holders. One that is full can be given a name, the digest of everything that its keys and
values depend on; while no sequence holds it, it stays as it is until its memory is needed, and a sequence that begins
with the same tokens finds it by that name.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

import numpy as np

PAGE_SIZE = 16  # tokens
BLANK = 0  # never held: padding slots read it


def pool_size(tokens: int, page_size: int = PAGE_SIZE) -> int:
    """Pages of a pool in which one sequence of ``tokens`` fits, the blank one included."""
    return -(-tokens // page_size) + 1


class PagePool:
    """``num_pages`` pages, the blank one included. Nothing here touches the memory itself."""

    def __init__(self, num_pages: int, page_size: int = PAGE_SIZE) -> None:
        """ValueError without a page beside the blank one."""
        if num_pages < 2 or page_size < 1:
            raise ValueError(f"num_pages: {num_pages} of {page_size} tokens; needs 2 pages or more, one stays blank")
        self.num_pages, self.page_size = num_pages, page_size
        self._free = deque(range(1, num_pages))
        self._holders = [0] * num_pages
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # named, without a holder, least recently used first

    @property
    def available(self) -> int:
        """Pages that ``take`` can give."""
        return len(self._free) + len(self._idle)

    @property
    def capacity(self) -> int:
        """Tokens that fit when no page is held."""
        return (self.num_pages - 1) * self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self) -> int:
        """A page of one's own. IndexError when none is available."""
        if self._free:
            page = self._free.popleft()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._named[self._names.pop(page)]
        else:
            raise IndexError("every page is held")
        self._holders[page] = 1
        return page

    def find(self, name: bytes) -> int | None:
        """The page of that name, if its contents are still there."""
        return self._named.get(name)

    def share(self, page: int) -> None:
        """Hold a page that ``find`` gave."""
        self._holders[page] += 1
        self._idle.pop(page, None)

    def give_back(self, pages: Sequence[int]) -> None:
        """Let go of a sequence's pages, in its order. The last ones lose their contents first: the others are of use
        without them, and not the other way round."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._names:
                self._idle[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, name: bytes) -> None:
        """Make a full page known. Where another page has the name, that one stays known and this one unknown."""
        if name not in self._named and page not in self._names:
            self._named[name], self._names[page] = page, name

    def forget(self, pages: Iterable[int]) -> None:
        """Take their names from pages that are held: their contents must not be used again."""
        for page in pages:
            name = self._names.pop(page, None)
            if name is not None:
                del self._named[name]

    def holders(self, page: int) -> int:
        return self._holders[page]

    def check(self) -> None:
        """AssertionError unless every page is exactly one of: blank, free, idle, held."""
        free, idle = set(self._free), set(self._idle)
        held = {page for page in range(1, self.num_pages) if self._holders[page]}
        assert len(free) == len(self._free), "a page is free twice"
        assert free | idle | held == set(range(1, self.num_pages)), "a page is lost"
        assert len(free) + len(idle) + len(held) == self.num_pages - 1, "a page is in two states"
        assert {self._named[n]: n for n in self._named} == self._names, "names and pages do not fit"
        assert idle <= self._names.keys() and not free & self._names.keys(), (
            "an idle page without a name, or a free one"
        )
        assert min(self._holders) >= 0 and self._holders[BLANK] == 0, "a page was given back too often"


def first_name(salt: str) -> bytes:
    """What stands before the first page of sequences that share pages only among those of the same ``salt``: empty
    without one, else 32 bytes, which no page's name is."""
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=32).digest() if salt else b""


def page_name(before: bytes, ids: Sequence[int], scaling: np.ndarray) -> bytes:
    """What a full page's keys and values depend on: all pages before it (``before`` is the last one's name, or for the
    first page ``first_name``), its token ids, and the rotary scaling of each, float64 [n, 2] (base and amplitude)."""
    digest = hashlib.blake2b(before, digest_size=16)
    digest.update(np.asarray(ids, np.int32).tobytes())
    digest.update(np.ascontiguousarray(scaling, np.float64).tobytes())
    return digest.digest()
