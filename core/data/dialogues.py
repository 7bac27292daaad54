"""Dialogue rows of every kind -> ``Dialogue``; a key that would be lost is an error."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from telechat_twins.core.data.chat_template import DEFAULT_SYSTEM
from telechat_twins.core.data.control import BOT, USER
from telechat_twins.core.data.kinds.fields import flag, json_or_text, text
from telechat_twins.core.data.kinds.judged import refuse_untold, slots_of
from telechat_twins.core.data.kinds.messages import (
    ANSWERS,
    Reading,
    as_messages,
    is_messages,
    read_calls,
    read_messages,
    read_tools,
    reasoned_answer,
    turns_of_history,
    with_system,
)
from telechat_twins.core.data.kinds.table import DIALOGUE, Kind, Slots, kinds_of, several_kinds
from telechat_twins.core.data.kinds.transcripts import FUNCTIONS, STYLES, asked_in_turns, transcript
from telechat_twins.core.data.kinds.turns import has_tools, refuse_written_tags
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject

_NO_INPUT = ("<noinput>", "<no input>")  # what generated instructions write where they need none
RELEASED = "dialog"  # the kind of TeleChat2's own rows


@dataclass(frozen=True)
class Dialogue:
    """One conversation. ``system`` None: the row names none. ``tool``, ``multiturn``: the released flags.

    ``released``: a row in TeleChat2's own form, whose system text ends with the newline that the layout adds itself.
    ``tags``: the tool tags inside contents count as control tokens, as released rows write calls and results.
    ``pair``: the (input, output) texts where the row was written that way.
    """

    where: str
    messages: list[JsonObject]
    system: str | None = None
    tools: list[object] | None = None
    multiturn: bool = False
    tool: bool = False
    released: bool = False
    tags: bool = False
    pair: tuple[str, str] | None = field(default=None)

    @property
    def released_system(self) -> str:
        """The system text the released DeepSpeed pipeline trains with when none is given."""
        return DEFAULT_SYSTEM + "\n" if self.system is None else self.system


def parse_dialogue(
    row: JsonObject, where: str, ignore: Collection[str] = (), reading: Reading | None = None
) -> Dialogue:
    """A row of one of the kinds of core.data.kinds.table that are dialogues.

    UserError, naming ``where``, for what is malformed or ambiguous, and for a key that is not read (by which something
    that the row says would be lost), unless ``ignore`` names it, its value is empty, or the table knows it as harmless.
    ``reading`` has further options, and receives what is noticed; its own ``ignore`` takes the place of ``ignore``.
    """
    reading = reading if reading is not None else Reading(frozenset(ignore))
    kinds = kinds_of(row, where, DIALOGUE, reading.ignore, reading.kind, reading.columns.parts)
    return _parsed(kinds[0], row, where, reading) if len(kinds) == 1 else _repeated(kinds, row, where, reading)


def _repeated(kinds: tuple[Kind, ...], row: JsonObject, where: str, reading: Reading) -> Dialogue:
    """A row that says one dialogue in the forms of several kinds; UserError where they say different ones."""
    seen: list[object] = []
    errors: set[str] = set()
    for n, kind in enumerate(kinds):
        others = frozenset[str]().union(*(other.keys for other in kinds if other is not kind)) - kind.keys
        own = {key: value for key, value in row.items() if key not in others}
        judged = (
            reading if n == len(kinds) - 1 and not errors else replace(reading, left_out=set(), kinds={}, noticed={})
        )
        try:
            dialogue = _parsed(kind, own, where, judged)
        except UserError as error:
            errors.add(str(error))
            continue
        said = [{**one, "role": "assistant" if one["role"] == "bot" else one["role"]} for one in dialogue.messages]
        seen.append((dialogue.system, dialogue.tools, said))
    if len(errors) == 1 and not seen:
        raise UserError(errors.pop())
    if errors or any(one != seen[0] for one in seen):
        raise several_kinds(row, where, kinds)
    reading.left_out |= {key for key in row if key in others}
    return dialogue


def _parsed(kind_found: Kind, row: JsonObject, where: str, reading: Reading) -> Dialogue:
    slots = slots_of(kind_found, row, where, reading, repeated=True)
    kind = slots.kind.name
    name = next((slots.name(slot) for slot in ("messages", "history") if slot in slots.kind.slots), kind)
    system = system_of(slots)
    pair, messages = _READERS[kind](slots, reading)
    system, messages = with_system(messages, system, name, where)
    if not messages:
        raise UserError(f"{where}: '{name}' is empty; a dialogue needs a user and a bot message")
    tools = tools_of(slots)
    called = any(map(has_tools, messages))
    tool = flag(row, "tool", bool(tools) or called, where)
    reading.without_system += system is None
    refuse_untold(slots, [system, *(message["content"] for message in messages)], reading)
    tags = tool if kind == RELEASED else flag(row, "tool", False, where)
    refuse_written_tags(messages, tags, bool(tools) or called, where)
    reading.notice_slips(messages, tags, where)
    reading.unanswered += not any(m["role"] in ANSWERS and m.get("weight", 1) for m in messages)
    return Dialogue(
        where,
        messages,
        system,
        tools,
        multiturn=flag(row, "multiturn", len(messages) > 2, where),
        tool=tool,
        released=kind == RELEASED,
        tags=tags,
        pair=pair,
    )


def system_of(slots: Slots) -> str | None:
    """The system text of a row's own key; an empty one counts in TeleChat2's rows only, where it is meant."""
    if "system" in slots and slots.kind.name == "transcript":
        return slot_text(slots, "system").strip().removeprefix("SYSTEM:").strip()
    if "system" in slots or (slots.kind.name == RELEASED and slots.value("system") is not None):
        return text(slots.value("system"), slots.name("system"), slots.where)
    return None


def tools_of(slots: Slots) -> list[object] | None:
    """The tools of a row; None when absent."""
    bare = slots.known("tools") == "functions"
    return read_tools(slots.value("tools"), slots.name("tools"), slots.where, bare)


def slot_text(slots: Slots, slot: str) -> str:
    """A slot that must hold text, which may be empty."""
    found = slots.value(slot)
    if isinstance(found, list) and found and isinstance(found[0], dict):
        part = "completion" if slot == "answer" else "prompt"
        raise UserError(
            f"{slots.where}: '{slots.name(slot)}' is a list of objects; if these are messages, read it as such with "
            f"--column {part}={slots.name(slot)}"
        )
    if isinstance(found, list) and len(found) > 1 and all(isinstance(one, str) for one in found):
        raise UserError(
            f"{slots.where}: '{slots.name(slot)}' is a list of {len(found)} texts, which may be alternatives; choose "
            "one, or write the better and the worse as 'chosen' and 'rejected' (--preference)"
        )
    return text(slots.value(slot), slots.name(slot), slots.where)


def history_of(slots: Slots, reading: Reading) -> list[JsonObject]:
    """The messages of earlier turns; their answers are learnt as well."""
    return turns_of_history(slots.value("history"), slots.where, reading) if "history" in slots else []


def instructed(slots: Slots, reading: Reading, slot: str = "instruction") -> str:
    """The question of an instruction and its input: a newline between them where both hold text."""
    given, instruction = (slot_text(slots, one) if slots.value(one) is not None else "" for one in ("input", slot))
    if instruction and given.strip().lower() in _NO_INPUT:
        reading.notice(f"inputs are {given.strip()} and read as none", slots.where)
        given = ""
    return f"{instruction}\n{given}" if instruction and given else instruction or given


_Read = tuple[tuple[str, str] | None, list[JsonObject]]
"""(the texts of a bare input/output row, or None; the messages of the row)"""


def _conversation(slots: Slots, reading: Reading) -> _Read:
    value = slots.value("messages")
    return None, read_messages([] if value == "" else value, slots.name("messages"), slots.where, reading, texts=True)


def _transcript(slots: Slots, reading: Reading) -> _Read:
    name, where = slots.name("text"), slots.where
    style, messages = transcript(slot_text(slots, "text"))
    if style is None:
        styles = "; ".join(style.name for style in STYLES)
        raise UserError(f"{where}: a text; pack texts without --sft ('{name}' is no dialogue in marks of: {styles})")
    if messages is None or FUNCTIONS in str(slots.value("system")):
        raise UserError(
            f"{where}: '{name}' begins as a dialogue in marks of {style.name}, but its turns cannot be told: it holds "
            "calls or other marks, or turns out of order; write it as 'messages' (tools in 'tools', calls in "
            "'tool_calls')"
        )
    return None, messages


def _answered(slots: Slots, reading: Reading) -> JsonObject:
    """The answer of a row, with its reasoning where the row has one."""
    key = slots.name("reasoning")
    return reasoned_answer(slots.value("reasoning"), key, slot_text(slots, "answer"), slots.where, reading)


def _alpaca(slots: Slots, reading: Reading) -> _Read:
    question, answer, earlier = instructed(slots, reading), _answered(slots, reading), history_of(slots, reading)
    if "instruction" in slots:
        if "input" in slots and asked_in_turns(slot_text(slots, "instruction") if slots.value("instruction") else ""):
            raise UserError(
                f"{slots.where}: '{slots.name('instruction')}' is a dialogue that ends with an open Assistant:, so "
                f"'{slots.name('input')}' would stand in the place of its answer; write both as 'messages'"
            )
        asked = asked_in_turns(question) or [{"role": "user", "content": question}]
        if len(asked) > 1:
            reading.notice("questions are lines of Human: and Assistant:, read as turns", slots.where)
        return None, [*earlier, *asked, {**answer, "role": "bot"}]
    if slots.value("input") is None:
        names = f"neither '{slots.name('instruction')}' nor '{slots.name('input')}'"
        raise UserError(f"{slots.where}: {names} holds text; a dialogue needs a question")
    pair = None if earlier or answer.get("thought") else (question, answer["content"])
    return pair, [*earlier, *_turns(question, answer)]


def _query(slots: Slots, reading: Reading) -> _Read:
    asked = {"role": "user", "content": slot_text(slots, "question")}
    if "calls" not in slots:
        return None, [*history_of(slots, reading), asked, _answered(slots, reading)]
    name = slots.name("calls")
    if "answer" in slots or "reasoning" in slots:
        raise UserError(f"{slots.where}: '{name}' (calls) and an answer are both given; write them as 'messages'")
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": read_calls(slots.value("calls"), name, slots.where, reading),
    }
    return None, [*history_of(slots, reading), asked, called]


def _completion(slots: Slots, reading: Reading) -> _Read:
    earlier, prompt, answer = (
        history_of(slots, reading),
        prompt_messages(slots, reading),
        answer_messages(slots, "answer", reading),
    )
    if "reasoning" in slots:
        if len(answer) > 1:
            raise UserError(f"{slots.where}: '{slots.name('reasoning')}' is beside several messages; write it into one")
        key = slots.name("reasoning")
        answer = [
            {**answer[0], **reasoned_answer(slots.value("reasoning"), key, answer[0]["content"], slots.where, reading)}
        ]
    return None, [*earlier, *prompt, *answer]


def prompt_messages(slots: Slots, reading: Reading) -> list[JsonObject]:
    """A slot "prompt" as messages: a user's text, or messages, of which the assistant's are context."""
    name = slots.name("prompt")
    prompt = json_or_text(slots.value("prompt"), name, slots.where, reading.columns.spellings)
    if not is_messages(prompt):
        return [{"role": "user", "content": text(prompt, name, slots.where)}]
    messages = read_messages(as_messages(prompt, name, slots.where), name, slots.where, reading)
    return [{**message, "weight": 0} if message["role"] in ANSWERS else message for message in messages]


def answer_messages(slots: Slots, slot: str, reading: Reading) -> list[JsonObject]:
    """An answer as messages: the assistant's text, or one message, or several."""
    name = slots.name(slot)
    answer = json_or_text(slots.value(slot), name, slots.where, reading.columns.spellings)
    if is_messages(answer):
        return read_messages(as_messages(answer, name, slots.where), name, slots.where, reading)
    return [{"role": "assistant", "content": text(answer, name, slots.where)}]


_READERS: dict[str, Callable[[Slots, Reading], _Read]] = {
    RELEASED: _conversation,
    "messages": _conversation,
    "sharegpt": _conversation,
    "alpaca": _alpaca,
    "query": _query,
    "completion": _completion,
    "transcript": _transcript,
}


def _turns(question: str, answer: JsonObject) -> list[JsonObject]:
    """Messages of an input/output row; an input written as <_user>q<_bot>a...<_user>q is taken apart."""
    plain = [{"role": "user", "content": question}, {**answer, "role": "bot"}]
    if not question.startswith(USER):
        return plain
    messages: list[JsonObject] = []
    turns = question.split(USER)[1:]
    for n, turn in enumerate(turns):
        asked, marker, said = turn.partition(BOT)
        if bool(marker) != (n < len(turns) - 1) or BOT in said:
            return plain
        messages.append({"role": "user", "content": asked})
        if marker:
            messages.append({"role": "bot", "content": said})
    return [*messages, {**answer, "role": "bot"}]
