"""Incremental detokenization; holds back partial characters and partial stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from telechat_twins.core.data.control import THINK_END

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


class Thought(str):
    """Text that a model reasons with before its answer."""


class ThoughtStream:
    """Splits an answer that begins inside <think>: reasoning up to </think>, then the answer. The white space at either
    side of the mark belongs to the layout and is dropped; an answer without the mark is all reasoning."""

    def __init__(self) -> None:
        self._held = ""  # white space and, perhaps, the beginning of the mark
        self._answering, self._begun = False, False

    @property
    def reasoning(self) -> bool:
        """Whether the mark at the end of the reasoning has not come yet."""
        return not self._answering

    def push(self, piece: str) -> list[str]:
        """What this piece makes certain: Thoughts, then plain text."""
        if self._answering:
            return self._answer(piece)
        text, self._held = self._held + piece, ""
        if not self._begun:
            text = text.lstrip()
        thought, mark, rest = text.partition(THINK_END)
        if not mark:
            kept = next((n for n in range(len(THINK_END) - 1, 0, -1) if text.endswith(THINK_END[:n])), 0)
            certain = text[: len(text) - kept].rstrip()
            thought, self._held = certain, text[len(certain) :]
        else:
            thought, self._answering = thought.rstrip(), True
        parts: list[str] = [Thought(thought)] if thought else []
        self._begun = bool(parts or self._begun) and not self._answering
        return [*parts, *self._answer(rest)]

    def flush(self) -> list[str]:
        """What is left at the end: the beginning of a mark that did not come."""
        held, self._held = self._held, ""
        return [Thought(held)] if held.strip() else []

    def _answer(self, text: str) -> list[str]:
        text = text if self._begun else text.lstrip()
        self._begun = bool(text or self._begun)
        return [text] if text else []


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
