"""Tool calls out of an answer's text, whole and as it comes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.control import TOOL_CALL, TOOL_CALL_END
from core.tool_calls import ToolCall, ToolCallStream, parse_tool_calls

WEATHER = '\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
PARIS = ToolCall("get_weather", '{"city": "Paris"}')
NOON = ToolCall("clock", "{}")


def block(inside: str) -> str:
    return f"{TOOL_CALL}{inside}{TOOL_CALL_END}"


@pytest.mark.parametrize(
    ("text", "words", "calls"),
    [
        ("just words", "just words", []),
        (" spaces kept \n", " spaces kept \n", []),
        (block(WEATHER), "", [PARIS]),
        ("Let me look.\n" + block(WEATHER) + "\n" + block('{"name": "clock"}'), "Let me look.", [PARIS, NOON]),
        (block(WEATHER) + "\nand then", "and then", [PARIS]),
        (TOOL_CALL + WEATHER, "", [PARIS]),  # ended without the closing mark
        (TOOL_CALL + '{"name": "get_weather", "argu', TOOL_CALL + '{"name": "get_weather", "argu', []),
        (block("not JSON"), block("not JSON"), []),
        (block('["name"]'), block('["name"]'), []),
        (block('{"name": 3, "arguments": {}}'), block('{"name": 3, "arguments": {}}'), []),
        (block('{"name": "f", "arguments": [1]}'), block('{"name": "f", "arguments": [1]}'), []),
        (block('{"name": "f", "arguments": "{\\"a\\": 1}"}'), "", [ToolCall("f", '{"a": 1}')]),
        (block('{"name": "f", "arguments": {"a": "\u4f60\u597d"}}'), "", [ToolCall("f", '{"a": "\u4f60\u597d"}')]),
        (block("[" * 100_000), block("[" * 100_000), []),
        ("a < b <tool", "a < b <tool", []),
    ],
)
def test_calls_of_a_whole_answer(text, words, calls):
    assert parse_tool_calls(text) == (words, calls)


PARTS = st.sampled_from(
    [block(WEATHER), block('{"name": "clock"}'), block("{"), TOOL_CALL, TOOL_CALL_END, "<tool", "<", " ", "\n", "words"]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PARTS, max_size=6), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_however_an_answer_is_cut_it_says_the_same(parts, sizes):
    text, stream, said, at = "".join(parts), ToolCallStream(), [], 0
    while at < len(text):
        size = sizes[at % len(sizes)]
        said += stream.push(text[at : at + size])
        at += size
    said += stream.flush()
    words = "".join(part for part in said if isinstance(part, str))
    assert (words, [part for part in said if isinstance(part, ToolCall)]) == parse_tool_calls(text)
    for part in said:
        assert isinstance(part, str) or isinstance(json.loads(part.arguments), dict)


def test_words_are_told_at_once_and_a_call_with_its_last_bracket():
    stream = ToolCallStream()
    assert stream.push("Let ") == ["Let"]  # the space may stand before a call
    assert stream.push("me look") == [" me look"]
    assert stream.push(".\n<tool") == ["."]
    assert stream.push("_call>" + WEATHER) == []
    assert stream.push(TOOL_CALL_END) == [PARIS]
    assert stream.push("\n") == stream.flush() == []
