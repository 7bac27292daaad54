"""Parser of tool calls in an answer's text, as the chat template defines them: text before, then blocks

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

The marks may be control tokens written out, or plain text from older tokenizers that have no such tokens. The JSON of a
block decides where the block ends: a closing mark inside one of its strings is part of the string. A block that holds
no call is returned as text, and so is the reasoning of an answer that begins with <think>, whatever it holds.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import NoReturn

from telechat_twins.core.data.control import THINK, THINK_END, TOOL_CALL, TOOL_CALL_END
from telechat_twins.core.inference.text_stream import Thought, ThoughtStream


@dataclass(frozen=True)
class ToolCall:
    """A call of a function by the model; ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


AnswerPart = str | ToolCall
_WHITE = 64  # characters in front of <think>, at most
_SLICE = 4096  # characters of a piece that are read at once


class FirstCall:
    """Filter that ends a text behind its first call. ``found``: it has come. ``thinking``: the text begins inside
    <think>, where nothing is a call."""

    def __init__(self, thinking: bool = False) -> None:
        self._stream = ToolCallStream()
        self._thoughts = ThoughtStream() if thinking else None
        self.found = False

    def push(self, piece: str) -> str:
        """The text up to the end of the first call. Character by character, since a call may end inside a piece."""
        for place, character in enumerate("" if self.found else piece):
            texts = [character] if self._thoughts is None else self._thoughts.push(character)
            text = "".join(text for text in texts if not isinstance(text, Thought))
            if any(isinstance(part, ToolCall) for part in self._stream.push(text)):
                self.found = True
                return piece[: place + 1]
        return "" if self.found else piece


class ToolCallStream:
    """Incremental parser: takes pieces of text and returns text and calls as soon as each is certain.

    White space between words and a call is the answer's, since the layout puts none there; alone in front of the first
    call, or behind a call, it is dropped. An answer that ends inside a block counts as a call if the JSON of the block
    is complete: some models end without the closing mark.
    """

    def __init__(self) -> None:
        self._white: list[str] = []  # with nothing or a call before it, not emitted yet: a call may follow
        self._mark = ""  # the beginning of a mark, perhaps
        self._thought: str | None = ""  # the answer so far, while it may begin with <think>; then THINK, then None
        self._block: _Block | None = None
        self._called = False  # the last part emitted was a call
        self._said = False  # it was text

    def push(self, piece: str) -> list[AnswerPart]:
        """What this piece makes certain."""
        parts: list[AnswerPart] = []
        # Each block copies the rest of its piece; without slices, a long piece would cost the square of its length.
        for first in range(0, len(piece), _SLICE):
            part = piece[first : first + _SLICE]
            if self._thought is not None:
                part = self._reasoning(part, parts)
            while part:
                part = self._outside(part, parts) if self._block is None else self._inside(self._block, part, parts)
        return parts

    def flush(self) -> list[AnswerPart]:
        """What is left at the end of the answer."""
        parts: list[AnswerPart] = []
        while self._block is not None:
            block, self._block = self._block, None
            if block.call is not None:
                parts.append(block.call)
                self._called, self._said = True, False
                continue
            # No JSON ended here: the first closing mark ends the block after all, and what follows it is read anew.
            text, rest = _through_mark(block.text)
            self._emit(text, parts)
            parts += self.push(rest)
        held = "".join(self._white) + self._mark + (self._thought if self._thought not in (None, THINK) else "")
        self._white, self._mark, self._thought = [], "", None
        if held.strip() or not self._called:
            self._emit(held, parts)
        return parts

    def _reasoning(self, piece: str, parts: list[AnswerPart]) -> str:
        """Emit the reasoning with which the answer begins; returns what is behind it, "" while that is not known."""
        if self._thought != THINK:
            text = (self._thought or "") + piece
            begun = text.lstrip()
            near = len(text) - len(begun) < _WHITE
            if not (near and begun.startswith(THINK)):
                undecided = near and THINK.startswith(begun)
                self._thought = text if undecided else None
                return "" if undecided else text
            self._thought, piece = THINK, text
        text, self._mark = self._mark + piece, ""
        end = text.find(THINK_END)
        if end >= 0:
            self._thought = None
            self._emit(text[: end + len(THINK_END)], parts)
            return text[end + len(THINK_END) :]
        certain = len(text) - _mark_begun(text, THINK_END)
        self._emit(text[:certain], parts)
        self._mark = text[certain:]
        return ""

    def _outside(self, piece: str, parts: list[AnswerPart]) -> str:
        """Text up to the next block; returns what is left to read."""
        text, self._mark = self._mark + piece, ""
        begin = text.find(TOOL_CALL)
        certain = begin if begin >= 0 else len(text) - _mark_begun(text, TOOL_CALL)
        words = text[:certain]
        if words and (self._said or words.strip()):
            self._emit("".join(self._white) + words, parts)
            self._white = []
        elif words:
            self._white.append(words)
        if begin >= 0:
            self._white = []
            self._block = _Block()
            return text[begin + len(TOOL_CALL) :]
        self._mark = text[certain:]
        return ""

    def _inside(self, block: _Block, piece: str, parts: list[AnswerPart]) -> str:
        rest = block.push(piece)
        if rest is None:
            return ""
        self._block = None
        if block.call is not None:
            parts.append(block.call)
            self._called, self._said = True, False
        else:
            self._emit(block.text, parts)
        return rest

    def _emit(self, text: str, parts: list[AnswerPart]) -> None:
        if self._called:
            text = text.lstrip()
        if text:
            parts.append(text)
            self._called, self._said = False, True


# What matters outside and inside a string of JSON. Outside, "<" and "\" are in no JSON; inside, control characters.
_OUTSIDE, _INSIDE = re.compile(r'["{}<\\]'), re.compile(r'["\\\x00-\x1f]')


class _Block:
    """An open block, read once from left to right: where its JSON object ends, and behind that its closing mark.

    ``call`` is set once the object is whole and a call.
    """

    def __init__(self) -> None:
        self._parts = [TOOL_CALL]
        self._depth = 0  # of braces; 0 before the object
        self._in_string = self._escaped = False
        self._after: str | None = None  # behind the object: what could become the closing mark
        self._broken = False  # no JSON comes of it, so the first closing mark ends it
        self._recent = ""  # of a broken block: what may be the beginning of its closing mark
        self.call: ToolCall | None = None

    @property
    def text(self) -> str:
        """The block so far, with its marks."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, piece: str) -> str | None:
        """None while the block is open, else what of ``piece`` lies behind it."""
        self._parts.append(piece)
        if self._broken:
            return self._first_mark(self._recent + piece)
        at = self._scan(piece) if self._after is None else 0
        if self._after is not None:
            self._after = (self._after + piece[at:]).lstrip()
            if self._after.startswith(TOOL_CALL_END):
                rest = self._after[len(TOOL_CALL_END) :]
                self._parts = [self.text[: len(self.text) - len(rest)]]
                return rest
            if not TOOL_CALL_END.startswith(self._after):  # more than the object: no JSON
                self._after, self.call, self._broken = None, None, True
        return self._first_mark(self.text) if self._broken else None

    def _scan(self, piece: str) -> int:
        """Follow the object through ``piece`` as far as it goes; the place behind what was read."""
        at = 0
        if not self._depth:
            begin = len(piece) - len(piece.lstrip())
            if begin == len(piece):
                return begin
            if piece[begin] != "{":
                self._broken = True
                return begin
            self._depth, at = 1, begin + 1
        while at < len(piece):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = (_INSIDE if self._in_string else _OUTSIDE).search(piece, at)
            if found is None:
                return len(piece)
            at = found.end()
            sign = found[0]
            if sign == '"':
                self._in_string = not self._in_string
            elif self._in_string and sign == "\\":
                self._escaped = True
            elif self._in_string or sign in "<\\":
                self._broken = True
                return at
            else:
                self._depth += 1 if sign == "{" else -1
                if not self._depth:
                    self._close(piece, at)
                    return at
        return at

    def _close(self, piece: str, at: int) -> None:
        """The object's braces are closed at ``at`` of the newest piece."""
        whole = self.text
        try:
            found = _json(whole[len(TOOL_CALL) : len(whole) - len(piece) + at])
        except (ValueError, RecursionError):
            self._broken = True
            return
        self._after, self.call = "", _call_of(found)

    def _first_mark(self, recent: str) -> str | None:
        """What lies behind the first closing mark that ends in ``recent``, the newest text; None without one."""
        end = recent.find(TOOL_CALL_END)
        if end < 0:
            self._recent = recent[-len(TOOL_CALL_END) + 1 :]
            return None
        rest = recent[end + len(TOOL_CALL_END) :]
        self._parts = [self.text[: len(self.text) - len(rest)]]
        return rest


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """The text of a whole answer without its calls, and the calls: rendered again, the layout gives the same answer
    where all calls stand behind the text."""
    stream = ToolCallStream()
    parts = [*stream.push(text), *stream.flush()]
    words = "".join(part for part in parts if isinstance(part, str))
    return words, [part for part in parts if isinstance(part, ToolCall)]


def _mark_begun(text: str, mark: str) -> int:
    """The length of the end of ``text`` that could become the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def _through_mark(text: str) -> tuple[str, str]:
    """``text`` up to its first closing mark, and the rest."""
    before, mark, rest = text.partition(TOOL_CALL_END)
    return before + mark, rest


def _call_of(found: object) -> ToolCall | None:
    """The call that a block's JSON describes; None when it describes something else."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    try:
        if isinstance(arguments, str):  # JSON in JSON, as the answers of other servers carry it
            arguments = _json(arguments)
        if not isinstance(arguments, dict):
            return None
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (found["name"] + text).encode("utf-8")  # half a surrogate pair can be escaped in JSON, and nowhere written
    except (ValueError, RecursionError):
        return None
    return ToolCall(found["name"], text)


def _json(text: str) -> object:
    """ValueError or RecursionError unless ``text`` is JSON; NaN and Infinity are not."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    return json.loads(text, parse_constant=constant)
