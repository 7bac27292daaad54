"""Control tokens: which strings become one id when control tokens are allowed in text.

The released tokenizers differ only in this table; the SentencePiece file below it is the same. A table is data, so a
further release is one more row here and no new code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

START, END, PAD = "<_start>", "<_end>", "<_pad>"
USER, BOT, SYSTEM = "<_user>", "<_bot>", "<_system>"
TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
TOOL_RESPONSE, TOOL_RESPONSE_END = "<tool_response>", "</tool_response>"
THINK, THINK_END = "<think>", "</think>"  # pieces of TeleChat3's tokenizer; elsewhere ordinary text
TOOL_TOKENS = (TOOL_CALL, TOOL_CALL_END, TOOL_RESPONSE, TOOL_RESPONSE_END)

# The 115B file calls ids 9-12 <_control1..4>; later releases give them these names.
ALIASES = dict(zip(TOOL_TOKENS, ("<_control1>", "<_control2>", "<_control3>", "<_control4>"), strict=True))
Allow = bool | Collection[str]  # which control tokens of a table text may name: none, all, or those named
TELECHAT2_NAMES = (START, END, PAD, USER, BOT, SYSTEM, *TOOL_TOKENS)


@dataclass(frozen=True)
class ControlToken:
    """One string that is matched in text; the flags are those of Hugging Face's AddedToken."""

    text: str
    id: int
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class ControlTable:
    """The matched tokens and how they are written back when decoding.

    ``space_before``: the released class writes a space in front of a text segment that precedes a control token.
    ``spaced_ids``: ids joined to their neighbours by one space each (tokens MindFormers adds beyond the vocabulary).
    """

    tokens: tuple[ControlToken, ...] = ()
    space_before: bool = True
    spaced_ids: frozenset[int] = frozenset()

    def inside(self, vocab_size: int, replacements: dict[str, int]) -> ControlTable:
        """The table without ids that ``vocab_size`` rows cannot embed: replaced by name, or not matched at all."""
        kept = []
        for token in self.tokens:
            if token.id < vocab_size:
                kept.append(token)
            elif token.text in replacements:
                kept.append(ControlToken(token.text, replacements[token.text]))
        return ControlTable(tuple(kept), self.space_before, frozenset(i for i in self.spaced_ids if i < vocab_size))


def chat_table(control: dict[str, int], piece_id: Callable[[str], int | None], size: int) -> ControlTable:
    """The table of the 3B and 7B releases. ``<unk>`` is not a piece there and lies one past the vocabulary."""
    tokens = tuple(ControlToken(name, control[name]) for name in TELECHAT2_NAMES)
    return ControlTable((*tokens, ControlToken("<unk>", _or(piece_id("<unk>"), size))))


def released_115b_table(control: dict[str, int], piece_id: Callable[[str], int | None], size: int) -> ControlTable:
    """The table of the 115B file: three tokens, two of them only where a space (or nothing) stands beside them."""
    single = (ControlToken(name, control[name], single_word=True) for name in (END, PAD))
    return ControlTable((ControlToken(START, control[START]), *single))


def mindformers_table(control: dict[str, int], piece_id: Callable[[str], int | None], size: int) -> ControlTable:
    """MindFormers' tokenizer: names that are not pieces of the file are appended behind the vocabulary."""
    tokens = [ControlToken(name, control[name]) for name in (START, END, PAD, USER, BOT, SYSTEM)]
    appended: list[int] = []
    for name in ("<unk>", *TOOL_TOKENS):
        known = piece_id(name)
        if known is None:
            known = size + len(appended)
            appended.append(known)
        tokens.append(ControlToken(name, known))
    spaced = frozenset(t.id for t in tokens if t.id >= size and t.text != "<unk>")
    return ControlTable(tuple(tokens), space_before=False, spaced_ids=spaced)


TABLES = {"chat": chat_table, "released_115b": released_115b_table, "mindformers": mindformers_table}
# "auto": TeleChat2's table where the tokenizer has its pieces, else none.
CONTROL_CHOICES = ("auto", *TABLES, "none")


class Splitter:
    """Cuts text into ordinary segments and control tokens by the rules of Hugging Face's slow tokenizers."""

    def __init__(self, tokens: tuple[ControlToken, ...]):
        self._tokens = {t.text: t for t in tokens}
        self._patterns: dict[frozenset[str], re.Pattern[str]] = {}

    def split(self, text: str, names: Collection[str] | None = None) -> list[str | ControlToken]:
        """``names`` restricts the match to some tokens of the table; None means all of them."""
        allowed = frozenset(self._tokens) if names is None else frozenset(names) & frozenset(self._tokens)
        if not allowed or not text:
            return [text] if text else []
        pieces: list[str] = [p for p in self._pattern(allowed).split(text) if p]
        # In place and left to right on purpose: a token that is not extracted joins its neighbour, and the joined text
        # is what the next step looks at. That order is part of the released behaviour ("<_pad><_pad>a" stays text).
        for i, piece in enumerate(pieces):
            token = self._tokens.get(piece) if piece in allowed else None
            if token is None:
                continue
            left = pieces[i - 1] if i > 0 else ""
            right = pieces[i + 1] if i + 1 < len(pieces) else ""
            if token.rstrip and right:
                pieces[i + 1] = right.lstrip()
            if token.lstrip and left:
                pieces[i - 1] = left.rstrip()
            if token.single_word and left and left[-1] != " ":
                pieces[i - 1] += piece
                pieces[i] = ""
            elif token.single_word and right and right[0] != " ":
                pieces[i + 1] = piece + pieces[i + 1]
                pieces[i] = ""
        return [self._tokens[p] if p in allowed else p for p in pieces if p]

    def _pattern(self, allowed: frozenset[str]) -> re.Pattern[str]:
        if allowed not in self._patterns:
            # Longest first: alternation takes the first that fits, the release's trie takes the longest.
            ordered = sorted(allowed, key=lambda name: (-len(name), name))
            self._patterns[allowed] = re.compile("(" + "|".join(map(re.escape, ordered)) + ")")
        return self._patterns[allowed]


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
