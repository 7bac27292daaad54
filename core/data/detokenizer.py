"""Incremental detokenization: one id in, text out, in total time linear in the number of ids.

Of byte-level tokenizers (``ByteDecoder``) a text is the bytes of its tokens; only a character's first bytes are held
back until the rest of it has come. SentencePiece's decoding (``StreamDecoder``) is the concatenation of what each piece
writes, with two exceptions: white space at the very beginning of a text is dropped, and neighbouring byte pieces form
characters. So a piece in the middle of a text is decoded behind a fixed visible one (``anchor``), and only byte pieces
that may still become a character are held back.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what stands for bytes that are not a character


class Pieces(Protocol):
    """What of a tokenizer the decoder needs."""

    @property
    def anchor(self) -> int | None:
        """An ordinary token that writes visible text, of whole characters."""

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of ids, ``skip_special`` without the control tokens."""

    def is_silent(self, index: int) -> bool:
        """Whether the token writes nothing, wherever it stands."""

    def byte_of(self, index: int) -> int | None:
        """The byte that a byte piece stands for."""


class Decoder(Protocol):
    """A decoder for ids that arrive one by one; ``StreamDecoder`` says what its parts mean."""

    @property
    def start(self) -> int: ...

    @property
    def length(self) -> int: ...

    def push(self, index: int, /) -> str: ...

    def flush(self) -> str: ...

    def push_all(self, ids: Sequence[int], /) -> str: ...

    def restart_count(self) -> None: ...


class StreamDecoder:
    """Text of ids that arrive one by one. All pieces with the last (``flush``) add up to the decoding of all the ids
    without control tokens.

    ``length``: characters that have come out. ``start``: the place in the text where the last id's own text begins;
    all bytes of one character have that character's place, and an id without text has the place of what follows it.
    """

    def __init__(self, tokenizer: Pieces) -> None:
        self._tokenizer = tokenizer
        self._anchor = [] if tokenizer.anchor is None else [tokenizer.anchor]
        self._anchor_length = len(tokenizer.decode(self._anchor, skip_special=True))
        # Ids at the beginning that wrote nothing there (white space); None once some text has come out.
        self._leading: list[int] | None = []
        self._bytes: list[int] = []  # ids of byte pieces that may become a character with the next ones
        self.length = self.start = 0

    def push(self, index: int) -> str:
        """The text that this id completes; empty while a character's bytes are still coming."""
        token = int(index)
        if self._tokenizer.is_silent(token):
            self.start = self.length
            return ""
        byte = self._tokenizer.byte_of(token)
        held, self._bytes = self._bytes, []
        if byte is None:
            before = len(self._text(held))
            text = self._release([*held, token])
            self.start = self.length - len(text) + before
            return text
        ids = [*held, token]
        open_bytes = _unfinished(bytes(self._byte(i) for i in ids))
        self._bytes = ids[len(ids) - open_bytes :]
        text = self._release(ids[: len(ids) - open_bytes])
        # What is released either ends with this byte's character (or its replacement), or lies before it.
        self.start = self.length if open_bytes else self.length - 1
        return text

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._bytes = self._bytes, []
        return self._release(held)

    def push_all(self, ids: Sequence[int]) -> str:
        """The text of many ids, none of them silent, with all that is held back: ``push`` of each and ``flush``."""
        held, self._bytes = self._bytes, []
        text = self._release([*held, *ids])
        self.start = self.length
        return text

    def restart_count(self) -> None:
        """Count ``length`` and ``start`` from here."""
        self.length = self.start = 0

    def _release(self, ids: list[int]) -> str:
        text = self._text(ids)
        self.length += len(text)
        if text:
            self._leading = None
        elif self._leading is not None and ids:
            self._leading = ids[-1:]
        return text

    def _text(self, ids: list[int]) -> str:
        """What ``ids`` write at this place of the text."""
        if not ids:
            return ""
        if self._leading is not None:
            return self._tokenizer.decode([*self._leading, *ids], skip_special=True)
        return self._tokenizer.decode([*self._anchor, *ids], skip_special=True)[self._anchor_length :]

    def _byte(self, index: int) -> int:
        byte = self._tokenizer.byte_of(index)
        assert byte is not None
        return byte


class ByteTokens(Protocol):
    """What of a byte-level tokenizer the decoder needs."""

    def is_silent(self, index: int) -> bool:
        """Whether the token writes nothing, wherever it stands."""

    def token_bytes(self, index: int) -> bytes:
        """The bytes that the token stands for."""


class ByteDecoder:
    """``StreamDecoder`` for tokens that are bytes: a character may begin in one token and end in another."""

    def __init__(self, tokenizer: ByteTokens) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.length = self.start = 0

    def push(self, index: int) -> str:
        """The text that this id completes; empty while a character's bytes are still coming."""
        token = int(index)
        if self._tokenizer.is_silent(token):
            self.start = self.length
            return ""
        data = self._tokenizer.token_bytes(token)
        text = ""
        if self._decoder.getstate()[0] == b"\xed" and data[:1] >= b"\xa0":
            # Half of a surrogate is no character, which Python's decoder would find at the next byte only.
            text = self._decoder.decode(b"", final=True)
            self._decoder.reset()
        # A first byte that does not go on with the character begun comes behind the replacement for that one.
        text += self._decoder.decode(data[:1])
        self.start = self.length + len(text) - (not self._decoder.getstate()[0])
        text += self._decoder.decode(data[1:])
        self.length += len(text)
        return text

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self.length += len(text)
        return text

    def push_all(self, ids: Sequence[int]) -> str:
        """The text of many ids, none of them silent, with all that is held back: ``push`` of each and ``flush``."""
        text = self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids)), final=True)
        self._decoder.reset()
        self.length += len(text)
        self.start = self.length
        return text

    def restart_count(self) -> None:
        """Count ``length`` and ``start`` from here."""
        self.length = self.start = 0


def _unfinished(data: bytes) -> int:
    """The length of the end of ``data`` with which a UTF-8 character begins that is not complete."""
    for size in range(min(3, len(data)), 0, -1):
        try:
            _, used = codecs.utf_8_decode(data[-size:], "strict", False)
        except UnicodeDecodeError:
            continue
        if used == 0:
            return size
    return 0
