"""Suggestion for a misspelt word: the most similar legal one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

MOST = 1000  # entries of a folder that are looked at
LONGEST = 64  # characters of a word that gets a suggestion: the cost of comparing grows with the square


def nearest(word: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The word of ``known`` most similar to ``word``, with a similarity of at least ``cutoff``; None if there is none,
    or ``word`` is too long. Exchanged letters, the commonest slip, count as most similar."""
    text = str(word) if not isinstance(word, int) else ""
    if len(text) > LONGEST:
        return None
    names = [name for name in known if len(name) <= LONGEST]
    exchanged = [name for name in names if text and sorted(name) == sorted(text)]
    found = exchanged or get_close_matches(text, names, n=1, cutoff=cutoff)
    return found[0] if found else None


def near_path(path: str | Path) -> str:
    """For a message about a path that is not there: "; did you mean 'X'?", X the most similar name beside it, or ""."""
    path = Path(path)
    try:
        with os.scandir(path.parent) as entries:
            beside = [entry.name for entry in itertools.islice(entries, MOST) if not entry.name.startswith(".")]
    except (OSError, ValueError):
        return ""
    near = nearest(path.name, beside, cutoff=0.7)
    return "" if near is None or near == path.name else f"; did you mean '{path.with_name(near)}'?"
