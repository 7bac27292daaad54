"""Dialogue rows of every kind -> ``Dialogue``; a key that would be lost is an error."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from telechat_twins.core.data.chat_template import DEFAULT_SYSTEM
from telechat_twins.core.data.control import BOT, USER
from telechat_twins.core.data.kinds.fields import flag, json_or_text, text
from telechat_twins.core.data.kinds.judged import read_slots
from telechat_twins.core.data.kinds.messages import (
    ANSWERS,
    Reading,
    as_messages,
    is_messages,
    read_messages,
    read_tools,
    turns_of_history,
    with_system,
)
from telechat_twins.core.data.kinds.table import DIALOGUE, Slots
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject

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
    slots = read_slots(row, where, DIALOGUE, reading)
    kind, name = slots.kind.name, slots.name("messages") if "messages" in slots.kind.slots else slots.kind.name
    system = system_of(slots)
    pair, messages = _READERS[kind](slots, reading)
    system, messages = with_system(messages, system, name, where)
    if not messages:
        raise UserError(f"{where}: '{name}' is empty; a dialogue needs a user and a bot message")
    tools = tools_of(slots)
    called = any(m.get("tool_calls") or m["role"] == "tool" for m in messages)
    tool = flag(row, "tool", bool(tools) or called, where)
    reading.without_system += system is None
    reading.notice_empty(messages, where)
    reading.unanswered += not any(m["role"] in ANSWERS and m.get("weight", 1) for m in messages)
    return Dialogue(
        where,
        messages,
        system,
        tools,
        multiturn=flag(row, "multiturn", len(messages) > 2, where),
        tool=tool,
        released=kind == RELEASED,
        tags=tool if kind == RELEASED else flag(row, "tool", False, where),
        pair=pair,
    )


def system_of(slots: Slots) -> str | None:
    """The system text of a row's own key; an empty one counts in TeleChat2's rows only, where it is meant."""
    if "system" in slots or (slots.kind.name == RELEASED and slots.value("system") is not None):
        return text(slots.value("system"), slots.name("system"), slots.where)
    return None


def tools_of(slots: Slots) -> list[object] | None:
    """The tools of a row; None when absent."""
    return read_tools(slots.value("tools"), slots.name("tools"), slots.where)


def slot_text(slots: Slots, slot: str) -> str:
    """A slot that must hold text, which may be empty."""
    return text(slots.value(slot), slots.name(slot), slots.where)


def history_of(slots: Slots, reading: Reading) -> list[JsonObject]:
    """The messages of earlier turns; their answers are learnt as well."""
    return turns_of_history(slots.value("history"), slots.where, reading) if "history" in slots else []


def instructed(slots: Slots, slot: str = "instruction") -> str:
    """The question of an instruction and its input: a newline between them where both hold text."""
    given, instruction = (slot_text(slots, one) if slots.value(one) is not None else "" for one in ("input", slot))
    return f"{instruction}\n{given}" if instruction and given else instruction or given


_Read = tuple[tuple[str, str] | None, list[JsonObject]]
"""(the texts of a bare input/output row, or None; the messages of the row)"""


def _conversation(slots: Slots, reading: Reading) -> _Read:
    value = slots.value("messages")
    return None, read_messages([] if value == "" else value, slots.name("messages"), slots.where, reading)


def _alpaca(slots: Slots, reading: Reading) -> _Read:
    question, answer, earlier = instructed(slots), slot_text(slots, "answer"), history_of(slots, reading)
    if "instruction" in slots:
        return None, [*earlier, {"role": "user", "content": question}, {"role": "bot", "content": answer}]
    if slots.value("input") is None:
        names = f"neither '{slots.name('instruction')}' nor '{slots.name('input')}'"
        raise UserError(f"{slots.where}: {names} holds text; a dialogue needs a question")
    return None if earlier else (question, answer), [*earlier, *_turns(question, answer)]


def _query(slots: Slots, reading: Reading) -> _Read:
    question, answer = slot_text(slots, "question"), slot_text(slots, "answer")
    asked = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return None, [*history_of(slots, reading), *asked]


def _completion(slots: Slots, reading: Reading) -> _Read:
    earlier = history_of(slots, reading)
    return None, [*earlier, *prompt_messages(slots, reading), *answer_messages(slots, "answer", reading)]


def prompt_messages(slots: Slots, reading: Reading) -> list[JsonObject]:
    """A slot "prompt" as messages: a user's text, or messages, of which the assistant's are context."""
    name, prompt = slots.name("prompt"), json_or_text(slots.value("prompt"))
    if not is_messages(prompt):
        return [{"role": "user", "content": text(prompt, name, slots.where)}]
    messages = read_messages(as_messages(prompt, name, slots.where), name, slots.where, reading)
    return [{**message, "weight": 0} if message["role"] in ANSWERS else message for message in messages]


def answer_messages(slots: Slots, slot: str, reading: Reading) -> list[JsonObject]:
    """An answer as messages: the assistant's text, or one message, or several."""
    name, answer = slots.name(slot), json_or_text(slots.value(slot))
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
}


def _turns(question: str, answer: str) -> list[JsonObject]:
    """Messages of an input/output row; an input written as <_user>q<_bot>a...<_user>q is taken apart."""
    plain = [{"role": "user", "content": question}, {"role": "bot", "content": answer}]
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
    return [*messages, {"role": "bot", "content": answer}]
