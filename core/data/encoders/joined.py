"""Ids of many words by one call of SentencePiece, in the calling thread.

SentencePiece starts a thread for every list of texts, even where one thread is asked for, and waits for it. Where
every core has a process of its own that thread waits for a core, so the words are given as one text instead, with a
mark between them. The mark is a character beside which every cut is exact (core.data.encoders.cuts), so that the ids
between two marks are those of the word alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import sentencepiece

from telechat_twins.core.data.encoders.cuts import Cutter

_TOGETHER = 1 << 11  # characters of words and marks: merging takes longer than in proportion to the text

Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Ids of words one after the other, int32, and how many of them each word has, int64."""


def words_encoder(pieces: sentencepiece.SentencePieceProcessor, cutter: Cutter) -> Encode:
    """Encodes words by ``pieces``, which puts no space in front of them."""
    mark = _mark(pieces, cutter)

    def encode(words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        found = [_together(pieces, mark, part) if mark else _each(pieces, part) for part in _parts(words)]
        return np.concatenate([ids for ids, _ in found]), np.concatenate([sizes for _, sizes in found])

    return encode


def _mark(pieces: sentencepiece.SentencePieceProcessor, cutter: Cutter) -> tuple[str, int] | None:
    """A mark and its id; None for a model without one."""
    for character in cutter.marks():
        ids = pieces.encode(character)
        if len(ids) == 1 and ids[0] != pieces.unk_id():
            return character, ids[0]
    return None


def _parts(words: Sequence[str]) -> Iterator[Sequence[str]]:
    first = size = 0
    for number, word in enumerate(words, 1):
        size += len(word) + 1
        if size >= _TOGETHER or number == len(words):
            yield words[first:number]
            first, size = number, 0


def _together(
    pieces: sentencepiece.SentencePieceProcessor, mark: tuple[str, int], words: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    character, index = mark
    ids = np.asarray(pieces.encode(character.join(words)), np.int32)
    marked = ids == index
    sizes = np.diff(np.flatnonzero(marked), prepend=-1, append=len(ids)) - 1
    if len(sizes) != len(words):  # a word holds the mark itself
        return _each(pieces, words)
    return ids[~marked], sizes


def _each(pieces: sentencepiece.SentencePieceProcessor, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    made = pieces.encode([*words], num_threads=1)  # unless told, as many as the machine has processors
    sizes = np.fromiter(map(len, made), np.int64, len(made))
    return np.fromiter(chain.from_iterable(made), np.int32, int(sizes.sum())), sizes
