"""Incremental detokenization; holds back partial characters and partial stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from telechat_twins.core.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what the decoder returns for bytes that are not (yet) a character
CONTEXT_TOKENS = 16  # of a prompt's end: more than the 4 bytes of a character and a word before it


class TextStream(Protocol):
    """Incremental detokenization: ids in, text out (core.data.detokenizer.StreamDecoder)."""

    @property
    def start(self) -> int: ...

    @property
    def length(self) -> int: ...

    def push(self, token: int, /) -> str: ...

    def flush(self) -> str: ...


def text_stream(
    tokenizer: Tokenizer, context: Sequence[int] = (), shown: Mapping[int, str] | None = None
) -> TextStream:
    """A detokenizer of one answer: tokens in (``push``), text out. The pieces, the last one from ``flush`` included,
    add up to the decoding of all tokens.

    A character of several byte tokens is held back until it is complete. Control tokens give no text, except those in
    ``shown``, which gives their text. With ``context`` (the prompt's ids, for a continuation of raw text) the first
    word keeps the space between it and the prompt. ``length`` and ``start`` are StreamDecoder's, without the context.
    """
    if shown:
        return ShownControl(tokenizer, shown)
    context = list(context)[-CONTEXT_TOKENS:]
    stream = tokenizer.stream()
    # A prompt that ends inside a character is not used as context: that half would come out with the continuation.
    if context and not tokenizer.decode(context, skip_special=True).endswith(REPLACEMENT):
        for token in context:
            stream.push(token)
        stream.restart_count()
    return stream


class ShownControl:
    """A text stream that writes some control tokens as text; what lies between two of them is decoded separately."""

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[int, str]) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._stream = tokenizer.stream()
        self._before = 0  # characters before those of the present stream
        self.start = 0

    @property
    def length(self) -> int:
        return self._before + self._stream.length

    def push(self, token: int) -> str:
        if token not in self._shown:
            text = self._stream.push(token)
            self.start = self._before + self._stream.start
            return text
        text = self._stream.flush()
        self.start = self.length
        self._before, self._stream = self.start + len(self._shown[token]), self._tokenizer.stream()
        return text + self._shown[token]

    def flush(self) -> str:
        return self._stream.flush()


class StopText:
    """Filter that ends a text at a stop string, and holds back what may become one. ``found``: the stop string that
    ended the text, if any.

    The text ends before the stop string that is completed first, in whatever pieces it arrives; if two are completed by
    the same character, before the longer one.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that may be shown after this piece; what may still become a stop string is held back."""
        if not self._stops or self.found is not None:
            return "" if self.found is not None else piece
        text = self._held + piece
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            _, at, self.found = min(matches)
            self._held = ""
            return text[:at]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The text held back, at the end of a text without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
