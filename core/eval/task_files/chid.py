"""Questions of CHID: each blank of a row, with the text before and after it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

BLANK = re.compile(r"#idiom\d*#")
OTHER = "____"  # another blank of the same passage


def blanks(rows: datasets.Dataset) -> datasets.Dataset:
    """A row of ``before``, ``after``, ``candidates`` and ``gold`` for each blank."""
    import datasets

    return datasets.Dataset.from_list([question for doc in rows for question in _questions(doc)])


def _questions(doc: Mapping[str, object]) -> Iterator[dict[str, object]]:
    passages = [doc["content"]] if isinstance(doc["content"], str) else doc["content"]
    assert isinstance(passages, Sequence)
    gold = iter(_answers(doc))
    for passage in passages:
        for blank in BLANK.finditer(passage):
            before, after = (BLANK.sub(OTHER, text) for text in (passage[: blank.start()], passage[blank.end() :]))
            yield {"before": before, "after": after, "candidates": doc["candidates"], "gold": next(gold)}


def _answers(doc: Mapping[str, object]) -> list[int]:
    """Numbers of the right candidates, in the order of the blanks."""
    if "answer" in doc:
        return [int(str(doc["answer"]))]
    answers = doc["answers"]
    if isinstance(answers, Mapping):  # columns, as the hub's data set has them
        return list(answers["candidate_id"])
    assert isinstance(answers, Sequence)
    return [answer["candidate_id"] for answer in answers]


def choices(row: Mapping[str, object]) -> list[str]:
    """The continuations of the text before the blank, one for each candidate."""
    candidates = row["candidates"]
    assert isinstance(candidates, Sequence)
    return [f"{candidate}{row['after']}" for candidate in candidates]
