"""Prompts of rows: every dialogue without its last answer, or a line of a text file as a user's question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.data.chat_layout import ChatLayout
from telechat_twins.core.data.control import TOOL_TOKENS
from telechat_twins.core.data.dialogues import Dialogue, parse_dialogue
from telechat_twins.core.data.forms.formats import TOKENS, form_of
from telechat_twins.core.data.forms.streams import UTF8
from telechat_twins.core.data.forms.texts import text_blocks
from telechat_twins.core.data.kinds.messages import ANSWERS, Reading
from telechat_twins.core.data.kinds.table import DIALOGUE, is_empty, kinds_with, mark_keys
from telechat_twins.core.data.rows import find_inputs, read_rows
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.chat import assistant_message
from telechat_twins.core.inference.text_stream import Thought, ThoughtStream
from telechat_twins.core.inference.tool_calls import parse_tool_calls
from telechat_twins.core.types import JsonObject


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the answer to be generated. ``row``: the row it was read from, as parsed.

    ``messages`` begin with the system message where the row has one; earlier answers are among them. ``tags``: the tool
    tags inside contents count as control tokens, as in core.data.dialogues.Dialogue. ``thinks``: the answer begins with
    reasoning, whose opening <think> the chat layout has put into the prompt.
    """

    where: str
    row: JsonObject
    messages: list[JsonObject]
    tools: list[object] | None = None
    tags: bool = False
    thinks: bool = False

    @property
    def calls_tools(self) -> bool:
        """Whether the answer may hold tool calls."""
        return bool(self.tools) or self.tags


@dataclass(frozen=True)
class Survey:
    """Size of a set of prompts: their number, the ids of the longest one, and a SHA-256 of all of them."""

    count: int
    longest: list[int]
    digest: str


def read_prompts(
    inputs: Sequence[str | Path], reading: Reading, encoding: str = UTF8, thinks: bool = False
) -> Iterator[Prompt]:
    """The prompts of files of rows (all forms and dialogue kinds that ``tele data --sft`` reads) and of text files.

    In a row, the messages up to the last answer (the last run of assistant's messages); a row that ends with a question
    is a prompt as a whole, as is one that has a question under a key of its own and no answer. In a text file, each
    line that is not blank. UserError, naming file and line, for rows that cannot be read and for a row without a
    question. ``thinks``: as in Prompt.
    """
    for path in find_inputs(inputs):
        form = form_of(path)
        if form.name == TOKENS:
            raise UserError(
                f"{path}: must hold rows or lines of text, found token ids; give the text they were made of"
            )
        if not form.holds_rows:
            yield from _lines(path, encoding, thinks)
            continue
        for where, row in read_rows(path, None, encoding):
            yield _prompt_of(parse_dialogue(_answered(row, reading), where, reading=reading), row, thinks)


_UNANSWERED = "-"  # stands for the answer that a row has not, and is left out with it


def _answered(row: JsonObject, reading: Reading) -> JsonObject:
    """``row``, with an answer where it has but a question: {"prompt": ...}, {"instruction": ..., "input": ...}."""
    given = {key for key, value in row.items() if key not in reading.ignore and not is_empty(value)}
    kinds = kinds_with(reading.columns.parts)
    if any(kind.use == DIALOGUE and kind.marked_by(given) for kind in kinds.values()):
        return row
    slots = {"alpaca": "instruction", "query": "question", "completion": "prompt"}
    asked = {name: slot for name, slot in slots.items() if reading.kind in (None, name)}
    found = [kinds[name] for name, slot in asked.items() if given.intersection(kinds[name].slots[slot])]
    names = [name for kind in found for name in kind.slots["answer"] if name not in reading.ignore]
    return {**row, names[0]: _UNANSWERED} if len(found) == 1 and names else row


def prompt_encoder(layout: ChatLayout, bos: int | None) -> Callable[[Prompt], list[int]]:
    """A function from a prompt to its ids in a chat layout, up to where the answer begins; ``bos`` goes in front."""

    def encode(prompt: Prompt) -> list[int]:
        ids = layout.encode(prompt.messages, prompt.tools, allow_control=TOOL_TOKENS if prompt.tags else False)
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    return encode


def survey(prompts: Iterator[Prompt], encode: Callable[[Prompt], list[int]]) -> Survey:
    """Read all prompts once. UserError where there is none, and for what ``encode`` refuses, with file and line."""
    count, longest, digest = 0, list[int](), hashlib.sha256()
    for prompt in prompts:
        try:
            ids = encode(prompt)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from None
        count += 1
        longest = max(longest, ids, key=len)
        part = [prompt.messages, prompt.tools, prompt.tags, prompt.row]
        digest.update(json.dumps(part, ensure_ascii=True, default=str).encode() + b"\n")
    if not count:
        raise UserError("--prompts: must hold a row or a line of text, found none; name files with prompts")
    return Survey(count, longest, digest.hexdigest())


def answered_row(prompt: Prompt, text: str) -> JsonObject:
    """A row of kind "messages" that ``tele data --sft`` reads: the prompt with ``text`` as its answer.

    Earlier answers get weight 0: they are context, and only ``text`` is learnt.
    """
    return {"messages": [*_context(prompt), answer_message(prompt, text)], **_setting(prompt)}


def preference_row(prompt: Prompt, chosen: str, rejected: str) -> JsonObject:
    """A row that ``tele data --preference`` reads: a prompt and two answers to it."""
    sides = {"chosen": [answer_message(prompt, chosen)], "rejected": [answer_message(prompt, rejected)]}
    return {"prompt": _context(prompt), **sides, **({"tools": prompt.tools} if prompt.tools else {})}


def answer_message(prompt: Prompt, text: str) -> JsonObject:
    """An answer's text as a message; its reasoning is taken out of it, which ``tele data --reasoning think`` writes as
    it was, and its tool calls where the prompt offers tools."""
    thought, text = _reasoning_of(text, prompt.thinks)
    words, calls = parse_tool_calls(text) if prompt.tools and not prompt.tags else (text, [])
    message = assistant_message(words, calls)
    return {**message, "reasoning_content": thought} if thought else message


def _reasoning_of(text: str, thinks: bool) -> tuple[str, str]:
    """(reasoning, answer); in a layout that does not open <think> the reasoning must be marked as the layout does."""
    if not thinks:
        before, mark, after = text.partition("\n</think>\n\n")
        opened = before.startswith("<think>\n") and bool(mark)
        return (before.removeprefix("<think>\n"), after) if opened else ("", text)
    stream = ThoughtStream()
    parts = [*stream.push(text), *stream.flush()]
    thought = "".join(part for part in parts if isinstance(part, Thought))
    return thought, "".join(part for part in parts if not isinstance(part, Thought))


def _context(prompt: Prompt) -> list[JsonObject]:
    return [{**message, "weight": 0} if message["role"] in ANSWERS else message for message in prompt.messages]


def _setting(prompt: Prompt) -> JsonObject:
    return {**({"tools": prompt.tools} if prompt.tools else {}), **({"tool": True} if prompt.tags else {})}


def _prompt_of(dialogue: Dialogue, row: JsonObject, thinks: bool) -> Prompt:
    messages = list(dialogue.messages)
    while messages and messages[-1]["role"] in ANSWERS:
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{dialogue.where}: must have a user's message before the last answer, found none; remove it")
    if dialogue.system is not None:
        # Released rows end the system text with the newline that the layout adds itself.
        system = dialogue.system.removesuffix("\n") if dialogue.released else dialogue.system
        messages = [{"role": "system", "content": system}, *messages]
    return Prompt(dialogue.where, row, messages, dialogue.tools, dialogue.tags, thinks)


def _lines(path: Path, encoding: str, thinks: bool) -> Iterator[Prompt]:
    for block in text_blocks(path, mark_keys(), None, encoding):
        first = int(block.where.rpartition(":")[2])
        for number, line in enumerate(block.text.split("\n"), first):
            text = line.removesuffix("\r")
            if text.strip():
                asked: list[JsonObject] = [{"role": "user", "content": text}]
                yield Prompt(f"{path}:{number}", {"prompt": text}, asked, thinks=thinks)
