"""Paged key-value cache: allocation by reference count, and reuse of full pages by the digest of their prefix.

A page has a reference count, the number of sequences that hold it. A full page can be named by the digest of everything
that its keys and values depend on. When no sequence holds a named page any more, it keeps its contents until its memory
is needed, and a sequence that begins with the same tokens finds it by that name.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

import numpy as np

PAGE_SIZE = 16  # tokens
BLANK = 0  # page that no sequence holds; padding slots point to it


def pool_size(tokens: int, page_size: int = PAGE_SIZE) -> int:
    """Pages of a pool that holds one sequence of ``tokens``, the blank page included."""
    return -(-tokens // page_size) + 1


class PagePool:
    """Allocator of page numbers; the memory itself belongs to the runner. Page 0 is the blank page."""

    def __init__(self, num_pages: int, page_size: int = PAGE_SIZE) -> None:
        """``num_pages``: the blank page included, so at least 2 (ValueError)."""
        if num_pages < 2 or page_size < 1:
            raise ValueError(
                f"num_pages: needs 2 pages or more (one stays blank), each of 1 token or more; found {num_pages} pages "
                f"of {page_size} tokens"
            )
        self.num_pages, self.page_size = num_pages, page_size
        self._free = deque(range(1, num_pages))
        self._holders = [0] * num_pages
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # named pages without a holder, least recently used first
        self.gains = 0  # count of the changes that can let a waiting sequence fit: see Scheduler._fits

    @property
    def available(self) -> int:
        """Number of pages that ``take`` can return: free ones, and idle ones whose contents are then lost."""
        return len(self._free) + len(self._idle)

    @property
    def capacity(self) -> int:
        """Tokens that fit when no page is held."""
        return (self.num_pages - 1) * self.page_size

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self) -> int:
        """A page with one holder: a free one, else the idle one unused longest. IndexError when none is available."""
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
        """The page with that name; None when it does not exist or has been reused."""
        return self._named.get(name)

    def share(self, page: int) -> None:
        """Add a holder to a page that ``find`` returned."""
        self._holders[page] += 1
        self._idle.pop(page, None)

    def give_back(self, pages: Sequence[int]) -> None:
        """Remove a holder from a sequence's pages, given in the order of its tokens.

        They become idle in reverse order, so that later pages are reused first: a prefix is of use without the pages
        after it, but a page is of no use without the prefix before it.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            self.gains += 1
            if page in self._names:
                self._idle[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, name: bytes) -> None:
        """Name a full page, so that ``find`` returns it. If another page has the name, nothing is changed."""
        if name not in self._named and page not in self._names:
            self._named[name], self._names[page] = page, name
            self.gains += 1

    def forget(self, pages: Iterable[int]) -> None:
        """Remove the names of held pages, so that no other sequence finds them."""
        for page in pages:
            name = self._names.pop(page, None)
            if name is not None:
                del self._named[name]

    def holders(self, page: int) -> int:
        return self._holders[page]

    def check(self) -> None:
        """Check the invariant: every page is exactly one of blank, free, idle and held. AssertionError otherwise."""
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


def first_name(salt: str, adapter: int = 0) -> bytes:
    """The ``before`` of a sequence's first page. Sequences share pages only if they have the same ``salt`` and the
    same ``adapter``.

    Empty without either, else 32 bytes; names of pages have 16, so the two cannot be confused.
    """
    if not salt and not adapter:
        return b""
    # The adapter is a parameter of the hash, not part of the text: no salt equals another adapter's.
    person = adapter.to_bytes(8, "little")
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=32, person=person).digest()


def page_name(before: bytes, ids: Sequence[int], scaling: np.ndarray) -> bytes:
    """Name of a full page: the digest of everything that its keys and values depend on.

    ``before``: the name of the page before it, which stands for all earlier tokens, or ``first_name``. ``ids``: its n
    token ids. ``scaling``: the rotary scaling of each, float64 [n, 2] (base and amplitude).
    """
    digest = hashlib.blake2b(before, digest_size=16)
    digest.update(np.asarray(ids, np.int32).tobytes())
    digest.update(np.ascontiguousarray(scaling, np.float64).tobytes())
    return digest.digest()
