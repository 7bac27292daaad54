"""Turns of a dialogue that are written as several messages: an answer and its calls, and the results of calls.

The layout gives results no names: the order of the calls alone says whose they are. Rows and requests to the server
are brought into that order by the same rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from telechat_twins.core.data.control import TOOL_CALL, TOOL_CALL_END, TOOL_RESPONSE, TOOL_RESPONSE_END
from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

_NAMED = re.compile("[\"']name[\"']")  # also of a call that Python wrote, as some published rows have it
JOINS = "joins"  # marks a message that is a call, until it is part of an answer
_SPOKEN = ("assistant", "bot")


def order_of_results(calls: Sequence[object], given: Sequence[object]) -> list[int]:
    """The places of results, which name calls by the ids ``given``, in the order of ``calls``, the ids of all calls.

    As they stand where ids are missing or there twice, so that their order alone tells them apart. The last results may
    be missing. ValueError for the id of no call, and where a result before another one is missing or there twice.
    """
    if not all(isinstance(one, (str, int)) for one in calls) or len(set(calls)) < len(calls) or None in given:
        return list(range(len(given)))
    if strange := [one for one in given if one not in calls]:
        raise ValueError(f"{shown(strange[0])} is the id of no call before it")
    order = sorted(range(len(given)), key=lambda n: calls.index(given[n]))
    for place, n in enumerate(order):
        wanted = calls[min(place, len(calls) - 1)]
        if place >= len(calls) or wanted != given[n]:
            raise ValueError(f"the result of the call {shown(wanted)} is missing or there twice; give one of each call")
    return order


def whole_turns(read: Iterable[tuple[JsonObject, str]], where: str) -> list[JsonObject]:
    """Messages, each with its name in errors: calls joined to the assistant's message before them, results in order.

    What an assistant says and the calls behind it are one answer, which ends behind the last call: as two, the model
    would learn to end its answer where it should call. UserError for results that contradict the calls.
    """
    joined: list[tuple[JsonObject, str]] = []
    for message, name in read:
        if message.pop(JOINS, False) and joined and joined[-1][0]["role"] in _SPOKEN:
            answer = joined[-1][0]
            if answer.get("weight") != message.get("weight"):
                raise UserError(f"{where}: '{name}' belongs to the answer before it, but has another weight")
            answer["tool_calls"] = [*answer.get("tool_calls", ()), *message["tool_calls"]]
        else:
            joined.append((message, name))
    messages: list[JsonObject] = []
    place = 0
    while place < len(joined):
        end = place + 1
        while end < len(joined) and joined[end][0]["role"] == "tool":
            end += 1
        (first, _), results = joined[place], joined[place + 1 : end]
        if first["role"] == "tool":  # behind no call
            first, results = {}, joined[place:end]
        messages += [first] if first else []
        messages += _answered(first.get("tool_calls", ()), results, where)
        place = end
    return messages


def _answered(calls: Sequence[JsonObject], results: Sequence[tuple[JsonObject, str]], where: str) -> list[JsonObject]:
    """The results of ``calls`` in their order, without the ids and names that say so."""
    try:
        order = order_of_results([call.get("id") for call in calls], [one.get("tool_call_id") for one, _ in results])
    except ValueError as error:
        raise UserError(f"{where}: '{results[0][1]}.tool_call_id': {error}") from None
    for n, place in enumerate(order):
        _check_result(results[place][0], calls[n] if n < len(calls) else {}, results[place][1], where)
    return [results[place][0] for place in order]


def _check_result(message: JsonObject, call: JsonObject, name: str, where: str) -> None:
    """Takes off the id and the name of a result; UserError where they contradict the call in its place."""
    for key, wanted in (("tool_call_id", call.get("id")), ("name", call.get("name"))):
        given = message.pop(key, None)
        if given is not None and given != wanted and not (wanted is None and key == "tool_call_id" and call):
            expected = shown(wanted) if wanted is not None else "no call"
            raise UserError(
                f"{where}: '{name}.{key}' is {shown(given)}, but in its place {expected} is answered; results must "
                "stand in the order of their calls"
            )


def has_tools(message: JsonObject) -> bool:
    """Whether a message calls tools, or is the result of a call."""
    return bool(message.get("tool_calls")) or message["role"] == "tool"


def refuse_written_tags(messages: list[JsonObject], tags: bool | None, tools: bool, where: str) -> None:
    """UserError for calls and results that a dialogue with tools has in its texts: a call's tags would be learnt as
    letters, unless the row lets them count (``tags``; None: rows of this use cannot), and a result's would stand there
    twice."""
    for n, message in enumerate(messages if tools else ()):
        content = message["content"] or ""
        if message.get("thought"):
            content = content.partition("</think>")[2]
        if message["role"] == "tool" and _is_result(content):
            raise UserError(
                f"{where}: the result in message {n} stands in <tool_response> tags, which the layout adds; take them "
                "off"
            )
        if message["role"] in _SPOKEN and not tags and has_call(content):
            raise UserError(
                f"{where}: the answer in message {n} has a call in its text, whose tags would be learnt as letters; "
                "write it in tool_calls"
                + (', or add "tool": true to the row, which lets the four tags in its texts count' * (tags is not None))
            )


def _is_result(content: str) -> bool:
    """Whether a text is a result as the layout writes it."""
    text = content.strip()
    return text.startswith(TOOL_RESPONSE) and text.endswith(TOOL_RESPONSE_END)


def has_call(content: str) -> bool:
    """Whether a text has a call in it as the layout writes it."""
    for part in content.split(TOOL_CALL)[1:]:
        inner, mark, _ = part.partition(TOOL_CALL_END)
        inner = inner.strip()
        if mark and inner[:1] in ("{", "[") and inner[-1:] in ("}", "]") and _NAMED.search(inner):
            return True
    return False
