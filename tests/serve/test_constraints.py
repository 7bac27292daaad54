"""Constrained answers through OpenAI's client, on a runner whose logits are noise: without a grammar it writes none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.decoding.grammar import Constraint, Grammars, answer_grammar
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.requests import Request
from telechat_twins.core.inference.sampling import sampling_config
from telechat_twins.core.types import JsonObject
from tests.support.data_support import tiny_tokenizer
from tests.support.engine_support import CHAT_CONFIG, PlainRunner, finish, tokens_of
from tests.support.serve_support import NAME, ask, chat_body, running

openai = pytest.importorskip("openai", reason="the openai client is in the dev extra")
pytest.importorskip("llguidance", reason="llguidance is in the extra serve")

FORM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "form", "strict": True, "schema": FORM}}
SMALL = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"], "additionalProperties": False}


def tool(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": SMALL}}


def noise() -> PlainRunner:
    return PlainRunner(CHAT_CONFIG, num_pages=1200, page_size=16)


@pytest.fixture(scope="module")
def server():
    with running(runner=noise()) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client, **options):
    messages = [{"role": "user", "content": "hello"}]
    return client.chat.completions.create(model=NAME, messages=messages, **{"temperature": 1, "seed": 3, **options})


def is_form(text: str | None) -> bool:
    found = json.loads(text or "")
    return list(found) == ["name", "age", "tags"] and 0 <= found["age"] <= 120 and len(found["name"]) <= 8


def test_an_answer_follows_its_schema(client):
    answer = chat(client, response_format=FORMAT, n=3)
    assert all(is_form(choice.message.content) and choice.finish_reason == "stop" for choice in answer.choices)
    assert len({choice.message.content for choice in answer.choices}) == 3, "they are drawn as before"
    greedy = chat(client, response_format=FORMAT, temperature=0, top_p=0.5)
    assert is_form(greedy.choices[0].message.content)
    chunks = list(chat(client, response_format=FORMAT, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content and chunks[-1].choices[0].finish_reason == "stop"
    # Beside others, and with logprobs, which stay the model's own.
    scored = chat(client, response_format=FORMAT, logprobs=True, top_logprobs=2).choices[0]
    assert scored.message.content == text and min(one.logprob for one in scored.logprobs.content) < -3


def test_properties_hold_beside_any_of(client):
    fields = {"n": {"type": "boolean"}, "m": {"type": "boolean"}}
    either = {"type": "object", "properties": fields, "anyOf": [{"required": ["n"]}, {"required": ["m"]}]}
    schema = {**either, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "either", "strict": True, "schema": schema}}
    for choice in chat(client, response_format=form, n=6, max_tokens=200).choices:
        found = json.loads(choice.message.content)
        assert found and set(found) <= set(fields) and all(isinstance(value, bool) for value in found.values())


def test_an_answer_is_any_object(client):
    text = chat(client, response_format={"type": "json_object"}, max_tokens=600, seed=8).choices[0]
    assert text.finish_reason == "length" or isinstance(json.loads(text.message.content), dict)
    assert text.message.content.lstrip()[0] == "{"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "g"}}])
def test_a_call_can_be_forced(client, choice):
    for stream in (False, True):
        asked = {"tools": [tool("f"), tool("g")], "tool_choice": choice, "parallel_tool_calls": False}
        answer = chat(client, **asked, stream=stream)
        if stream:
            deltas = [chunk.choices[0].delta for chunk in answer]
            calls = [call for delta in deltas for call in delta.tool_calls or ()]
            assert "".join(delta.content or "" for delta in deltas) == ""
        else:
            (made,) = answer.choices
            assert made.finish_reason == "tool_calls" and made.message.content is None
            calls = made.message.tool_calls
        (call,) = calls
        assert call.function.name in (["f", "g"] if choice == "required" else ["g"])
        assert isinstance(json.loads(call.function.arguments)["n"], bool)


def test_a_schema_beside_tools_leaves_the_choice(client):
    kinds = set()
    for seed in range(12):
        answer = chat(client, response_format=FORMAT, tools=[tool("f")], seed=seed, max_tokens=500).choices[0]
        if answer.message.tool_calls:
            kinds.add("call")
        elif answer.finish_reason == "stop":
            assert is_form(answer.message.content)
            kinds.add("form")
    assert "form" in kinds


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        (
            {"response_format": {**FORMAT, "json_schema": {"name": "x", "schema": {"type": "foo"}}}},
            "",
            "Invalid type: foo",
        ),
        (
            {"response_format": {**FORMAT, "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format",
            'Unimplemented keys: ["not"]',
        ),
        (
            {"response_format": {**FORMAT, "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1/x"}}}},
            "response_format",
            "does not fetch",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [
                    tool("f"),
                    {"type": "function", "function": {"name": "g", "parameters": {"uniqueItems": True}}},
                ],
            },
            "tools[1]",
            "uniqueItems",
        ),
    ],
)
def test_what_cannot_be_enforced_is_refused(server, options, param, says):
    answer = ask(server.port, "/v1/chat/completions", chat_body(**options))
    assert answer.status == 400 and says in answer.error["message"]
    assert answer.error["param"].startswith(param) and answer.error["code"] == "invalid_value"


def test_further_tokens_end_an_answer(client):
    whole = chat(client, max_tokens=40, logprobs=True).choices[0].logprobs.content
    ids = tiny_tokenizer(in_vocabulary=True)
    stops = [i for i in range(600) if ids.token_bytes(i) == bytes(whole[5].bytes)]
    cut = chat(client, max_tokens=40, logprobs=True, extra_body={"stop_token_ids": stops}).choices[0]
    first = next(n for n, one in enumerate(whole) if one.bytes == whole[5].bytes)
    assert cut.finish_reason == "stop" and len(cut.logprobs.content) == first


def test_reasoning_goes_back_to_the_model(client, server):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "because\n"},
        {"role": "user", "content": "and?"},
    ]
    client.chat.completions.create(model=NAME, messages=turns, max_tokens=1)
    prompt = next(p for p in reversed(server.runner.prefixes) if p[-1] == 5)
    assert "<think>\nbecause\n</think>\n\na" in tiny_tokenizer(in_vocabulary=True).decode(prompt)
    turns[0]["reasoning_content"] = "x"
    answer = ask(server.port, "/v1/chat/completions", {"model": NAME, "messages": turns})
    assert answer.status == 400 and answer.error["param"] == "messages[0].reasoning_content"


def test_masked_rows_leave_their_neighbours_alone():
    """Constrained and free samples in one batch, with shared prompts: each gets the tokens that it gets alone."""
    tokenizer = tiny_tokenizer(in_vocabulary=True)
    grammar = answer_grammar(FORM, None, tokenizer)
    asked = [
        Request(
            prompt_ids=(4, *range(40, 90), 5),
            max_new_tokens=60,
            sampling=sampling_config(temperature=0.8, top_k=40, repetition_penalty=1.1, seed=seed),
            stop_ids=frozenset({2}),
            grammar=grammar if seed % 2 else None,
            text="answer",
        )
        for seed in range(6)
    ]

    def answers(requests, pages: int) -> list[list[int]]:
        runner = PlainRunner(CHAT_CONFIG, num_pages=pages, page_size=16)
        engine = Engine(runner, tokenizer, limits=EngineLimits(max_len=200))
        numbers = [engine.submit(request) for request in requests]
        found = finish(engine)
        assert engine.pool.available == pages - 1
        return [tokens_of(found[number]) for number in numbers]

    alone = [answers([request], 100)[0] for request in asked]
    assert answers(asked, 100) == alone
    assert answers(asked, 16) == alone, "preemption computes the tokens again, not the grammar"


def test_a_planted_fault_is_seen(monkeypatch):
    """A mask that forgets a token lets through what the schema does not allow."""
    tokenizer = tiny_tokenizer(in_vocabulary=True)

    def written() -> str:
        engine = Engine(noise(), tokenizer)
        grammar = answer_grammar(FORM, None, tokenizer)
        sampling = sampling_config(temperature=1.0, seed=5)
        engine.submit(
            Request(
                prompt_ids=(4, 9, 5),
                max_new_tokens=300,
                sampling=sampling,
                stop_ids={2},
                grammar=grammar,
                text="answer",
            )
        )
        (events,) = finish(engine).values()
        return "".join(event.text for event in events)

    assert is_form(written())
    taken: list[int] = []
    real = Constraint.take

    def forgetful(self, token: int) -> None:
        taken.append(token)
        if len(taken) != 3:
            real(self, token)

    monkeypatch.setattr(Constraint, "take", forgetful)
    with pytest.raises((ValueError, AssertionError)):
        assert is_form(written())


def test_what_the_vocabulary_cannot_write_is_refused_with_its_reason():
    tokenizer = tiny_tokenizer(in_vocabulary=True)
    with pytest.raises(UserError, match="x-guidance is llguidance's own"):
        answer_grammar({"x-guidance": {}}, None, tokenizer)
    with pytest.raises(UserError, match="the grammar cannot be followed \\(Invalid type: foo"):
        Grammars(tokenizer, 600, {2}).check(answer_grammar({"type": "foo"}, None, tokenizer))


CIRCLES: list[JsonObject] = [
    {"$ref": "#"},
    {"allOf": [{"type": "object"}, {"$ref": "#"}]},
    {"anyOf": [{"$ref": "#/anyOf/1"}, {"$ref": "#/anyOf/0"}]},
    {
        "properties": {"a": {"$ref": "#/$defs/b~1c"}},
        "$defs": {"b/c": {"$ref": "#/$defs/d"}, "d": {"$ref": "#/$defs/b~1c"}},
    },
]
TREES: list[JsonObject] = [
    {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"$ref": "#"}}},
    {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}},
]


@pytest.mark.parametrize("schema", CIRCLES)
def test_a_reference_that_leads_back_to_itself_is_refused(schema: JsonObject) -> None:
    with pytest.raises(UserError, match=r"the grammar cannot be followed \(a \$ref leads back to itself"):
        answer_grammar(schema, None, tiny_tokenizer(in_vocabulary=True))


def test_references_that_values_stand_between_are_followed() -> None:
    tokenizer = tiny_tokenizer(in_vocabulary=True)
    grammars = Grammars(tokenizer, tokenizer.vocab_size, {2})
    for schema in TREES:
        grammar = answer_grammar(schema, None, tokenizer)
        assert np.isfinite(grammars.constraint(grammar, {2}).mask(np.zeros(tokenizer.vocab_size))).any()
