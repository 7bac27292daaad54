"""What clients of other servers send: fields of vLLM that are honoured or refused by name, and paths that are not
here."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.requests import Request
from telechat_twins.core.inference.sampling import SamplingConfig
from telechat_twins.core.serve.elsewhere.fields import FIELDS
from telechat_twins.core.types import JsonObject
from tests.support.data_support import tiny_tokenizer
from tests.support.engine_support import CHAT_CONFIG, PlainRunner, finish, tokens_of
from tests.support.serve_support import NAME, ask, chat_body, running

pytest.importorskip("llguidance", reason="llguidance is in the extra serve")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def call(number: int) -> str:
    return f'<tool_call>\n{{"name": "f", "arguments": {{"a": {number}, "mark": "</tool_call>"}}}}\n</tool_call>'


def reply(question: str) -> str:
    if question == "calls":
        return f"First. {call(1)}\n{call(2)} Done."
    if question == "thinks":
        return f"Perhaps {call(7)}?\n</think>\n\n{call(1)}\n{call(2)}"
    return "one two three four five"


@pytest.fixture(scope="module")
def server():
    with running(reply) as made:
        yield made


@pytest.fixture(scope="module")
def noise():
    with running(runner=PlainRunner(CHAT_CONFIG, num_pages=1200, page_size=16)) as made:
        yield made


def completion(**options: object) -> JsonObject:
    return {"model": NAME, "prompt": "hello", "max_tokens": 40, "temperature": 1, **options}


def text_of(server, **options: object) -> str:
    answer = ask(server.port, COMPLETIONS, completion(**options))
    assert answer.status == 200, answer.raw
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    return answer.json["choices"][0]["text"]


@pytest.mark.parametrize(
    ("field", "kind"), [("structured_outputs", "{}"), ("guided", "guided_{}")], ids=["newer", "older"]
)
def test_structured_outputs_are_followed(noise, field: str, kind: str):
    def asked(name: str, value: object) -> JsonObject:
        return {field: {name: value}} if field == "structured_outputs" else {kind.format(name): value}

    choices = ["yes", "no", "你好", 'a "quote" / \\ and\nmore']
    for seed in range(6):
        assert text_of(noise, seed=seed, **asked("choice", choices)) in choices
        assert re.fullmatch(r"[a-c]{2}/\d\n?", text_of(noise, seed=seed, **asked("regex", "[a-c]{2}/[0-9]\\n?")))
        assert text_of(noise, seed=seed, **asked("json", {"type": "boolean"})).strip() in ("true", "false")
        assert text_of(noise, seed=seed, **asked("json", '{"enum": [1, 2]}')).strip() in ("1", "2")
        said = ask(noise.port, CHAT, chat_body(seed=seed, temperature=1, **asked("choice", choices))).json
        assert said["choices"][0]["message"]["content"] in choices


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        ({"structured_outputs": {}}, "structured_outputs", "must have one of json, json_object, choice, regex"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar", "Unknown parameter"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs.regex",
            "is not allowed beside structured_outputs.choice",
        ),
        (
            {"guided_json": {}, "response_format": {"type": "json_object"}},
            "guided_json",
            "is not allowed beside response_format",
        ),
        ({"guided_json": "{"}, "guided_json", "found text that is none (not valid JSON"),
        ({"guided_json": 3}, "guided_json", "expected a JSON schema, found 3"),
        ({"guided_choice": []}, "guided_choice", "expected a list of texts"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "none empty"),
        ({"guided_regex": "("}, "structured_outputs", "the grammar cannot be followed"),
        ({"guided_regex": "(?=a)b"}, "structured_outputs", "look-around"),
        ({"guided_regex": "a" * 1001}, "guided_regex", "must have 1 to 1000 characters"),
        ({"guided_grammar": "x"}, "guided_grammar", "use response_format, or structured_outputs"),
        ({"min_tokens": 41}, "min_tokens", "must be at most the answer's limit of 40 tokens, found 41"),
        ({"min_tokens": -1}, "min_tokens", "must be at least 0"),
    ],
)
def test_what_cannot_be_followed_is_refused(noise, options: JsonObject, param: str, says: str):
    error = ask(noise.port, COMPLETIONS, completion(**options)).error
    assert error["param"] == param and says in error["message"]


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_fields_of_other_servers_are_refused_with_what_to_do(server, field: str):
    for value in FIELDS[field].neutral:
        for path, body in ((CHAT, chat_body()), (COMPLETIONS, completion())):
            assert ask(server.port, path, {**body, field: value}).status == 200
    refused = {"add_generation_prompt": False, "spaces_between_special_tokens": "x"}.get(field, ["something"])
    error = ask(server.port, CHAT, chat_body(**{field: refused})).error
    assert error["param"] == field and error["message"] == f"{field}: {FIELDS[field].advice}"


def test_true_is_not_one(server):
    assert ask(server.port, CHAT, chat_body(length_penalty=1)).status == 200
    assert ask(server.port, CHAT, chat_body(length_penalty=True)).status == 400
    assert ask(server.port, CHAT, chat_body(use_beam_search=0)).status == 400
    inside = ask(server.port, CHAT, chat_body(response_format={"type": "text", "priority": 0}))
    assert inside.error["message"].startswith("Unknown parameter: 'response_format.priority'")


def test_an_answer_has_its_least_tokens(server):
    """<_end> is what the runner gives by far; with min_tokens it is not chosen before its time."""
    short = ask(server.port, CHAT, chat_body(temperature=0)).json
    made = short["usage"]["completion_tokens"]
    assert short["choices"][0]["finish_reason"] == "stop"
    for stream in (False, True):
        body = chat_body(temperature=0, min_tokens=made - 1, stream=stream)
        assert ask(server.port, CHAT, body).raw.count(b'"stop"') == 1
    stopped = ask(server.port, CHAT, chat_body(temperature=0, stop=["two", "four"])).json["choices"][0]["message"]
    later = ask(server.port, CHAT, chat_body(temperature=0, stop=["two", "four"], min_tokens=made - 8)).json["choices"]
    assert stopped["content"].rstrip() == "one" and len(later[0]["message"]["content"]) > len("one two")


def test_stop_tokens_wait_for_the_least():
    def logits(_: Sequence[int], size: int) -> np.ndarray:
        row = np.zeros(size, np.float32)
        row[2], row[7] = 9.0, 5.0
        return row

    engine = Engine(PlainRunner(CHAT_CONFIG, 200, 16, logits), tiny_tokenizer(in_vocabulary=True))
    for drawn in (SamplingConfig(), SamplingConfig(temperature=0.01)):
        for least in (0, 1, 5):
            request = Request(
                prompt_ids=(5, 6), max_new_tokens=9, min_new_tokens=least, stop_ids=frozenset({2}), sampling=drawn
            )
            number = engine.submit(request)
            assert tokens_of(finish(engine)[number]) == [7] * least + [2]


def test_a_grammar_that_is_complete_ends_before_the_least(noise):
    assert text_of(noise, min_tokens=30, seed=1, guided_choice=["yes", "no"]) in ("yes", "no")


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_ends_an_answer(server, stream: bool):
    body = chat_body("calls", tools=[TOOL], temperature=0, parallel_tool_calls=False, stream=stream)
    raw = ask(server.port, CHAT, body).raw.decode()
    assert raw.count('"name":"f"') == 1 and '"finish_reason":"tool_calls"' in raw
    assert "Done" not in raw and r"</tool_call>\"" in raw
    both = ask(server.port, CHAT, {**body, "parallel_tool_calls": True}).raw.decode()
    assert both.count('"name":"f"') == 2


def test_a_call_in_the_reasoning_does_not_end_it():
    with running(reply, thinking=True) as server:
        body = chat_body("thinks", tools=[TOOL], temperature=0, parallel_tool_calls=False)
        message = ask(server.port, CHAT, body).json["choices"][0]["message"]
    assert [made["function"]["arguments"][:7] for made in message["tool_calls"]] == ['{"a": 1']
    assert "Perhaps" in message["reasoning_content"] and '"a": 7' in message["reasoning_content"]


@pytest.mark.parametrize(
    ("method", "path", "says"),
    [
        ("POST", "/v1/embeddings", "generates text only"),
        ("POST", "/rerank", "generates text only"),
        ("POST", "/v1/audio/speech", "generates text only"),
        ("POST", "/tokenize", "tele tokenize"),
        ("POST", "/v1/tokenize/", "tele tokenize"),
        ("GET", "/v1/responses/resp_1", "stores nothing"),
        ("GET", "/v1/chat/completions/chatcmpl-1", "stores nothing"),
        ("POST", "/v1/files", "stores nothing"),
        ("POST", "/v1/load_lora_adapter", "--adapter NAME=DIR"),
        ("POST", "/v1/messages", "use /v1/chat/completions"),
        ("POST", "/api/chat", "use /v1/chat/completions"),
        ("POST", "/generate", "use /v1/completions"),
        ("GET", "/healthz", "use /health"),
        ("GET", "/health/", "did you mean /health?"),
        ("GET", "/docs", "docs/serving.md"),
        ("POST", "/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("POST", "/v1/response", "did you mean /v1/responses?"),
        ("POST", "/chat/completions/", "did you mean /v1/chat/completions?"),
    ],
)
def test_a_path_that_is_not_here_says_where_to_go(server, method: str, path: str, says: str):
    answer = ask(server.port, path, {} if method == "POST" else None, method=method)
    assert answer.status == 404 and says in answer.error["message"]


def test_a_wrong_method_says_which_ones_there_are(server):
    answer = ask(server.port, CHAT)
    assert answer.status == 405 and answer.headers["allow"] == "POST"
    assert answer.error["message"].endswith("has no route GET '/v1/chat/completions'; it takes POST")
    assert "it takes GET, HEAD" in ask(server.port, "/v1/models", {}, method="PUT").error["message"]


def test_paths_that_nothing_is_known_of_get_no_advice(server):
    for path in ("/x", "/v1/" + "a" * 3000, "/%00", "/v1/chat"):
        assert ";" not in ask(server.port, path).error["message"]
