"""Preference rows in the spellings in use -> two dialogues that differ in their last answers.

The prompt is shared under a key of its own (a text, messages, or OpenAI's ``input`` object), or stands inside both
answers: as the messages that they begin with, or as a transcript of "Human:" and "Assistant:" turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from telechat_twins.core.data.dialogues import (
    Dialogue,
    answer_messages,
    history_of,
    instructed,
    prompt_messages,
    system_of,
    tools_of,
)
from telechat_twins.core.data.kinds.fields import json_or_text, refuse_unread, text
from telechat_twins.core.data.kinds.judged import read_slots
from telechat_twins.core.data.kinds.messages import ANSWERS, Reading, read_messages, read_tools, with_system
from telechat_twins.core.data.kinds.slips import empty_turns, slips
from telechat_twins.core.data.kinds.table import KINDS, PREFERENCE, Slots
from telechat_twins.core.data.kinds.transcripts import HUMAN_PARAGRAPHS, transcript
from telechat_twins.core.data.kinds.turns import has_tools, refuse_written_tags
from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

_OBJECT = ("messages", "tools", "parallel_tool_calls")  # keys of OpenAI's input


@dataclass(frozen=True)
class Pair:
    """Two dialogues with one prompt, whose answers are context (weight 0) where it holds any."""

    where: str
    chosen: Dialogue
    rejected: Dialogue


def parse_preference(row: JsonObject, where: str, reading: Reading) -> Pair:
    """A row with a chosen and a rejected answer.

    UserError for a row without a prompt, for answers whose own prompts differ from each other's or from the row's, for
    what is malformed, and for a key that is not read.
    """
    slots = read_slots(row, where, PREFERENCE, reading)
    if slots.kind.name == "comparison":
        slots = _judged(slots)
    prompt, tools = _prompt(slots, reading)
    if "chosen" not in slots and prompt and prompt[-1]["role"] in ANSWERS:
        # The answer that the messages end with is the chosen one.
        prompt, chosen = prompt[:-1], [{key: value for key, value in prompt[-1].items() if key != "weight"}]
    else:
        chosen = _side(slots, "chosen", reading)
    rejected = _side(slots, "rejected", reading)
    if "chosen" not in slots and _said(rejected)[: len(prompt)] == _said(prompt):
        rejected = rejected[len(prompt) :]
    prompt, chosen, rejected = _split(slots, prompt, chosen, rejected)
    system, prompt = with_system(prompt, system_of(slots), slots.name("prompt"), where)
    if not any(message["role"] == "user" for message in prompt):
        names = ", ".join(slots.kind.slots["prompt"])
        raise UserError(f"{where}: no prompt; give it as {names}, or as messages at the beginning of both answers")
    chosen = with_system(chosen, system or "", slots.name("chosen"), where)[1]
    rejected = with_system(rejected, system or "", slots.name("rejected"), where)[1]
    for slot, answer in (("chosen", chosen), ("rejected", rejected)):
        if not any(message["role"] in ANSWERS and message.get("weight", 1) for message in answer):
            raise UserError(f"{where}: '{slots.name(slot)}' has weight 0, but the answers of a pair are what is learnt")
    if _said(chosen) == _said(rejected):
        reading.notice("pairs have the same answer twice, and teach nothing", where)
    reading.without_system += system is None
    told = [*prompt, *chosen, *rejected]
    for part in (prompt, chosen, rejected):
        refuse_written_tags(part, None, bool(tools) or any(has_tools(one) for one in told), where)
    sides = [
        Dialogue(where, [*prompt, *answer], system, tools, multiturn=len(prompt) > 1) for answer in (chosen, rejected)
    ]
    empty = [what for part in (prompt, chosen, rejected) for what in empty_turns(part)]
    for what in (*empty, *dict.fromkeys(what for side in sides for what in slips(side.messages, False))):
        reading.notice(what, where)
    return Pair(where, *sides)


@dataclass(frozen=True)
class Compared:
    """The keys of two answers and of the verdict, and the verdicts by which the first and the second are better."""

    keys: tuple[str, str, str]
    first: tuple[object, ...]
    second: tuple[object, ...]


_COMPARED = (
    Compared(("human_ref_A", "human_ref_B", "labels"), (1, "1"), (0, "0")),
    Compared(("response_0", "response_1", "better_response_id"), (0, "0"), (1, "1")),
    Compared(("response_a", "response_b", "winner"), ("model_a", "response_a", "a"), ("model_b", "response_b", "b")),
    Compared(("conversation_a", "conversation_b", "winner"), ("model_a", "a"), ("model_b", "b")),
)


def _judged(slots: Slots) -> Slots:
    """A row of two answers and a verdict as one of a chosen and a rejected answer."""
    where, parts = slots.where, ("first", "second", "verdict")
    keys, names = tuple(map(slots.name, parts)), tuple(map(slots.known, parts))
    known = next((one for one in _COMPARED if one.keys == names and "verdict" in slots), None)
    if known is None:
        ways = "; ".join(", ".join(one.keys) for one in _COMPARED)
        raise UserError(
            f"{where}: '{keys[0]}' and '{keys[1]}' without the verdict that goes with them ({ways}); write them as "
            "chosen and rejected"
        )
    verdict = slots.value("verdict")
    if isinstance(verdict, bool) or verdict not in (*known.first, *known.second):
        raise UserError(
            f"{where}: '{keys[2]}' is {shown(verdict)}, which prefers neither answer; leave the row out, or write "
            "chosen and rejected"
        )
    better, worse = keys[:2] if verdict in known.first else keys[1::-1]
    shared = {slot: names for slot, names in slots.kind.slots.items() if slot not in ("first", "second", "verdict")}
    given = {**shared, "input": ("input",), "history": (), "chosen": (better,), "rejected": (worse,)}
    return Slots(replace(KINDS["preference"], slots=given), slots.row, where)


def _prompt(slots: Slots, reading: Reading) -> tuple[list[JsonObject], list[object] | None]:
    """(the prompt's messages, empty where the answers hold it; the tools)."""
    tools = tools_of(slots)
    given = json_or_text(slots.value("input"), slots.name("input"), slots.where, reading.columns.spellings)
    if "prompt" not in slots and isinstance(given, dict):
        name = slots.name("input")
        refuse_unread(given, _OBJECT, name, slots.where, reading.ignore)
        messages = read_messages(given.get("messages"), f"{name}.messages", slots.where, reading)
        inner = read_tools(given.get("tools"), f"{name}.tools", slots.where)
        if tools and inner:
            raise UserError(f"{slots.where}: '{slots.name('tools')}' and '{name}.tools' both hold tools; leave one out")
        return _as_context(messages), tools or inner
    if "prompt" not in slots:
        asked = [{"role": "user", "content": text(given, slots.name("input"), slots.where)}] if "input" in slots else []
        return [*_as_context(history_of(slots, reading)), *asked], tools
    if "input" in slots:
        question = [{"role": "user", "content": instructed(slots, reading, "prompt")}]
        return [*_as_context(history_of(slots, reading)), *question], tools
    value = slots.value("prompt")
    spoken = _transcript(value) if isinstance(value, str) else None
    asked = _as_context(spoken) if spoken else prompt_messages(slots, reading)
    return [*_as_context(history_of(slots, reading)), *asked], tools


def _side(slots: Slots, slot: str, reading: Reading) -> list[JsonObject]:
    value = slots.value(slot)
    spoken = _transcript(value) if isinstance(value, str) else None
    return spoken if spoken else answer_messages(slots, slot, reading)


def _split(
    slots: Slots, prompt: list[JsonObject], chosen: list[JsonObject], rejected: list[JsonObject]
) -> tuple[list[JsonObject], list[JsonObject], list[JsonObject]]:
    """The prompt and the two answers, where each answer may begin with the prompt."""
    inside = []
    for slot, side in (("chosen", chosen), ("rejected", rejected)):
        first = next((n for n in range(len(side), 0, -1) if side[n - 1]["role"] not in (*ANSWERS, "tool")), 0)
        if not side[first:]:
            raise UserError(f"{slots.where}: '{slots.name(slot)}' must end with the assistant's answer")
        inside.append((side[:first], side[first:]))
    (before, chosen), (other, rejected) = inside
    if _said(before) != _said(other):
        raise UserError(
            f"{slots.where}: '{slots.name('chosen')}' and '{slots.name('rejected')}' answer different prompts; "
            "a pair needs one prompt"
        )
    if not before:
        return prompt, chosen, rejected
    if prompt and not _holds(before, prompt):
        raise UserError(
            f"{slots.where}: '{slots.name('prompt')}' is not the prompt that '{slots.name('chosen')}' begins with; "
            f"leave it out with --ignore-key {slots.name('prompt')} if the answers' own is right"
        )
    return _as_context(before), chosen, rejected


def _holds(messages: list[JsonObject], prompt: list[JsonObject]) -> bool:
    """Whether a prompt stands among ``messages``, in its order; a text may be the system's."""
    if len(prompt) == 1 and messages[0] == {**prompt[0], "role": "system"}:
        return True
    said, wanted = _said(messages), _said(prompt)
    return any(said[n : n + len(wanted)] == wanted for n in range(len(said)))


def _said(messages: list[JsonObject]) -> list[tuple[object, ...]]:
    return [("bot" if m["role"] in ANSWERS else m["role"], m["content"], str(m.get("tool_calls"))) for m in messages]


def _as_context(messages: list[JsonObject]) -> list[JsonObject]:
    return [{**message, "weight": 0} if message["role"] in ANSWERS else message for message in messages]


def _transcript(text: str) -> list[JsonObject] | None:
    """The messages of a transcript of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." turns, without an open last one;
    None for any other text."""
    return transcript(text, (HUMAN_PARAGRAPHS,))[1]
