"""Tool calls out of an answer's text, whole and as it comes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.data.chat_template import render
from telechat_twins.core.data.control import TOOL_CALL, TOOL_CALL_END
from telechat_twins.core.inference.tool_calls import ToolCall, ToolCallStream, parse_tool_calls

WEATHER = '\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
PARIS = ToolCall("get_weather", '{"city": "Paris"}')
NOON = ToolCall("clock", "{}")


def block(inside: str) -> str:
    return f"{TOOL_CALL}{inside}{TOOL_CALL_END}"


def written(name: str, **arguments: object) -> tuple[str, ToolCall]:
    """A block as the chat template asks for it, and the call in it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return block(f"\n{body}\n"), ToolCall(name, json.dumps(arguments, ensure_ascii=False))


# The closing mark where it is part of the JSON: in strings, keys, behind escapes, in JSON inside JSON.
INSIDE = [
    written("write", path="a.md", content=f"A call ends with {TOOL_CALL_END} in this layout."),
    written("write", content=f'"quoted" {TOOL_CALL_END}" and a backslash \\'),
    written("write", content="\\" + TOOL_CALL_END),
    written("write", content=f'\\"{TOOL_CALL_END}{TOOL_CALL}'),
    written("write", content=f"{block(WEATHER)}\n{block(WEATHER)}"),
    written("write", **{f"key {TOOL_CALL_END}": [{"deep": [TOOL_CALL_END, "}", "{"]}]}),
    written(f"name {TOOL_CALL_END}", content=f"\u4f60{TOOL_CALL_END}\U0001f600"),
]


@pytest.mark.parametrize(
    ("text", "words", "calls"),
    [
        ("just words", "just words", []),
        (" spaces kept \n", " spaces kept \n", []),
        (block(WEATHER), "", [PARIS]),
        ("Let me look.\n" + block(WEATHER) + "\n" + block('{"name": "clock"}'), "Let me look.\n", [PARIS, NOON]),
        (" \n" + block(WEATHER) + " \n ", "", [PARIS]),
        (block(WEATHER) + " and \n" + block('{"name": "clock"}') + "\n", "and \n", [PARIS, NOON]),
        (
            f"<think>\n{block(WEATHER)}\n</think>\n\n{block(WEATHER)}",
            f"<think>\n{block(WEATHER)}\n</think>\n\n",
            [PARIS],
        ),
        (f"\n<think>{TOOL_CALL}</think>{block(WEATHER)}", f"\n<think>{TOOL_CALL}</think>", [PARIS]),
        (f"<think>{block(WEATHER)}</thin", f"<think>{block(WEATHER)}</thin", []),  # cut off while it reasons
        (f"a <think>{block(WEATHER)}</think>", "a <think></think>", [PARIS]),  # words, then a mark that is one of them
        ("<thi", "<thi", []),
        (" " * 99 + f"<think>{block(WEATHER)}", " " * 99 + "<think>", [PARIS]),
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
        *((text, "", [call]) for text, call in INSIDE),
        ("".join(text for text, _ in INSIDE) + " done", "done", [call for _, call in INSIDE]),
        # Arguments as the text of JSON, with the mark in it.
        (
            block(json.dumps({"name": "f", "arguments": json.dumps({"a": TOOL_CALL_END})})),
            "",
            [ToolCall("f", json.dumps({"a": TOOL_CALL_END}))],
        ),
        # Ended without the closing mark, or within it.
        (INSIDE[0][0].removesuffix(TOOL_CALL_END), "", [INSIDE[0][1]]),
        (TOOL_CALL + WEATHER + "</tool", "", [PARIS]),
        # JSON that is no call ends where it ends; what is not JSON ends with the first mark.
        (block('{"nam": "' + TOOL_CALL_END + '"}') + " x", block('{"nam": "' + TOOL_CALL_END + '"}') + " x", []),
        (block('{"name": "f" ' + TOOL_CALL) + block(WEATHER), block('{"name": "f" ' + TOOL_CALL), [PARIS]),
        (block('{"name": "f}') + "\n" + block(WEATHER), block('{"name": "f}') + "\n", [PARIS]),
        (block('{"name": "f"} more') + block(WEATHER), block('{"name": "f"} more'), [PARIS]),
        (
            TOOL_CALL + '{"a": "b' + TOOL_CALL_END + "and so on",
            TOOL_CALL + '{"a": "b' + TOOL_CALL_END + "and so on",
            [],
        ),
        # What JSON cannot carry to a client is no call.
        (block('{"name": "f", "arguments": {"a": NaN}}'), block('{"name": "f", "arguments": {"a": NaN}}'), []),
        (block('{"name": "f", "arguments": {"a": 1e999}}'), block('{"name": "f", "arguments": {"a": 1e999}}'), []),
        (block('{"name": "\\ud800"}'), block('{"name": "\\ud800"}'), []),
    ],
)
def test_calls_of_a_whole_answer(text, words, calls):
    assert parse_tool_calls(text) == (words, calls)


PARTS = st.sampled_from(
    [block(WEATHER), block('{"name": "clock"}'), block("{"), TOOL_CALL, TOOL_CALL_END, "<tool", "<", " ", "\n", "words"]
    + ["<think>", "</think>", "<thi", "nk>"]
    + [text for text, _ in INSIDE]
    + ['{"name": "f", "arguments": {"a": "', '"', "\\", "}", '{"a": "', "{}", "}}", "</tool_"]
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


@pytest.mark.parametrize(("text", "call"), INSIDE)
def test_a_mark_in_a_string_is_read_alike_at_every_cut(text, call):
    for cut in range(len(text) + 1):
        stream = ToolCallStream()
        assert [*stream.push(text[:cut]), *stream.push(text[cut:]), *stream.flush()] == [call]
    stream = ToolCallStream()
    assert [said for letter in text for said in stream.push(letter)] == [call], "certain with its closing mark"


def test_words_are_told_at_once_and_a_call_with_its_last_bracket():
    stream = ToolCallStream()
    assert stream.push("Let ") == ["Let "]
    assert stream.push("me look") == ["me look"]
    assert stream.push(".\n<tool") == [".\n"]
    assert stream.push("_call>" + WEATHER) == []
    assert stream.push(TOOL_CALL_END) == [PARIS]
    assert stream.push("\n") == stream.flush() == []


@pytest.mark.parametrize("words", ["", "Let me look.", "Let me look.\n", "\n\nx ", "<think>\nhm\n</think>\n\n", " a\t"])
@pytest.mark.parametrize("calls", [[PARIS], [PARIS, NOON]])
def test_an_answer_is_rendered_again_as_it_was(words, calls):
    """What rejection sampling writes is trained as it was said; the next turn's prompt holds it as it was computed."""
    named = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls]
    message = {"role": "assistant", "content": words, "tool_calls": named}
    answer = render([{"role": "user", "content": "q"}, message]).partition("<_bot>")[2].partition("<_end>")[0]
    assert parse_tool_calls(answer) == (words, calls)
