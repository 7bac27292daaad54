"""The pieces of a tokenizer.model, read from its bytes at once instead of one by one from the library."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Of sentencepiece_model.proto: ModelProto.pieces, and of each its piece, its score and its type.
PIECE, _NAME, _SCORE, _TYPE = 1 << 3 | 2, 1 << 3 | 2, 2 << 3 | 5, 3 << 3
_SCORE_BYTES, _TYPE_BYTES = 5, 2  # key and value
NORMAL, UNKNOWN, CONTROL, _USER_DEFINED, _UNUSED, BYTE = range(1, 7)
_MOST = 1 << 8  # bytes of the keys and sizes of a piece, and behind the data as many zeros


class PieceTable(NamedTuple):
    """``names`` of all pieces, the ``types`` of each, uint8 [pieces], and where the model goes on behind them."""

    names: list[str]
    types: np.ndarray
    end: int

    @property
    def special(self) -> np.ndarray:
        """Whether text does not become a piece: those of control, of one byte, and the unknown one, bool."""
        return (self.types == CONTROL) | (self.types == BYTE) | (self.types == UNKNOWN)


def read_pieces(data: bytes) -> PieceTable | None:
    """The pieces with which a serialized ModelProto begins, if each has a name, a score and perhaps a type, in this
    order and no more, as SentencePiece writes them; None otherwise.

    UnicodeDecodeError for a name that is not UTF-8.
    """
    found = np.frombuffer(data + bytes(_MOST), np.uint8)
    # The size of a piece takes one byte or two, and the piece itself comes first.
    begins = np.flatnonzero((found[:-3] == PIECE) & ((found[2:-1] == _NAME) | (found[3:] == _NAME)))
    begins, names, lengths, ends = _plausible(found, begins, len(data))
    # What looks like a piece inside of one that begins before it is none.
    outside = np.ones(len(begins), bool)
    outside[1:] = begins[1:] >= np.maximum.accumulate(ends)[:-1]
    begins, names, lengths, ends = (part[outside] for part in (begins, names, lengths, ends))
    # From the first byte on, each begins where the one before it ends, and behind the last is no further one.
    if not len(begins) or begins[0] or (begins[1:] != ends[:-1]).any() or found[ends[-1]] == PIECE:
        return None
    types = np.where(ends - names - lengths > _SCORE_BYTES, found[ends - 1], NORMAL)
    listed = _text(found, names, lengths).decode().split("\0")[:-1]
    return PieceTable(listed, types, int(ends[-1])) if len(listed) == len(begins) else None


def _plausible(found: np.ndarray, begins: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """Those of the places ``begins`` that look like the beginning of a piece: where they are, where the name begins,
    how long it is, and where the piece ends."""
    wide, sizes = _size(found, begins + 1)
    heads = begins + 2 + wide
    wide, lengths = _size(found, heads + 1)
    names, ends = heads + 2 + wide, heads + sizes
    rest = ends - names - lengths
    fits = (found[heads] == _NAME) & (ends <= size) & (lengths > 0)
    fits &= (rest == _SCORE_BYTES) | (rest == _SCORE_BYTES + _TYPE_BYTES)
    begins, names, lengths, ends, rest = (part[fits] for part in (begins, names, lengths, ends, rest))
    scores = names + lengths
    typed = rest > _SCORE_BYTES
    fits = (found[scores] == _SCORE) & (~typed | (found[scores + _SCORE_BYTES] == _TYPE) & (found[ends - 1] < 0x80))
    return tuple(part[fits] for part in (begins, names, lengths, ends))


def _size(found: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the sizes at some places: whether they take two bytes, and what they are; what takes more is too large to be
    that of a piece that fits."""
    low, high = found[at].astype(np.int64), found[at + 1].astype(np.int64)
    wide = low >= 0x80
    return wide, np.where(wide, low & 0x7F | np.where(high < 0x80, high << 7, len(found)), low)


def _text(found: np.ndarray, names: np.ndarray, lengths: np.ndarray) -> bytes:
    """All names, a zero byte behind each."""
    change = np.zeros(len(found), np.int8)
    change[names] = 1
    change[names + lengths + 1] -= 1
    text = found[np.cumsum(change, dtype=np.int8).view(bool)]
    text[np.cumsum(lengths + 1) - 1] = 0
    return text.tobytes()
