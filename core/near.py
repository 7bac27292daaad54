"""The nearest legal word to a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 64  # characters: comparing takes the square of the length, and nobody mistypes a longer word


def nearest(word: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of ``known`` that is at least ``cutoff`` like ``word`` and most like it; None for a long word."""
    text = str(word) if not isinstance(word, int) else ""
    if len(text) > LONGEST:
        return None
    found = get_close_matches(text, [name for name in known if len(name) <= LONGEST], n=1, cutoff=cutoff)
    return found[0] if found else None
