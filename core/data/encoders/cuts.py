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

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from telechat_twins.core.files.protobuf import fields

SPACE = "\u2581"  # what SentencePiece writes for a space
# Characters that are looked at as cuts of their own, where no piece joins them to anything.
_CANDIDATES = "\n\t" + "".join(map(chr, range(33, 127))) + "，。、；：？！“”‘’（）《》【】…—·「」『』"

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
    """The cuts of one model.

    ``words``: a text, in which spaces are spaces, as parts that encode one by one. ``short``: whether the parts are
    words, which come again and again.
    """

    def __init__(self, words: Callable[[str], list[str]], short: bool, pieces: frozenset[str], fallback: bool) -> None:
        """``fallback``: characters without a piece are bytes."""
        self.words, self.short = words, short
        self._pieces, self._fallback = pieces, fallback

    def last(self, text: str) -> int:
        """The last place at which ``text`` may be cut; 0 without one."""
        text = text.replace(" ", SPACE)
        places = range(len(text) - 1, 0, -1)
        return next((place for place in places if self._may_cut(text[place - 1], text[place])), 0)

    @functools.cached_property
    def _pairs(self) -> frozenset[str]:
        """Neighbours in a piece."""
        return frozenset(piece[n : n + 2] for piece in self._pieces for n in range(len(piece) - 1))

    def _may_cut(self, left: str, right: str) -> bool:
        known = self._fallback or left in self._pieces or right in self._pieces
        return known and left + right not in self._pairs


def make_cutter(specs: Specs, pieces: Iterable[str]) -> Cutter | None:
    """The exact cuts of a model; None where there are none that are known to be exact. ``pieces``: those that text can
    become, without control, unknown and byte pieces."""
    if not (specs.is_bpe and specs.leaves_text):
        return None
    known = frozenset(pieces)
    several = [piece for piece in known if len(piece) > 1]
    joined = "\0".join(several)  # every pair of neighbours, quickly searched
    if joined.count("\0") >= max(1, len(several)):  # a piece holds the separator
        return None

    def certain(character: str) -> bool:
        return specs.byte_fallback or character in known

    alone = [character for character in _CANDIDATES if character not in joined and certain(character)]
    # A word begins with the spaces in front of it, so that no piece may have a space behind anything but a space.
    by_words = certain(SPACE) and re.search(f"[^\0{SPACE}]{SPACE}", joined) is None
    if not (alone or by_words):
        return None
    marks = "".join(map(re.escape, alone))
    either = f"[{marks}]|" if marks else ""
    pattern = re.compile(f" *[^ {marks}]+|{either} +" if by_words else f"[{marks}]|[^{marks}]+")
    return Cutter(pattern.findall, by_words, known, specs.byte_fallback)
