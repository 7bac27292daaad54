"""Tool calls in an answer's text, as the chat template asks for them: text before, then blocks

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

The marks may be control tokens that were written out or plain text: older tokenizers have no such tokens. A block that
holds no call stays the text that it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from core.data.control import TOOL_CALL, TOOL_CALL_END


@dataclass(frozen=True)
class ToolCall:
    """``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


Said = str | ToolCall


class ToolCallStream:
    """Pieces of text in, text and calls out as soon as each is certain.

    White space beside a call belongs to the layout and is dropped. An answer that ends inside a block whose JSON is
    whole has made that call: some models end without the closing mark.
    """

    def __init__(self) -> None:
        self._held = ""  # not told yet: the beginning of a mark, white space, or an open block with its mark
        self._inside = False
        self._called = False  # the last thing told was a call

    def push(self, piece: str) -> list[Said]:
        """What this piece makes certain."""
        self._held += piece
        said: list[Said] = []
        while self._step(said):
            pass
        return said

    def flush(self) -> list[Said]:
        """What is left at the end of the answer."""
        said: list[Said] = []
        held, self._held = self._held, ""
        if self._inside:
            self._inside = False
            self._tell_block(held, "", said)
        elif held.strip() or not self._called:
            self._tell(held, said)
        return said

    def _step(self, said: list[Said]) -> bool:
        """One certain thing out of ``_held``; whether there may be another."""
        if self._inside:
            end = self._held.find(TOOL_CALL_END)
            if end < 0:
                return False
            block, self._held = self._held[: end + len(TOOL_CALL_END)], self._held[end + len(TOOL_CALL_END) :]
            self._inside = False
            self._tell_block(block, TOOL_CALL_END, said)
            return True
        begin = self._held.find(TOOL_CALL)
        if begin >= 0:
            self._tell(self._held[:begin].rstrip(), said)
            self._held, self._inside = self._held[begin:], True
            return True
        certain = len(self._held) - _mark_begun(self._held)
        certain = len(self._held[:certain].rstrip())
        text, self._held = self._held[:certain], self._held[certain:]
        self._tell(text, said)
        return False

    def _tell_block(self, block: str, closing: str, said: list[Said]) -> None:
        call = _call_in(block[len(TOOL_CALL) : len(block) - len(closing)])
        if call is None:
            self._tell(block, said)
            return
        said.append(call)
        self._called = True

    def _tell(self, text: str, said: list[Said]) -> None:
        if self._called:
            text = text.lstrip()
        if text:
            said.append(text)
            self._called = False


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """The text of a whole answer without its calls, and the calls."""
    stream = ToolCallStream()
    said = [*stream.push(text), *stream.flush()]
    words = "".join(part for part in said if isinstance(part, str))
    return words, [part for part in said if isinstance(part, ToolCall)]


def _mark_begun(text: str) -> int:
    """The length of the end of ``text`` that could become the opening mark."""
    for size in range(min(len(TOOL_CALL) - 1, len(text)), 0, -1):
        if TOOL_CALL.startswith(text[-size:]):
            return size
    return 0


def _call_in(block: str) -> ToolCall | None:
    try:
        found: Any = json.loads(block)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    if isinstance(arguments, str):  # JSON in JSON, as the answers of other servers carry it
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return ToolCall(found["name"], json.dumps(arguments, ensure_ascii=False))
