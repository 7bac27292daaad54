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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from telechat_twins.core.files.protobuf import fields

SPACE = "\u2581"  # what SentencePiece writes for a space
_CODES = 0x110000
_LETTERS = 30_000  # different characters in pieces of several: 112 MB of bits for their pairs
_TRIAL, _RETRY = 1 << 14, 1 << 22  # characters by which a way of encoding is judged, and after which it is again
_WINDOW = 4096  # characters at the end of a text that are looked at first

# Of sentencepiece_model.proto: ModelProto, TrainerSpec, NormalizerSpec.
_PIECE = 1 << 3 | 2
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


def read_specs(data: bytes) -> Specs:
    """The specs of a serialized ModelProto; ValueError for bytes that are not one."""
    specs: dict[int, Message] = {_TRAINER: {}, _NORMALIZER: {}}
    start = 0
    # The pieces come first, nearly all with a size of one byte: a hundred thousand of them are passed over quickly.
    while start + 2 < len(data) and data[start] == _PIECE:
        low, high = data[start + 1], data[start + 2]
        if low >= 0x80 <= high:
            break
        start += 2 + low if low < 0x80 else 3 + (low & 0x7F | high << 7)
    for number, value in fields(data[start:]):
        if number in specs and isinstance(value, bytes):
            specs[number] |= dict(fields(value))
    return Specs(specs[_TRAINER], specs[_NORMALIZER])


class Cutter:
    """The cuts of one model: a bit for each pair of characters that are neighbours in a piece."""

    def __init__(self, pieces: Sequence[str], fallback: bool) -> None:
        """``pieces``: those that text can become; ``fallback``: characters without a piece are bytes."""
        several = [piece for piece in pieces if len(piece) > 1]
        # NUL between two pieces; it comes first of the letters, and number 0 is any character that is in no pair.
        letters, places = np.unique(_codes("\0" + "\0".join(several)), return_inverse=True)
        self._number = np.zeros(_CODES, np.int32)
        self._number[letters[1:]] = np.arange(1, len(letters))
        self._width = len(letters)
        left, right = places[:-1], places[1:]
        pairs = np.unique((left * self._width + right)[(left > 0) & (right > 0)])
        self._joined = np.zeros(self._width**2 // 8 + 1, np.uint8)
        np.bitwise_or.at(self._joined, pairs >> 3, np.left_shift(1, pairs & 7).astype(np.uint8))
        self._known: np.ndarray | None = None
        if not fallback:
            self._known = np.zeros(_CODES, bool)
            self._known[[ord(piece) for piece in pieces if len(piece) == 1]] = True
        for by_code in (self._number, self._known):
            if by_code is not None:
                by_code[ord(" ")] = by_code[ord(SPACE)]

    def words(self, text: str) -> list[str]:
        """``text`` as parts that encode one by one."""
        return _parts(text, self._places(text).tolist())

    def stretches(self, text: str, size: int) -> list[str]:
        """``text`` as parts of about ``size`` characters that encode one by one."""
        places = self._places(text)
        at = np.unique(np.searchsorted(places, np.arange(size, len(text), size)))
        return _parts(text, places[at[at < len(places)]].tolist())

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
        numbers = self._number[codes]
        pairs = numbers[:-1].astype(np.int64) * self._width + numbers[1:]
        free = (self._joined[pairs >> 3] >> (pairs & 7).astype(np.uint8) & 1) == 0
        if self._known is not None:
            certain = self._known[codes]
            free &= certain[:-1] | certain[1:]
        return np.flatnonzero(free) + 1


def _parts(text: str, places: list[int]) -> list[str]:
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


class Paces:
    """Which of several ways of encoding is fastest on the texts at hand: the time of each a character, and now and then
    a text for one that was slower, because memory of words grows and texts change. All have the same result."""

    def __init__(self, ways: int) -> None:
        self._seconds, self._characters = [0.0] * ways, [0] * ways
        self._since = 0  # characters since a slower way was tried

    def choose(self) -> int:
        for way, characters in enumerate(self._characters):
            if characters < _TRIAL:
                return way
        rates = [s / c for s, c in zip(self._seconds, self._characters, strict=True)]
        best = rates.index(min(rates))
        if self._since < _RETRY:
            return best
        self._since = 0
        other = (best + 1) % len(rates)
        self._seconds[other], self._characters[other] = 0.0, 0  # what it was like before the last texts
        return other

    def texts(self, texts: Sequence[str]) -> int:
        """How many of ``texts`` the way just chosen is to have: all, or enough to judge it by."""
        if min(self._characters) >= _TRIAL:
            return len(texts)
        sizes = np.cumsum([len(text) for text in texts])
        return min(len(texts), int(np.searchsorted(sizes, _TRIAL)) + 1)

    def took(self, way: int, characters: int, seconds: float) -> None:
        self._characters[way] += characters
        self._seconds[way] += seconds
        self._since += characters


def make_cutter(specs: Specs, pieces: Sequence[str]) -> Cutter | None:
    """The exact cuts of a model; None where there are none that are known to be exact. ``pieces``: those that text can
    become, without control, unknown and byte pieces."""
    if not (specs.is_bpe and specs.leaves_text and pieces) or any("\0" in piece for piece in pieces):
        return None
    several = {character for piece in pieces if len(piece) > 1 for character in piece}
    return Cutter(pieces, specs.byte_fallback) if len(several) < _LETTERS else None


def _codes(text: str) -> np.ndarray:
    """Code points, uint32."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
