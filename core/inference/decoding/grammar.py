"""Constrained decoding: the tokens that a grammar allows next, by llguidance.

A grammar is a text in llguidance's dialect of Lark, whose rules may be JSON schemas. It speaks of the bytes of the
answer; llguidance knows the bytes of every token and, by an Earley parser over derivatives of regular expressions,
which tokens continue a text that the grammar can still complete. Which of them is chosen is the sampler's matter.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np

from telechat_twins.core.backends import install_command
from telechat_twins.core.data.control import THINK_END, TOOL_CALL, TOOL_CALL_END
from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import printable
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from telechat_twins.core.data.tokenizer import Tokenizer

KEPT_GRAMMARS = 64  # compiled ones
# White space between the parts of JSON. llguidance's own pattern has no end, and a weak model may never leave it.
WHITE_SPACE = r"[ \n]{1,32}"
ANY_OBJECT: JsonObject = {"type": "object"}
# Pieces for what a vocabulary cannot write, whose text is not their name; and the byte that is a space, in which
# vocabularies have pieces, too: at the beginning of an answer a decoder drops the piece's space and keeps the byte's.
UNUSED = ("<unk>", "<UNK>", "<0x20>")
MIDDLE = "\x02"  # a character that no word begins with
Schema = JsonObject | bool


@dataclass(frozen=True)
class Words:
    """Texts that are no JSON: one of ``choice``, or those that the regular expression ``pattern`` matches as a whole
    (the syntax of Rust's crate regex, without look-around)."""

    choice: tuple[str, ...] = ()
    pattern: str = ""

    def rules(self, lead: str) -> list[str]:
        """The rule ``words``; ``lead``: see _lead."""
        if self.choice:
            # Where a tokenizer drops a space at the beginning, a text that has one needs another.
            leads = [lead.replace("?", "") if text.startswith(" ") else lead for text in self.choice]
            texts = [json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f") for text in self.choice]
            return [f"words: {' | '.join(map(str.__add__, leads, texts))}"]
        # A pattern stands between slashes on one line.
        line = re.sub(r"\\.|[/\n\r]", lambda found: _IN_PATTERN.get(found[0], found[0]), self.pattern, flags=re.DOTALL)
        return [f"words: {lead}WORDS", f"WORDS: /{line}/"]


_IN_PATTERN = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\\\n": r"\n", "\\\r": r"\r"}
Form = Schema | Words


class Grammars:
    """Compiler of grammars over one tokenizer. Its methods may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer | None, tokens: int, ends: Collection[int]) -> None:
        """``tokens``: of the vocabulary, without padding. ``ends``: those that may end an answer where its grammar is
        complete."""
        self._tokenizer, self._size, self._ends = tokenizer, tokens, sorted(ends)
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Read the vocabulary, about a second for 100,000 tokens; otherwise the first grammar does. UserError without
        llguidance or a tokenizer."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()

    def check(self, grammar: str) -> None:
        """UserError with llguidance's reason for a grammar that it cannot follow."""
        self._matcher(grammar)

    def constraint(self, grammar: str, stop_ids: Collection[int]) -> Constraint:
        """The state of a new answer under ``grammar``, which ends at ``stop_ids``. UserError as ``check``."""
        return Constraint(self._matcher(grammar).deep_copy(), self._size, self._ends, stop_ids)

    def _matcher(self, grammar: str) -> LLMatcher:
        self.prepare()
        from llguidance import LLMatcher

        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
        assert self._vocabulary is not None
        made = LLMatcher(self._vocabulary, grammar, log_level=0)
        if made.is_error():
            raise UserError(f"the grammar cannot be followed ({_reason(made.get_error())})")
        with self._lock:
            self._compiled[grammar] = made
            while len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        return made

    def _read_vocabulary(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ModuleNotFoundError:
            raise UserError(
                f"constrained decoding needs llguidance, which is not installed; run: {install_command('serve')}"
            ) from None
        if self._tokenizer is None:
            raise UserError("constrained decoding needs a tokenizer, found none; give --tokenizer")
        return LLTokenizer(
            TokenizerWrapper(_Words(self._tokenizer, self._size, self._ends[0])),
            n_vocab=self._size,
            eos_token=self._ends,
            slices=LLTokenizer.json_slices(),
        )


class _Words:
    """The vocabulary as llguidance's TokenizerWrapper reads it."""

    def __init__(self, tokenizer: Tokenizer, size: int, end: int) -> None:
        unused = [index for name in UNUSED if (index := tokenizer.token_id(name)) is not None]
        silent = {*tokenizer.silent.values(), *tokenizer.control.values(), *unused}
        self.eos_token_id, self.bos_token_id = end, None
        self.special_token_ids = sorted(index for index in silent if index < size)
        self.tokens = [tokenizer.token_bytes(index) for index in range(size)]
        silenced = set(self.special_token_ids)
        self._ids = {word: index for index, word in enumerate(self.tokens) if word and index not in silenced}
        self._longest = max(map(len, self._ids))
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        """The ids of a text in the middle of an answer; where a grammar leaves one text only, llguidance allows no
        other tokens than these. Their bytes must be the text's: llguidance does not compare them."""
        if isinstance(text, bytes):
            raise TypeError("text: must be str, found bytes")  # llguidance asks which of the two it may pass
        wanted = text.encode()
        # Behind a character of its own, so that SentencePiece puts no space before the text.
        ids = self._tokenizer.encode(MIDDLE + text)
        for first in range(1, min(len(ids), 4) + 1):
            if b"".join(self.tokens[index] for index in ids[:first]).lstrip() == MIDDLE.encode():
                if b"".join(self.tokens[index] for index in ids[first:]) == wanted:
                    return ids[first:]
                break
        return self._greedy(wanted)

    def _greedy(self, wanted: bytes) -> list[int]:
        """The longest words first, up to what the vocabulary cannot write."""
        ids: list[int] = []
        place = 0
        while place < len(wanted):
            lengths = range(min(self._longest, len(wanted) - place), 0, -1)
            found = next((n for n in lengths if wanted[place : place + n] in self._ids), None)
            if found is None:
                break
            ids.append(self._ids[wanted[place : place + found]])
            place += found
        return ids


class Constraint:
    """The state of one answer under its grammar. ``complete``: nothing more can follow."""

    def __init__(self, matcher: LLMatcher, size: int, ends: Sequence[int], stop_ids: Collection[int]) -> None:
        self._matcher, self._size = matcher, size
        self._ends, self._stop_ids = list(ends), set(stop_ids)
        self._wrong_ends = [end for end in ends if end not in self._stop_ids]

    def mask(self, scores: np.ndarray) -> np.ndarray:
        """Scores float64 [V] from scores [V], minus infinity for every token that the grammar does not allow next.

        UserError where it allows none: the vocabulary cannot write what the grammar asks for, or it is too complex.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self._size, bitorder="little").view(bool)
        allowed[self._wrong_ends] = False
        if self._matcher.is_error() or not allowed.any():
            reason = _reason(self._matcher.get_error()) or "no token of the vocabulary continues it"
            raise UserError(f"the answer's grammar cannot be followed any further ({reason})")
        return np.where(allowed, scores.astype(np.float64), -np.inf)

    def take(self, token: int) -> None:
        """Append a token that ``mask`` allowed. UserError where the grammar refuses it after all, which would otherwise
        look like a complete answer."""
        if token not in self._stop_ids and not self._matcher.consume_token(token):
            reason = _reason(self._matcher.get_error())
            raise UserError(f"the answer's grammar refuses token {token}, which it had allowed ({reason})")

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_stopped())


def answer_grammar(
    form: Form | None, calls: str | None, tokenizer: Tokenizer, thinking: bool = False, continues: bool = False
) -> str:
    """The grammar of an answer: a text of ``form``, or tool calls by the rules ``calls`` (``call_rules``), or either
    where both are given. ``thinking``: the answer begins inside <think>, whose text is free. ``continues``: it
    continues a text, so that a space before its first word would be part of it."""
    lead = "" if thinking else _lead(tokenizer)
    ways, rules = [], []
    if isinstance(form, Words):
        ways, rules = ["words"], form.rules("" if continues else lead)
    elif form is not None:
        ways, rules = [f"{lead}json_value"], [_json_rule("json_value", form)]
    ways += [] if calls is None else [f"{lead}calls"]
    start = f"({' | '.join(ways)})"
    lines = [f"start: thought {start}", *_thought(tokenizer)] if thinking else [f"start: {start}"]
    lines += rules
    return "\n".join([*lines, calls or ""]) + "\n"


def _thought(tokenizer: Tokenizer) -> list[str]:
    """The rule ``thought``: any text up to </think>, and the white space that the layout has behind it."""
    if THINK_END in tokenizer.silent:
        rules = [f"thought: FREE <[{tokenizer.silent[THINK_END]}]> GAP?", "FREE: /(?s:.*)/"]
    else:
        rules = ["thought: free GAP?", f"free[suffix={json.dumps(THINK_END)}]: /(?s:.*)/"]
    return [*rules, r"GAP: /[ \n]{1,4}/"]


def call_rules(functions: Mapping[str, Schema], several: bool, tokenizer: Tokenizer) -> str:
    """The rule ``calls``: a call of one of ``functions`` (name -> schema of its arguments) in the layout of the chat
    template, and with ``several`` any number of them, one a line."""
    silent = {**tokenizer.silent, **tokenizer.control}

    def mark(name: str) -> str:
        return f"<[{silent[name]}]>" if name in silent else json.dumps(name)

    named = []
    arguments = []
    for number, (name, schema) in enumerate(functions.items()):
        head = json.dumps(f'\n{{"name": "{name}", "arguments": ')
        named.append(f"{head} arguments_{number}")
        arguments.append(_json_rule(f"arguments_{number}", schema))
    close = json.dumps("}\n")
    call = f"call: {mark(TOOL_CALL)} {_lead(tokenizer)}({' | '.join(named)}) {close} {mark(TOOL_CALL_END)}"
    more = f' ({_lead(tokenizer)}"\\n" call)*' if several else ""
    return "\n".join([f"calls: call{more}", call, *arguments])


def _json_rule(name: str, schema: Schema) -> str:
    body = {} if schema is True else schema
    if not isinstance(body, dict):
        raise UserError("the schema false allows no value; give an object")
    if "x-guidance" in body:
        raise UserError("the key x-guidance is llguidance's own and not part of JSON Schema; leave it out")
    _refuse_circles(body)
    return f"{name}: %json {json.dumps({**body, 'x-guidance': {'whitespace_pattern': WHITE_SPACE}})}"


def _refuse_circles(schema: JsonObject) -> None:
    """UserError for a reference that leads back to itself before any value begins, which llguidance takes for a grammar
    and then cannot follow."""
    nodes: list[JsonObject] = []
    stack: list[object] = [schema]
    while stack:
        node = stack.pop()
        stack += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        nodes += [node] if isinstance(node, dict) else []
    # The least set of nodes where a value can begin: each that waits for others is judged anew when one of them joins.
    needs = {id(node): _needs(node, schema) for node in nodes}
    waiting: dict[int, list[int]] = {}
    for place, (parts, ways) in needs.items():
        for other in (*parts, *ways):
            waiting.setdefault(other, []).append(place)
    begin: set[int] = set()
    judged = set(needs)
    while judged:
        joined = {
            place
            for place in judged
            if begin.issuperset(needs[place][0]) and (not needs[place][1] or not begin.isdisjoint(needs[place][1]))
        }
        begin |= joined
        judged = {place for other in joined for place in waiting.get(other, ())} - begin
    if len(begin) < len(needs):
        raise UserError("the grammar cannot be followed (a $ref leads back to itself before any value begins)")


def _needs(node: JsonObject, schema: JsonObject) -> tuple[list[int], list[int]]:
    """(places that must all let a value begin for ``node`` to do so, places of which one must)."""
    parts = [_pointed(schema, node["$ref"])] if isinstance(node.get("$ref"), str) else []
    parts += node["allOf"] if isinstance(node.get("allOf"), list) else []
    ways = node.get("anyOf") or node.get("oneOf")
    alternatives = ways if isinstance(ways, list) and all(isinstance(way, dict) for way in ways) else []
    return [id(part) for part in parts if isinstance(part, dict)], [id(way) for way in alternatives]


def _pointed(schema: JsonObject, reference: str) -> object:
    """What a local reference points at; None for any other, of which llguidance itself says what is wrong."""
    place, *keys = reference.split("/")
    node: object = schema if place == "#" else None
    for key in keys:
        key = unquote(key).replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            node = node.get(key) if isinstance(node, dict) else None
    return node


def _lead(tokenizer: Tokenizer) -> str:
    """A space that SentencePiece's tokenizers put at the beginning of a text, and drop when they decode it."""
    return '" "? ' if tokenizer.token_bytes(tokenizer.encode("{")[0]).startswith(b" ") else ""


def _reason(text: str) -> str:
    """The reason in llguidance's message, without its place in the grammar, the grammar, and the parser's state."""
    text = re.split(r"\n<state>|\n\s*1 \| ", text)[0]
    return printable(" ".join(re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text).split()), 300)
