"""A model that reasons first, at every endpoint: its reasoning stays apart from the answer, whose form still holds."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from telechat_twins.core.inference.decoding.grammar import Grammars, answer_grammar, call_rules
from telechat_twins.core.types import JsonObject
from tests.support.data_support import tiny_tokenizer
from tests.support.engine_support import CHAT_CONFIG, PlainRunner, fake_logits
from tests.support.serve_support import NAME, Running, running

openai = pytest.importorskip("openai", reason="the openai client is in the dev extra")

TOKENIZER = tiny_tokenizer(in_vocabulary=True)
BOT = TOKENIZER.control["<_bot>"]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "name": "get_weather", "parameters": CITY}]
FORM = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"], "additionalProperties": False}


def reply(question: str) -> str:
    if question == "endless":
        return "on and on " * 300
    answer = CALL if question == "weather?" else f"You said: {question}"
    return f"They ask, {{so}} I answer.\n</think>\n\n{answer}"


@pytest.fixture(scope="module")
def server():
    with running(reply, thinking=True) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Running):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_chat_keeps_it_apart(client):
    asked = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    whole = client.chat.completions.create(**asked)
    message, usage = whole.choices[0].message, whole.usage
    assert (message.reasoning_content, message.content) == ("They ask, {so} I answer.", "You said: hello")
    said = TOKENIZER.encode(reply("hello"))
    ends = next(n for n in range(len(said)) if "</think>" in TOKENIZER.decode(said[:n]))
    assert usage.completion_tokens_details.reasoning_tokens == ends and usage.completion_tokens == len(said) + 1
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning_content
    assert "".join(delta.content or "" for delta in deltas) == message.content


def test_a_response_has_it_as_an_item_of_its_own(client, server):
    answer = client.responses.create(model=NAME, input="weather?", tools=TOOLS, temperature=0)
    thought, call = answer.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "They ask, {so} I answer.")
    assert thought.id.startswith("rs_") and thought.summary == [] and call.name == "get_weather"
    reasoned = answer.usage.output_tokens_details.reasoning_tokens
    assert len(TOKENIZER.encode("They ask, {so} I answer.")) < reasoned < answer.usage.output_tokens
    # An agent sends back what it got; the layout drops the reasoning of earlier turns, and a plain one keeps it.
    talk: list[JsonObject] = [{"role": "user", "content": "weather?"}]
    talk += [item.model_dump(exclude_none=True) for item in answer.output]
    talk.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
    asked = {"model": NAME, "input": talk, "tools": TOOLS, "max_output_tokens": 1}
    client.responses.create(**asked)
    assert "They ask" not in prompt_of(server, server.runner.opening)
    with running() as plain, openai.OpenAI(base_url=f"{plain.url}/v1", api_key="none") as other:
        other.responses.create(**asked)
        kept = prompt_of(plain)
    assert "<think>\nThey ask, {so} I answer.\n</think>\n\n<tool_call>" in kept and kept.count("They ask") == 1


def prompt_of(server: Running, opening: int = 0) -> str:
    """The prompt of the latest chat."""
    found = next(p for p in reversed(server.runner.prefixes) if p[-1 - opening] == BOT)
    return TOKENIZER.decode(found, skip_special=False)


def test_a_streamed_response_adds_up(client):
    with client.responses.stream(model=NAME, input="hello", temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert thought == "They ask, {so} I answer." == final.output[0].content[0].text
    done = [event.item.type for event in events if event.type == "response.output_item.done"]
    assert done == ["reasoning", "message"] and final.output_text == "You said: hello"
    cut = client.responses.create(model=NAME, input="endless", max_output_tokens=9, temperature=0)
    (only,) = cut.output
    assert (only.type, only.status, cut.status, cut.output_text) == ("reasoning", "incomplete", "incomplete", "")


def thinks_first(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Noise that closes its reasoning after some tokens, if it is asked what a chat answers."""
    said = len(ids) - 1 - max((place for place, token in enumerate(ids) if token == BOT), default=len(ids))
    logits = fake_logits(ids, vocab_size)
    end = TOKENIZER.encode("so\n</think>")
    place = said - len(TOKENIZER.encode("<think>\n"))
    if 0 <= place < len(end):
        logits[end[place]] = 40.0
    return logits


def test_formats_and_forced_calls_begin_behind_it():
    pytest.importorskip("llguidance", reason="llguidance is in the extra serve")
    noise = PlainRunner(CHAT_CONFIG, num_pages=600, page_size=16, logits=thinks_first)
    question = [{"role": "user", "content": "x"}]
    with (
        running(runner=noise, thinking=True) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        form = {"type": "json_schema", "json_schema": {"name": "form", "schema": FORM}}
        chat = client.chat.completions.create
        message = chat(model=NAME, messages=question, response_format=form, seed=1).choices[0].message
        assert message.reasoning_content == "so" and list(json.loads(message.content)) == ["n"]
        tools = [{"type": "function", "function": {"name": "get_weather", "parameters": FORM}}]
        made = chat(model=NAME, messages=question, tools=tools, tool_choice="required", seed=1, max_tokens=400)
        calls = made.choices[0].message.tool_calls
        assert {call.function.name for call in calls} == {"get_weather"}
        assert isinstance(json.loads(calls[0].function.arguments)["n"], bool)


def test_a_mark_that_is_a_token_ends_it_too():
    """As in TeleChat3's vocabulary; here by the tiny tokenizer's token of another mark."""
    pytest.importorskip("llguidance", reason="llguidance is in the extra serve")
    marked = Marked()
    end = marked.silent["</think>"]
    for schema, calls, answer in ((FORM, None, '{"n":true}'), (None, call_rules({"f": FORM}, False, TOKENIZER), None)):
        grammar = answer_grammar(schema, calls, marked, thinking=True)  # type: ignore[arg-type]
        state = Grammars(TOKENIZER, 600, {2}).constraint(grammar, {2})
        for token in [*TOKENIZER.encode('free {"n'), end, *TOKENIZER.encode(answer or "")]:
            assert np.isfinite(state.mask(np.zeros(600))[token]), TOKENIZER.token_bytes(token)
            state.take(token)
        allowed = {index for index in range(600) if np.isfinite(state.mask(np.zeros(600))[index])}
        call = TOKENIZER.control["<tool_call>"]
        assert allowed == {2} if answer else call in allowed and TOKENIZER.encode("a")[-1] not in allowed


class Marked:
    """The tiny tokenizer with </think> among its tokens."""

    silent = {**TOKENIZER.silent, "</think>": TOKENIZER.silent["<_control9>"]}

    def __getattr__(self, name: str) -> object:
        return getattr(TOKENIZER, name)
