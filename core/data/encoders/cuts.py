"""Exact cuts of a text for byte-pair models of SentencePiece: places where the parts encode as they do in the whole.

Byte-pair merging joins neighbours, and whatever it joins is a piece. If no piece holds the two characters beside a
place next to each other, no merge ever spans that place, and the merges on either side do not depend on each other:
their order is that of the pieces' scores, and between equals the leftmost comes first. So the ids of the whole are
those of the two parts, one after the other. Unknown characters must not be neighbours across a cut either, unless the
model writes them as bytes: SentencePiece joins neighbouring unknowns into one.

The rule holds on normalized text, so it is used only for models that change nothing but the mark for a space
(``leaves_text``); a unigram model adds up scores in single precision along the text, where cutting can change the last
bit, and is never cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from telechat_twins.core.data.encoders.pieces import PIECE
from telechat_twins.core.files.protobuf import fields

SPACE = "\u2581"  # what SentencePiece writes for a space
_CODES = 0x110000
NUMBER_BITS, KEYED = 15, 4  # of a letter's number, and letters of a word that has a key of 60 bits
NO_KEY = np.iinfo(np.int64).min
_LETTERS = 30_000  # below 2^15; different characters in pieces of several: 112 MB of bits for their pairs
_WINDOW = 4096  # characters at the end of a text that are looked at first

# Of sentencepiece_model.proto: ModelProto, TrainerSpec, NormalizerSpec.
_TRAINER, _NORMALIZER = 2, 3
_MODEL_TYPE, _BPE, _SPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 2, 24, 35
_NAME, _CHARACTER_MAP, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPED_SPACES = 1, 2, 3, 4, 5
# Concatenated messages merge: this sets NormalizerSpec.add_dummy_prefix to false.
WITHOUT_PREFIX = bytes((_NORMALIZER << 3 | 2, 2, _DUMMY_PREFIX << 3, 0))

Message = dict[int, int | bytes]


@dataclass(frozen=True)
class Specs:
    """What of a tokenizer.model decides how it treats text: TrainerSpec and NormalizerSpec by field number."""

    trainer: Message
    normalizer: Message

    @property
    def byte_fallback(self) -> bool:
        """Whether characters without a piece are written as bytes."""
        return bool(self.trainer.get(_BYTE_FALLBACK))

    @property
    def is_bpe(self) -> bool:
        """Byte-pair merging with the mark for a space in front of words."""
        return self.trainer.get(_MODEL_TYPE) == _BPE and not self.trainer.get(_SPACE_AS_SUFFIX)

    @property
    def adds_prefix(self) -> bool:
        """Whether a text gets a space in front."""
        return bool(self.normalizer.get(_DUMMY_PREFIX, 1))

    @property
    def leaves_text(self) -> bool:
        """Whether the normalizer only marks spaces and adds the one in front, if any."""
        keeps = self.normalizer.get(_ESCAPED_SPACES, 1) and not self.normalizer.get(_EXTRA_SPACES, 1)
        return bool(keeps) and self.normalizer.get(_NAME) == b"identity" and not self.normalizer.get(_CHARACTER_MAP)


def read_specs(data: bytes, start: int = 0) -> Specs:
    """The specs of a serialized ModelProto; ValueError for bytes that are not one. ``start``: behind its pieces, which
    come first, or in front of any of them."""
    specs: dict[int, Message] = {_TRAINER: {}, _NORMALIZER: {}}
    for number, value in fields(data[_passed(data, start) :]):
        if number in specs and isinstance(value, bytes):
            specs[number] |= dict(fields(value))
    return Specs(specs[_TRAINER], specs[_NORMALIZER])


def _passed(data: bytes, start: int) -> int:
    """Where a serialized ModelProto goes on behind the pieces from ``start`` on."""
    while start + 2 < len(data) and data[start] == PIECE:
        low, high = data[start + 1], data[start + 2]
        if low >= 0x80 <= high:
            break
        start += 2 + low if low < 0x80 else 3 + (low & 0x7F | high << 7)
    return start


class Cutter:
    """The cuts of one model: a bit for each pair of characters that are neighbours in a piece."""

    def __init__(self, pieces: Sequence[str], fallback: bool) -> None:
        """``pieces``: those that text can become; ``fallback``: characters without a piece are bytes. ValueError for
        more letters than have numbers."""
        # NUL between two pieces; it comes first of the letters, and number 0 is any character that is in no pair.
        codes = _codes("\0" + "\0".join([piece for piece in pieces if len(piece) > 1]))
        met = np.zeros(_CODES, bool)
        met[codes] = True
        self._width = int(np.count_nonzero(met))
        if self._width > _LETTERS:
            raise ValueError(f"more than {_LETTERS} different characters in pieces of several")
        self._number = np.cumsum(met, dtype=np.int16)  # numbers and their pairs fit into 15 and 30 bits
        self._number -= 1
        self._number *= met
        places = self._number[codes].astype(np.int32)
        left, right = places[:-1], places[1:]
        pairs = (left * self._width + right)[(left > 0) & (right > 0)]
        self._joined = np.zeros(self._width**2 // 8 + 1, np.uint8)
        np.bitwise_or.at(self._joined, pairs >> 3, np.left_shift(1, pairs & 7).astype(np.uint8))
        self._known: np.ndarray | None = None
        if not fallback:
            self._known = np.zeros(_CODES, bool)
            self._known[[ord(piece) for piece in pieces if len(piece) == 1]] = True
        for by_code in (self._number, self._known):
            if by_code is not None:
                by_code[ord(" ")] = by_code[ord(SPACE)]

    def keyed_words(self, text: str, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of texts written one after the other: where each word begins, and its key, int64.

        ``ends``: of the texts in ``text``, which is not empty. Words of the same key have the same ids; NO_KEY: longer
        than KEYED characters, or of several characters of which one is in no pair, so that it has no number.
        """
        codes = _codes(text)
        numbers = np.zeros(len(codes) + KEYED, np.int64)
        numbers[: len(codes)] = self._number[codes]
        cut = np.ones(len(codes), bool)
        cut[1:] = self._free(codes, numbers[: len(codes)])
        cut[ends[ends < len(codes)]] = True
        begins = np.flatnonzero(cut)
        sizes = np.diff(begins, append=len(codes))
        keys, letters = numbers[begins], np.ones(len(begins), bool)
        letters &= keys > 0
        for place in range(1, KEYED):
            several = np.flatnonzero(sizes > place)
            more = numbers[begins[several] + place]
            keys[several] |= more << (NUMBER_BITS * place)
            letters[several] &= more > 0
        keys[~letters | (sizes > KEYED)] = NO_KEY
        single = sizes == 1
        keys[single] = -1 - codes[begins[single]].astype(np.int64)
        return begins, keys

    def marks(self) -> Iterator[str]:
        """Characters that texts hardly hold, in front of and behind which every text may be cut."""
        for code in (*range(1, ord("\t")), *range(ord("\r") + 1, ord(" "))):
            if not self._number[code] and (self._known is None or self._known[code]):
                yield chr(code)

    def last(self, text: str) -> int:
        """The last place at which ``text`` may be cut; 0 without one."""
        size = _WINDOW
        while True:
            begin = max(0, len(text) - size)
            places = self._places(text[begin:])
            if len(places):
                return begin + int(places[-1])
            if not begin:
                return 0
            size *= 16

    def _places(self, text: str) -> np.ndarray:
        if len(text) < 2:
            return np.zeros(0, np.int64)
        codes = _codes(text)
        return np.flatnonzero(self._free(codes, self._number[codes])) + 1

    def _free(self, codes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Whether a text may be cut in front of each character but the first."""
        pairs = np.multiply(numbers[:-1], self._width, dtype=np.int64) + numbers[1:]
        free = (self._joined[pairs >> 3] >> (pairs & 7).astype(np.uint8) & 1) == 0
        if self._known is not None:
            certain = self._known[codes]
            free &= certain[:-1] | certain[1:]
        return free


def make_cutter(specs: Specs, pieces: Sequence[str]) -> Cutter | None:
    """The exact cuts of a model; None where there are none that are known to be exact. ``pieces``: those that text can
    become, without control, unknown and byte pieces."""
    if not (specs.is_bpe and specs.leaves_text and pieces) or "\0" in "".join(pieces):
        return None
    with contextlib.suppress(ValueError):
        return Cutter(pieces, specs.byte_fallback)
    return None


def _codes(text: str) -> np.ndarray:
    """Code points, uint32."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
