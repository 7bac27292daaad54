"""An answer and its calls are one turn however rows write them; results stand as the server puts them."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from telechat_twins.core.data.chat_layout import BuiltInLayout
from telechat_twins.core.data.chat_template import render
from telechat_twins.core.data.dialogues import parse_dialogue
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.preference import parse_preference
from telechat_twins.core.data.kinds.teacher import parse_propositions
from telechat_twins.core.errors import UserError
from telechat_twins.core.serve.chat import read_messages
from telechat_twins.core.serve.errors import ApiError
from telechat_twins.core.serve.fields import Fields
from telechat_twins.core.types import JsonObject
from tests.support.data_support import tiny_tokenizer

ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
F, G = {"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}
RESULTS = [{"role": "tool_response", "content": "1"}, {"role": "tool_response", "content": "2"}]


def shown(row: JsonObject, reading: Reading | None = None) -> str:
    return render(parse_dialogue(row, "rows:1", reading=reading).messages, add_generation_prompt=False)


def call(made: JsonObject, **more: object) -> JsonObject:
    return {"role": "tool_call", "content": json.dumps(made), **more}


def test_calls_behind_one_another_are_one_answer() -> None:
    """As ms-swift writes parallel calls: a message each, and behind what the assistant says."""
    together = {**SAID, "tool_calls": [F, G]}
    for apart in ([SAID, call(F), call(G)], [{**SAID, "tool_calls": [F]}, call(G)]):
        meant = shown({"messages": [ASKED, together, *RESULTS, SAID]})
        assert shown({"messages": [ASKED, *apart, *RESULTS, SAID]}) == meant
        assert meant.count("<_end>") == 2
    one_by_one = shown({"messages": [ASKED, call(F), RESULTS[0], call(G), RESULTS[1], SAID]})
    assert one_by_one.count("<_end>") == 3


def test_calls_of_another_weight_and_no_calls_are_refused() -> None:
    with pytest.raises(UserError, match=r"rows:1: 'messages\[2\]' belongs to the answer before it, but has another"):
        shown({"messages": [ASKED, {**SAID, "weight": 0}, call(F), RESULTS[0], SAID]})
    for nothing in ("[]", [], {}, "null"):
        with pytest.raises(UserError, match=r"'messages\[1\].content' holds no call"):
            shown({"messages": [ASKED, {"role": "function_call", "content": nothing}, SAID]})


def test_results_stand_as_the_server_puts_them() -> None:
    """Every order of results, with some left out or given twice: both refuse, or both show the same."""
    layout, draw, refused = BuiltInLayout(tiny_tokenizer()), random.Random(3), 0
    calls = [{"id": n, "type": "function", "function": {"name": n, "arguments": "{}"}} for n in "xyz"]
    orders = [order for size in range(5) for order in itertools.product("xyz", repeat=size)]
    for order in draw.sample(orders, 60):
        results = [{"role": "tool", "tool_call_id": n, "content": n} for n in order]
        messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
        try:
            served = read_messages(Fields({"messages": messages}), messages, layout)
        except ApiError:
            served = None
        try:
            trained = parse_dialogue({"messages": messages}, "rows:1").messages
        except UserError:
            trained = None
        assert (served is None) == (trained is None), order
        refused += served is None
        if served is not None and trained is not None:
            assert render(trained, add_generation_prompt=False) == render(served, add_generation_prompt=False)
    assert 0 < refused < 60


def test_messages_of_mistakes_are_short_whatever_stands_there() -> None:
    long: list[object] = [{"a": "x" * 50}] * 50
    said = {"role": "assistant", "content": "", "tool_calls": [{**F, "type": long}]}
    rows = [[ASKED, said], [ASKED, {**said, "tool_calls": [F]}, {"role": "tool", "content": "1", "name": long}]]
    for messages in rows:
        with pytest.raises(UserError) as error:
            parse_dialogue({"messages": messages}, "rows:1")
        assert len(str(error.value)) < 800
    choices = {"text": ["a", "b"], "label": [json.dumps(long), "B"]}
    with pytest.raises(UserError) as error:
        parse_propositions({"question": "q", "choices": choices, "answer": "C"}, "rows:1", Reading())
    assert len(str(error.value)) < 800


def test_names_of_roles_in_any_case_and_texts_that_may_be_alternatives() -> None:
    row = {"conversations": [{"from": "Human", "value": "q"}, {"from": " GPT", "value": ["a"]}]}
    assert shown(row) == shown({"messages": [ASKED, SAID]})
    with pytest.raises(UserError, match=r"\[1\].value' is a list of 2 texts, which may be alternatives"):
        shown({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ["a", "b"]}]})


def test_what_holds_no_text_is_counted() -> None:
    reading = Reading()
    parse_dialogue({"instruction": "", "input": "", "output": " "}, "rows:1", reading=reading)
    parse_dialogue({"messages": [ASKED, call(F), RESULTS[0], {**SAID, "content": ""}]}, "rows:2", reading=reading)
    parse_preference({"prompt": "p", "chosen": "c", "rejected": "c"}, "rows:3", reading)
    assert reading.noticed == {
        "questions hold no text": (1, "rows:1"),
        "answers hold no text, and teach a model to say nothing": (2, "rows:1"),
        "pairs have the same answer twice, and teach nothing": (1, "rows:3"),
    }


def test_a_pair_whose_answer_is_context_is_refused() -> None:
    row = {"prompt": "p", "chosen": [{**SAID, "weight": 0}], "rejected": "r"}
    with pytest.raises(UserError, match="rows:1: 'chosen' has weight 0, but the answers of a pair are what is learnt"):
        parse_preference(row, "rows:1", Reading())


def test_prompts_under_input_and_history_of_completions() -> None:
    pair = parse_preference({"input": "q", "system": "s", "chosen": "c", "rejected": "r"}, "rows:1", Reading())
    assert pair.chosen.messages[0] == ASKED and pair.chosen.system == "s"
    earlier = {"prompt": "p", "response": "r", "history": [["q", "a"]]}
    assert [m["content"] for m in parse_dialogue(earlier, "rows:1").messages] == ["q", "a", "p", "r"]


def test_an_answer_that_is_one_choice_by_its_text_and_another_by_its_place_is_refused() -> None:
    row = {"question": "1 + 1?", "choices": ["1", "2", "3"], "answer": "2"}
    with pytest.raises(UserError, match="rows:1: 'answer' is '2', which names several of the choices"):
        parse_propositions(row, "rows:1", Reading())
    for wrong, says in (
        ({"text": ["1", "2", "3"], "label": ["A", "B"]}, "2 labels and 3 texts"),
        ({"text": ["1", "2"], "label": ["A", {"B": 1}]}, "must hold texts or numbers"),
    ):
        with pytest.raises(UserError, match=says):
            parse_propositions({**row, "choices": wrong, "answer": "A"}, "rows:1", Reading())
    labelled = {**row, "choices": {"text": ["1", "2"], "label": ["1", "2"]}}
    assert [one.true for one in parse_propositions(labelled, "rows:1", Reading())] == [False, True]


def test_a_refusal_that_a_client_sends_back_is_what_was_said() -> None:
    def served(**said: object) -> list[JsonObject]:
        found: list[object] = [{"role": "user", "content": "q"}, {"role": "assistant", **said}]
        return read_messages(Fields({"messages": found}), found, BuiltInLayout(tiny_tokenizer()))

    assert served(content=None, refusal="no")[1]["content"] == "no" == served(content="no", refusal=None)[1]["content"]
    with pytest.raises(ApiError, match="refusal"):
        served(content="yes", refusal="no")


def test_reasoning_among_the_parts_of_an_answer() -> None:
    parts = [{"type": "thinking", "thinking": "why", "signature": "x"}, {"type": "text", "text": "a"}]
    row = {"messages": [ASKED, {"role": "assistant", "content": parts}]}
    beside = {"messages": [ASKED, {**SAID, "reasoning_content": "why"}]}
    assert shown(row, Reading(reasoning="think")) == shown(beside, Reading(reasoning="think"))
    assert shown(row, Reading(reasoning="leave-out")) == shown({"messages": [ASKED, SAID]})
    with pytest.raises(UserError, match="rows:1: 'messages.1..thinking' has no place in the chat layout; train on it"):
        shown(row)
    called = {"role": "assistant", "content": [{"type": "reasoning", "text": "why"}], "tool_calls": [F]}
    assert "<think>\nwhy\n</think>\n\n<tool_call>" in shown({"messages": [ASKED, called]}, Reading(reasoning="think"))
    empty = [{"type": "thinking", "thinking": ""}, parts[1]]
    assert shown({"messages": [ASKED, {"role": "assistant", "content": empty}]}) == shown({"messages": [ASKED, SAID]})
    for content, more, says in (
        (parts[::-1], {}, "content.1.' is reasoning behind a part of the answer"),
        ([{**parts[0], "text": "b"}], {}, "content.0.' is reasoning under text and thinking"),
        (parts, {"thinking": "b"}, "has reasoning in 'content' and in 'thinking'"),
        (parts, {"reasoning": "b"}, "has both reasoning and thinking"),
        ([{**parts[0], "data": "b"}], {}, "key 'messages.1..content.0..data' is not read"),
    ):
        with pytest.raises(UserError, match=says):
            shown({"messages": [ASKED, {"role": "assistant", "content": content, **more}]}, Reading(reasoning="think"))


def test_a_system_text_that_is_said_twice_or_empty_is_one() -> None:
    told = {"role": "system", "content": "s"}
    once = parse_dialogue({"system": "s", "messages": [ASKED, SAID]}, "rows:1")
    for row in (
        {"system": "s", "messages": [told, ASKED, SAID]},
        {"messages": [told, ASKED, {"role": "developer", "content": [{"type": "text", "text": "s"}]}, SAID]},
        {"system_message": "s", "messages": [ASKED, {"role": "system", "content": ""}, SAID]},
    ):
        read = parse_dialogue(row, "rows:1")
        assert (read.system, read.messages) == (once.system, once.messages)
    for row in (
        {"system": "t", "messages": [told, ASKED, SAID]},
        {"messages": [ASKED, told, SAID]},
        {"messages": [{**told, "content": ""}, ASKED, told, SAID]},
    ):
        with pytest.raises(UserError, match="is a (second )?system message"):
            parse_dialogue(row, "rows:1")
    both = [[told, ASKED, {**SAID, "content": text}] for text in "ab"]
    pair = parse_preference({"system": "s", "chosen": both[0], "rejected": both[1]}, "rows:1", Reading())
    assert pair.chosen.system == "s" and [m["role"] for m in pair.rejected.messages] == ["user", "assistant"]


def test_marks_for_no_input_and_spellings_of_roles() -> None:
    reading = Reading()
    row = parse_dialogue({"instruction": "i", "input": "<noinput>", "output": "o"}, "rows:1", reading=reading)
    assert row.messages[0]["content"] == "i"
    assert reading.noticed == {"inputs are <noinput> and read as none": (1, "rows:1")}
    called = {"from": "function-call", "value": json.dumps(F)}
    turns = [{"from": "human", "value": "q"}, called, {"from": "Function Response", "value": "1"}]
    same = [ASKED, call(F), RESULTS[0], SAID]
    assert shown({"conversations": [*turns, {"from": "gpt", "value": "a"}]}) == shown({"messages": same})
