"""Dialogues written as one text: a table of the marks by which turns are told.

A text is a transcript of a style if it begins with one of the style's marks, users and assistants take turns, and no
other mark of the style is left in what they say. Everything else stays the text that it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from telechat_twins.core.data.control import END, START, TOOL_TOKENS
from telechat_twins.core.types import JsonObject

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("assistant", "moss", "bot"), "assistant"),
    "system": "system",
}
FUNCTIONS = "access to the following functions"  # what begins a list of tools in Glaive's system texts


@dataclass(frozen=True)
class Style:
    """``name`` for messages. ``mark``: begins a turn, its group the speaker. ``ends``: end a turn where they stand.
    ``exact``: spaces around what is said belong to it. ``strange``: what no turn may hold, for it is not read.
    ``strict``: users and assistants take turns."""

    name: str
    mark: re.Pattern[str]
    ends: tuple[str, ...] = ()
    exact: bool = False
    strange: tuple[str, ...] = ()
    strict: bool = True


HUMAN_PARAGRAPHS = Style(
    "paragraphs of Human: and Assistant:", re.compile(r"\n\n(Human|Assistant):[ ]?"), exact=True, strict=False
)
HUMAN_LINES = Style("lines of Human: and Assistant:", re.compile(r"(?:\A\s*|\n)(Human|Assistant)[:\uff1a][ ]?"))
_MOSS = ("<eoh>", "<eoa>", "<eom>")
STYLES = (
    Style("<_user> and <_bot>", re.compile("<_(system|user|bot)>"), (END,), True, (*TOOL_TOKENS, START)),
    Style(
        "ChatML",
        re.compile(r"<\|im_start\|>(system|user|assistant)\n"),
        ("<|im_end|>",),
        True,
        ("<|im_start|>", "<tool_call>", "<tool_response>"),
    ),
    HUMAN_PARAGRAPHS,
    Style("### Human: and ### Assistant:", re.compile(r"\s*### ?(System|Human|User|Assistant):[ ]?")),
    Style(
        "lines of USER: and ASSISTANT:",
        re.compile(r"(?:\A\s*|\n+)(SYSTEM|USER|ASSISTANT):[ ]?"),
        ("<|endoftext|>",),
        strange=("<functioncall>", "FUNCTION RESPONSE:"),
    ),
    Style("[Human]: and [MOSS]:", re.compile(r"\s*\[(Human|MOSS)\]:[ ]?"), _MOSS, strange=("<eo",)),
    Style("<|Human|>: and <|MOSS|>:", re.compile(r"\s*<\|(Human|MOSS)\|>:[ ]?"), _MOSS, strange=("<eo", "<|")),
    HUMAN_LINES,
)


def transcript(text: str, styles: tuple[Style, ...] = STYLES) -> tuple[Style | None, list[JsonObject] | None]:
    """(the style whose mark a text begins with, its messages); None for a text in no style, and for messages where
    they cannot be told. A last turn without words, in which the answer would follow, is left out."""
    for style in styles:
        if style.mark.match(text):
            return style, _turns(text, style)
    return None, None


def asked_in_turns(text: str) -> list[JsonObject] | None:
    """The messages of a question that is a transcript up to its open last answer (Belle's multi-turn rows)."""
    if not re.search(r"\nAssistant[:\uff1a]\s*\Z", text):
        return None
    return transcript(text, (HUMAN_LINES,))[1]


def _turns(text: str, style: Style) -> list[JsonObject] | None:
    parts = style.mark.split(text)
    if parts[0].strip():
        return None
    messages: list[JsonObject] = []
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        role = _ROLES[speaker.lower()]
        words = _said(said, style, role)
        if words is None or (style.strict and not _follows(role, messages)):
            return None
        messages.append({"role": role, "content": words})
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages or None


def _said(said: str, style: Style, role: str) -> str | None:
    """What a turn says; None where something stands behind its end, or a mark of another turn is left in it."""
    for end in style.ends:
        said, found, rest = said.partition(end)
        if found and rest.strip():
            return None
    if any(mark in said for mark in style.strange):
        return None
    if not style.exact:
        return said.strip()
    return said.removesuffix("\n") if role == "system" else said


def _follows(role: str, messages: list[JsonObject]) -> bool:
    """Whether a turn may stand behind ``messages``: a system's first, then a user's and an assistant's by turns."""
    if role == "system":
        return not messages
    before = messages[-1]["role"] if messages else "system"
    return before == "user" if role == "assistant" else before != "user"
