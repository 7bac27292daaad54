"""Every answer that a rule of a stated family gives, for tasks whose rule must be found in examples.

A rule writes up to three pieces, one after another. A piece is a fixed text, the input backwards, or the part of the
input between two places. A place is so many characters from the start or from the end (or as many as there are), a
half, a third, two thirds, a quarter or three quarters of the length (rounded down or up), or in front of or behind the
first such character.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

PIECES = 3
PARTS = ((1, 2), (1, 3), (2, 3), (1, 4), (3, 4))

Place = Callable[[str], int]
Parts = dict[tuple[str, ...], set[str]]
"""What a piece writes for each example, and what such pieces write for the question."""


def answers(pairs: Sequence[tuple[str, str]], question: str) -> set[str]:
    """The answers to ``question`` of all rules of the family that explain every pair of input and output."""
    parts = list(_parts([text for text, _ in pairs], question).items())
    ends: dict[tuple[tuple[str, ...], int], set[str]] = {}

    def rest(outs: tuple[str, ...], pieces: int) -> set[str]:
        """All that up to ``pieces`` further pieces write for the question where they write ``outs``."""
        if not all(outs) or not pieces:
            return set() if any(outs) else {""}
        if (outs, pieces) not in ends:
            found: set[str] = set()
            for written, asked in [*fixed_texts(outs), *parts]:
                if all(map(str.startswith, outs, written)):
                    following = rest(tuple(map(str.removeprefix, outs, written)), pieces - 1)
                    found.update(start + one for one in following for start in asked)
            ends[outs, pieces] = found
        return ends[outs, pieces]

    return rest(tuple(out for _, out in pairs), PIECES)


def fixed_texts(outs: tuple[str, ...]) -> list[tuple[tuple[str, ...], set[str]]]:
    """The pieces of fixed text with which all of ``outs`` may begin."""
    common = os.path.commonprefix(list(outs))
    return [((common[:length],) * len(outs), {common[:length]}) for length in range(1, len(common) + 1)]


def _parts(texts: Sequence[str], question: str) -> Parts:
    """Every piece that is a part of the input, or the input backwards."""
    places: dict[tuple[int, ...], set[int]] = {}
    for place in _places(texts):
        at = tuple(place(text) for text in texts)
        if min(at) >= 0:
            places.setdefault(at, set()).add(max(place(question), 0))
    found: Parts = {tuple(text[::-1] for text in texts): {question[::-1]}}
    for first, starts in places.items():
        for last, ends in places.items():
            if all(start < end for start, end in zip(first, last, strict=True)):
                written = tuple(text[a:b] for text, a, b in zip(texts, first, last, strict=True))
                found.setdefault(written, set()).update(question[a:b] for a in starts for b in ends)
    return found


def _places(texts: Sequence[str]) -> list[Place]:
    longest = max(map(len, texts))
    found: list[Place] = []
    for n in range(longest + 1):
        found += [lambda text, n=n: min(n, len(text)), lambda text, n=n: max(len(text) - n, 0)]  # type: ignore[misc]
    for part, whole in PARTS:
        found.append(lambda text, part=part, whole=whole: len(text) * part // whole)  # type: ignore[misc]
        found.append(lambda text, part=part, whole=whole: -(-len(text) * part // whole))  # type: ignore[misc]
    for one in set.intersection(*map(set, texts)):
        found.append(lambda text, one=one: text.find(one))  # type: ignore[misc]
        found.append(lambda text, one=one: text.find(one) + 1 or -1)  # type: ignore[misc]
    return found
