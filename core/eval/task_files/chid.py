"""Choices of CHID: each candidate, with the text after the blank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def choices(row: Mapping[str, object]) -> list[str]:
    """The continuations of the text before the blank, one for each candidate."""
    after = str(row["content"]).split("#idiom#", 1)[1]
    candidates = row["candidates"]
    assert isinstance(candidates, Sequence)
    return [str(candidate) + after for candidate in candidates]
