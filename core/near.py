"""Suggestion for a misspelt word: the most similar legal one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 64  # characters of a word that gets a suggestion: the cost of comparing grows with the square


def nearest(word: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The word of ``known`` most similar to ``word``, with a similarity of at least ``cutoff``; None if there is none,
    or ``word`` is too long."""
    text = str(word) if not isinstance(word, int) else ""
    if len(text) > LONGEST:
        return None
    found = get_close_matches(text, [name for name in known if len(name) <= LONGEST], n=1, cutoff=cutoff)
    return found[0] if found else None
