"""Whatever is wrong with a request is said in the OpenAI interface's form, with the field's name and a right status."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket

import numpy as np
import pytest

from telechat_twins.core.serve.errors import ApiError
from telechat_twins.core.serve.fields import Fields
from tests.support.data_support import tiny_tokenizer
from tests.support.engine_support import CONTEXT, Replier
from tests.support.serve_support import NAME, Running, ask, chat_body, running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "f"}}
OTHER = {"type": "function", "function": {"name": "g"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "form", "schema": {"type": "object"}}}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
TWO = {**CALLS, "tool_calls": [{**CALLS["tool_calls"][0], "id": number} for number in "ab"]}


def result(number: str) -> dict:
    return {"role": "tool", "tool_call_id": number, "content": f"of {number}"}


@pytest.fixture(scope="module")
def server():
    with running() as made:
        yield made


def completion(**options) -> dict:
    return {"model": NAME, "prompt": "hello", **options}


def talk(*messages, **options) -> dict:
    return {"model": NAME, "messages": list(messages), **options}


WRONG = [
    # which fields there are
    (CHAT, {}, 400, "model", "model: is missing; this server has 'tiny'"),
    (CHAT, {"model": NAME}, 400, "messages", "messages: must have at least one message"),
    (COMPLETIONS, {"model": NAME}, 400, "prompt", "prompt: is missing"),
    (CHAT, chat_body(model="gpt-4"), 404, "model", "The model 'gpt-4' does not exist"),
    (CHAT, chat_body(model=7), 400, "model", "model: expected a string, found 7"),
    (CHAT, chat_body(temperatur=1), 400, "temperatur", "Unknown parameter: 'temperatur', did you mean 'temperature'?"),
    (CHAT, chat_body(prompt="x"), 400, "prompt", "Unknown parameter: 'prompt'"),
    (COMPLETIONS, completion(messages=[USER]), 400, "messages", "Unknown parameter: 'messages'"),
    (CHAT, chat_body(**{"x" * 5000: 1}), 400, None, "Unknown parameter: 'xxx"),
    # types and ranges
    (CHAT, chat_body(temperature="hot"), 400, "temperature", "expected a number, found 'hot'"),
    (CHAT, chat_body(temperature=True), 400, "temperature", "expected a number, found true"),
    (CHAT, chat_body(temperature=2.5), 400, "temperature", "must be 0.0 to 2.0, found 2.5"),
    (CHAT, b'{"model": "tiny", "temperature": 1e999, "messages": []}', 400, None, "the number 1e999 is out of range"),
    (CHAT, chat_body(top_p=-0.1), 400, "top_p", "must be 0.0 to 1.0"),
    (CHAT, chat_body(min_p=1.1), 400, "min_p", "must be 0.0 to 1.0"),
    (CHAT, chat_body(top_k=1.5), 400, "top_k", "expected a whole number, found 1.5"),
    (CHAT, chat_body(presence_penalty=3), 400, "presence_penalty", "must be -2.0 to 2.0"),
    (CHAT, chat_body(frequency_penalty=-3), 400, "frequency_penalty", "must be -2.0 to 2.0"),
    (CHAT, chat_body(repetition_penalty=0), 400, "repetition_penalty", "must be 0.01 to 100.0"),
    (CHAT, chat_body(n=0), 400, "n", "must be 1 to 128, found 0"),
    (CHAT, chat_body(n=17), 400, "n", "n: this server takes at most 16 answers at once, found 17"),
    (CHAT, chat_body(max_tokens=0), 400, "max_tokens", "must be at least 1, found 0"),
    (CHAT, chat_body(max_tokens=10**30), 400, "messages", f"maximum context length is {CONTEXT} tokens"),
    (CHAT, chat_body(max_tokens=5, max_completion_tokens=5), 400, "max_tokens", "give only one of the two"),
    (CHAT, chat_body(seed="x"), 400, "seed", "expected a whole number"),
    (CHAT, chat_body(seed=2**70), 400, "seed", "must be"),
    (CHAT, chat_body(stream="yes"), 400, "stream", "expected true or false, found 'yes'"),
    (CHAT, chat_body(stream_options={"include_usage": True}), 400, "stream_options", "is only allowed with stream"),
    (CHAT, chat_body(stream=True, stream_options={"x": 1}), 400, "stream_options.x", "Unknown parameter"),
    (CHAT, chat_body(stop=["a", 3]), 400, "stop", "expected a string or a list of strings"),
    (CHAT, chat_body(stop=["a", ""]), 400, "stop", "strings of 1 to 1000 characters"),
    (CHAT, chat_body(stop=["a"] * 17), 400, "stop", "at most 16 strings"),
    (CHAT, chat_body(logit_bias=[]), 400, "logit_bias", "expected an object, found a list of 0"),
    (CHAT, chat_body(logit_bias={"600": 1}), 400, "logit_bias", "'600' is not a token id of this vocabulary of 600"),
    (CHAT, chat_body(logit_bias={"-1": 1}), 400, "logit_bias", "'-1' is not a token id"),
    (CHAT, chat_body(logit_bias={"\u0663": 1}), 400, "logit_bias", "is not a token id"),
    (CHAT, chat_body(logit_bias={"5": 101}), 400, "logit_bias", "must be a number from -100 to 100, found 101"),
    (CHAT, chat_body(logprobs=3), 400, "logprobs", "expected true or false, found 3"),
    (CHAT, chat_body(top_logprobs=3), 400, "top_logprobs", "needs logprobs to be true"),
    (CHAT, chat_body(logprobs=True, top_logprobs=21), 400, "top_logprobs", "must be 0 to 20"),
    (COMPLETIONS, completion(logprobs=21), 400, "logprobs", "must be 0 to 20"),
    (CHAT, chat_body(user=5), 400, "user", "expected a string, found 5"),
    (CHAT, chat_body(metadata="x"), 400, "metadata", "expected an object"),
    # what is not here
    (COMPLETIONS, completion(max_tokens=0), 400, "max_tokens", "must be at least 1"),
    (COMPLETIONS, completion(best_of=3), 400, "best_of", "is not supported by this server"),
    (COMPLETIONS, completion(suffix="x"), 400, "suffix", "is not supported by this server"),
    (CHAT, chat_body(response_format={"type": "xml"}), 400, "response_format.type", "must be 'text', 'json_object' or"),
    (CHAT, chat_body(response_format={"type": "json_schema"}), 400, "response_format.json_schema", "is missing"),
    (CHAT, chat_body(response_format=SCHEMA | {"x": 1}), 400, "response_format.x", "Unknown parameter"),
    (
        CHAT,
        chat_body(response_format={"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}),
        400,
        "response_format.json_schema.name",
        "expected 1 to 64 of a-z",
    ),
    (
        CHAT,
        chat_body(response_format=SCHEMA | {"type": "text"}),
        400,
        "response_format.json_schema",
        "is only allowed with",
    ),
    (CHAT, chat_body(stop_token_ids=[600]), 400, "stop_token_ids", "600 is not a token id of this vocabulary of 600"),
    (CHAT, chat_body(stop_token_ids=[True]), 400, "stop_token_ids", "true is not a token id"),
    (CHAT, chat_body(stop_token_ids=[5] * 65), 400, "stop_token_ids", "must have at most 64 tokens, found 65"),
    (
        CHAT,
        chat_body(chat_template_kwargs={"enable_thinking": False}),
        400,
        "chat_template_kwargs",
        "'enable_thinking' has no effect on this model's chat template, TeleChat2's built-in layout, which reads none",
    ),
    (CHAT, chat_body(modalities=["audio"]), 400, "modalities", "this model generates text only"),
    (CHAT, chat_body(functions=[]), 400, "functions", "is not supported by this server"),
    (
        CHAT,
        chat_body(tools=[TOOL], tool_choice="sometimes"),
        400,
        "tool_choice",
        "must be 'none', 'auto', 'required', or",
    ),
    (CHAT, chat_body(tools=[TOOL], tool_choice=OTHER), 400, "tool_choice", "names 'g', which is not one of the tools"),
    (CHAT, chat_body(tool_choice="auto"), 400, "tool_choice", "is only allowed with tools"),
    (CHAT, chat_body(tools=[TOOL], parallel_tool_calls=0), 400, "parallel_tool_calls", "expected true or false"),
    # tools
    (CHAT, chat_body(tools={}), 400, "tools", "expected a list"),
    (CHAT, chat_body(tools=["f"]), 400, "tools[0]", "expected {'type': 'function'"),
    (CHAT, chat_body(tools=[{"type": "function", "function": {"name": "a b"}}]), 400, "tools[0]", "function.name"),
    (CHAT, chat_body(tools=[{**TOOL, "function": {"name": "f", "parameters": 3}}]), 400, "tools[0]", "wrong type, 3"),
    (
        CHAT,
        chat_body(tools=[{**TOOL, "function": {"name": "f", "description": "\ud800"}}]),
        400,
        "tools[0].function.description",
        "U+D800",
    ),
    # prompts
    (COMPLETIONS, completion(prompt=3), 400, "prompt", "expected a string, a list of strings, token ids"),
    (COMPLETIONS, completion(prompt=[]), 400, "prompt", "must have at least one token"),
    (COMPLETIONS, completion(prompt=""), 400, "prompt", "must have at least one token"),
    (COMPLETIONS, completion(prompt=["a", ""]), 400, "prompt", "prompt[1] must have at least one token"),
    (COMPLETIONS, completion(prompt=["a", None]), 400, "prompt", "prompt[1] expected"),
    (COMPLETIONS, completion(prompt=[1, "a"]), 400, "prompt", "expected a string"),
    (COMPLETIONS, completion(prompt=[1, True]), 400, "prompt", "expected a string"),
    (COMPLETIONS, completion(prompt=[600]), 400, "prompt", "token id 600 is outside the vocabulary of 600"),
    (COMPLETIONS, completion(prompt=[[5], [-1]]), 400, "prompt", "prompt[1] token id -1 is outside"),
    (COMPLETIONS, completion(prompt=[10**400]), 400, None, "body: a number has 401 digits"),
    (COMPLETIONS, completion(prompt=[10**30]), 400, "prompt", "is outside the vocabulary"),
    (COMPLETIONS, completion(prompt=["a"] * 129), 400, "prompt", "must have at most 128 prompts, found 129"),
    (COMPLETIONS, completion(prompt="half \ud83d"), 400, "prompt", "half of a surrogate pair (U+D83D at character 5)"),
    (COMPLETIONS, completion(prompt=[40] * CONTEXT), 400, "prompt", f"your prompt resulted in {CONTEXT} tokens"),
    (
        COMPLETIONS,
        completion(prompt=[40] * 2000, max_tokens=49),
        400,
        "prompt",
        "you requested 2049 tokens (2000 in the",
    ),
    # messages
    (CHAT, talk("hi"), 400, "messages[0]", "expected an object, found 'hi'"),
    (CHAT, talk({"content": "x"}), 400, "messages[0].role", "null is not one of system, developer, user"),
    (CHAT, talk({"role": "robot", "content": "x"}), 400, "messages[0].role", "'robot' is not one of"),
    (CHAT, talk({"role": "user"}), 400, "messages[0].content", "expected a string"),
    (CHAT, talk({"role": "user", "content": 3}), 400, "messages[0].content", "found 3"),
    (CHAT, talk({**USER, "contents": "x"}), 400, "messages[0].contents", "Unknown parameter: 'messages[0].contents'"),
    (CHAT, talk({"role": "system", "content": "x"}), 400, "messages", "needs a message of role user, found none"),
    (CHAT, talk({"role": "assistant", "content": "x"}), 400, "messages", "needs a message of role user"),
    (
        CHAT,
        talk(USER, {"role": "system", "content": "x"}),
        400,
        "messages[1].role",
        "a system message must be the first message",
    ),
    (
        CHAT,
        talk({**USER, "content": [{"type": "image_url"}]}),
        400,
        "messages[0].content",
        "part 0 must be of type 'text', found 'image_url'",
    ),
    (CHAT, talk({**USER, "content": ["x"]}), 400, "messages[0].content", "part 0 must be of type 'text', found 'x'"),
    (CHAT, talk({**USER, "content": "\udc00"}), 400, "messages[0].content", "U+DC00"),
    (
        CHAT,
        talk({**USER, "tool_calls": CALLS["tool_calls"]}),
        400,
        "messages[0].tool_calls",
        "is only allowed in messages of the assistant",
    ),
    (
        CHAT,
        talk(USER, {"role": "tool", "content": "x"}),
        400,
        "messages[1].role",
        "must follow the assistant's message",
    ),
    (CHAT, talk(USER, {**CALLS, "tool_calls": [3]}), 400, "messages[1].tool_calls[0]", "expected an object"),
    (
        CHAT,
        talk(USER, {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
        400,
        "messages[1].tool_calls[0]",
        "expected the text of a JSON object: not valid JSON: Expecting property name",
    ),
    (
        CHAT,
        talk(USER, {**CALLS, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": NaN}'}}]}),
        400,
        "messages[1].tool_calls[0]",
        "expected the text of a JSON object: not valid JSON: NaN is not a JSON number",
    ),
    (CHAT, talk(USER, CALLS, result("")), 400, "messages", "'' is the id of no call"),
    (CHAT, talk(USER, CALLS, result("b")), 400, "messages", "'b' is the id of"),
    (CHAT, talk(USER, TWO, result("b")), 400, "messages", "the result of the call 'a' is missing or there twice"),
    (CHAT, talk({**USER, "content": "word " * 3000}), 400, "messages", "Please reduce the length of the messages."),
    # bodies
    (CHAT, b"", 400, None, "body: not valid JSON"),
    (CHAT, b"{", 400, None, "body: not valid JSON: Expecting property name"),
    (CHAT, b"[]", 400, None, "body: expected a JSON object, found a list of 0"),
    (CHAT, b"\xff", 400, None, "body: not UTF-8 text (byte 0)"),
    (CHAT, b"[" * 16_000, 400, None, "nested too deeply"),
    (CHAT, b'{"seed": NaN}', 400, None, "NaN is not a JSON number"),
    (CHAT, b'{"seed": ' + b"9" * 5000 + b"}", 400, None, "body: a number has 5000 digits"),
    (CHAT, b'{"max_tokens": ' + b"9" * 4300 + b"}", 400, None, "body: a number has 4300 digits"),
    (CHAT, b'{"seed": 1, "seed": 2}', 400, None, "body: the key 'seed' appears twice in one object"),
    (
        CHAT,
        b'{"metadata": {"a": 1, "b": [{"x\\u001b": 1, "x\\u001b": 1}]}}',
        400,
        None,
        "the key 'x\\x1b' appears twice",
    ),
    (CHAT, b'{"x": ' * 65 + b"1" + b"}" * 65, 400, None, "nested too deeply"),
    (CHAT, b'{"x": [' + b"{}," * 20_000 + b"1]}", 400, None, "body: more than 20000 strings, lists and objects"),
    (CHAT, b'{"x": "' + b'\\"' * 30_000, 400, None, "not valid JSON: Unterminated string"),
    (CHAT, b'{"x": 0.' + b"1" * 500 + b"}", 400, None, "a number has 500 digits"),
    (CHAT, chat_body(user="\ud800"), 400, "user", "half of a surrogate pair (U+D800 at character 0)"),
    (CHAT, chat_body(**{"a\x1b[2Jb\u202e\n": 1}), 400, "a\\x1b[2Jb\\u202e\\n", "Unknown parameter: 'a\\x1b[2Jb"),
    (CHAT, chat_body(model="x\x1b]0;title\x07"), 404, "model", "The model 'x\\x1b]0;title\\x07' does not exist"),
    (CHAT, chat_body(stop=["x"] * 9_000), 400, "stop", "at most 16 strings"),
    (
        CHAT,
        chat_body(logit_bias={str(n): 1 for n in range(1025)}),
        400,
        "logit_bias",
        "at most 1024 tokens, found 1025",
    ),
    (CHAT, chat_body(cache_salt="x" * 257), 400, "cache_salt", "at most 256 characters, found 257"),
    (CHAT, chat_body(cache_salt=5), 400, "cache_salt", "expected a string, found 5"),
    (CHAT, b" " * 70_000, 413, None, "body: must have at most 65536 bytes"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "says"), WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_named(server: Running, path, body, status, param, says):
    answer = ask(server.port, path, body)
    assert answer.status == status, answer.raw
    assert says in answer.error["message"] and len(answer.raw) < 600
    assert param is None or answer.error["param"] == param
    assert answer.error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_what_does_not_fit_has_the_code_that_clients_look_for(server):
    for body in (completion(prompt=[40] * CONTEXT), completion(prompt=[40] * 2000, max_tokens=100)):
        assert ask(server.port, COMPLETIONS, body).error["code"] == "context_length_exceeded"


def test_limits_of_the_server_are_its_own():
    with running(max_prompt=20, max_new=6) as server:
        answer = ask(server.port, COMPLETIONS, completion(prompt=[40] * 21))
        assert "This server takes prompts of at most 20 tokens. However, your prompt resulted in 21" in str(
            answer.error
        )
        assert ask(server.port, COMPLETIONS, completion(prompt=[40] * 20, max_tokens=7)).error["param"] == "max_tokens"
        answer = ask(server.port, COMPLETIONS, completion(prompt=[40] * 20, temperature=0))
        assert answer.status == 200, answer.raw
        assert answer.json["usage"]["completion_tokens"] == 6  # 16 by default


def test_an_answer_of_no_stated_length_stays_within_the_trained_one():
    runner = Replier(lambda question: "word " * 700)
    runner.config = dataclasses.replace(runner.config, training_seqlen=300, base_seqlen=300, max_seqlen=CONTEXT)
    with running(runner=runner) as server:
        usage = ask(server.port, CHAT, chat_body()).json["usage"]
        assert usage["total_tokens"] == 300, "its planned end would have scaled the rotary base"
        # Beyond it anyway: a quarter of the context, as in tele chat.
        usage = ask(server.port, CHAT, chat_body("long " * 300)).json["usage"]
        assert usage["prompt_tokens"] > 300 and usage["completion_tokens"] == CONTEXT // 4
        assert ask(server.port, CHAT, chat_body(max_tokens=500)).json["usage"]["completion_tokens"] == 500


def test_nothing_harmless_is_refused(server):
    about = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "nothing": None}
    empty = dict.fromkeys(("seed", "stop", "tools", "stream_options", "temperature", "n"))
    plain = {"modalities": ["text"], "response_format": {"type": "text"}, "tool_choice": "none", "logit_bias": {}}
    assert ask(server.port, CHAT, chat_body(**about, **empty, **plain, max_tokens=1)).status == 200
    body = completion(best_of=1, suffix="", echo=False, stop=[], max_tokens=1)
    assert ask(server.port, COMPLETIONS, body).status == 200
    kind = {"Content-Type": "application/json; charset=utf-8"}
    assert ask(server.port, CHAT, chat_body(max_tokens=1), headers=kind).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2", 404), ("POST", "/v1/embeddings", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405)],
)
def test_other_places_have_errors_of_the_same_form(server, method, path, status):
    answer = ask(server.port, path, method=method)
    assert answer.status == status
    assert answer.error["message"].partition(";")[0] == f"this server has no route {method} '{path}'"


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/v1/chat/completions", "/v1/chat/completion", CHAT + "/"])
def test_a_wrong_base_url_is_mended(server, path):
    answer = ask(server.port, path, chat_body())
    assert answer.status == 404 and answer.error["message"].endswith(f"'{path}'; did you mean {CHAT}?")


def test_head_is_answered_like_get_without_a_body(server):
    for path in ("/", "/health", "/metrics", "/v1/models", f"/v1/models/{NAME}", "/v1/models/other"):
        head, get = ask(server.port, path, method="HEAD"), ask(server.port, path)
        assert (head.status, head.raw) == (get.status, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    assert ask(server.port, CHAT, method="HEAD").status == 405


def test_only_json_is_read(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = ask(server.port, CHAT, chat_body(), headers={"Content-Type": kind})
        assert answer.status == 415 and "Content-Type: must be application/json" in answer.error["message"]


def test_a_body_without_a_length_is_bounded_too(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    pieces = (b" " * 1000 for _ in range(10_000))
    try:
        connection.request("POST", CHAT, pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it hung up before everything was sent
    else:
        assert connection.getresponse().status == 413
    connection.close()
    assert ask(server.port, "/health").status == 200


def test_a_body_that_does_not_come(server, monkeypatch):
    monkeypatch.setattr("telechat_twins.core.serve.intake.BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
        kind = "Content-Type: application/json\r\nContent-Length: 9"
        line.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n\r\n{{".encode())
        assert line.recv(1000).startswith(b"HTTP/1.1 408 ")


WRONG_KEYS = ("Bearer", "Bearer ", "Basic first-key", "Bearer first-ke", "Bearer first-keyy", "Bearer \xe9")
KEYED = [("GET", "/v1/models", None), ("GET", "/metrics", None), ("POST", CHAT, chat_body(max_tokens=1))]


def test_keys():
    with running(keys=["first-key", "second-key"]) as server:
        assert ask(server.port, "/health").status == ask(server.port, "/").status == 200
        for method, path, body in KEYED:
            for header in (None, *WRONG_KEYS):
                headers = {} if header is None else {"Authorization": header}
                answer = ask(server.port, path, body, method=method, headers=headers)
                assert answer.status == 401 and answer.error["type"] == "authentication_error", header
                assert answer.headers["www-authenticate"] == "Bearer" and "first-key" not in answer.error["message"]
            for key in ("first-key", "second-key"):
                assert ask(server.port, path, body, headers={"Authorization": f"Bearer {key}"}).status == 200
        # Who has no key is not told what is wrong with the rest, and costs nothing.
        assert ask(server.port, CHAT, b"{", headers={"Authorization": "Bearer x"}).status == 401
        assert (
            'outcome="unauthorized"'
            in ask(server.port, "/metrics", headers={"Authorization": "Bearer first-key"}).raw.decode()
        )


def test_a_failing_engine_ends_its_requests_and_not_the_server(capfd):
    runner = Replier(lambda question: "fine", pause=0.01)
    with running(runner=runner) as server:
        runner.failing = [RuntimeError("out of memory: secret details")] * 20
        answer = ask(server.port, CHAT, chat_body())
        assert answer.status == 500 and answer.error["message"].startswith("internal engine error")
        assert capfd.readouterr().err.count("secret details") == 1, "it was tried again"
        runner.failing.clear()
        assert ask(server.port, CHAT, chat_body()).json["choices"][0]["message"]["content"] == "fine"
        assert 'requests_total{endpoint="chat",outcome="failed"} 1' in ask(server.port, "/metrics").raw.decode()


class Broken(Replier):
    """Logits that are no numbers after the word "bad"."""

    def answer(self, prefix, lengths):
        broken = "bad" in self.tokenizer.decode(prefix)
        return np.full(self.config.vocab_size, np.nan, np.float32) if broken else super().answer(prefix, lengths)


def test_logits_that_are_no_numbers_are_an_error_of_that_request():
    with running(runner=Broken(lambda question: "fine")) as server:
        answer = ask(server.port, CHAT, chat_body("bad"))
        assert answer.status == 500 and "are not finite" in answer.error["message"]
        streamed = ask(server.port, CHAT, chat_body("bad", stream=True))
        last = streamed.raw.decode().strip().split("\n\n")[-1]
        assert "are not finite" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert ask(server.port, CHAT, chat_body("good")).status == 200


def test_a_model_without_chat_tokens_completes_only():
    with running(tokenizer=tiny_tokenizer("none")) as server:
        answer = ask(server.port, CHAT, chat_body())
        assert (answer.status, answer.error["code"]) == (400, "no_chat_template")
        assert ask(server.port, COMPLETIONS, completion(max_tokens=2)).status == 200


def test_the_reader_of_fields_names_what_it_was_not_asked_for():
    fields = Fields({"a": 1, "b": None}, "outer")
    assert fields.integer("c", 0, 1) is None
    with pytest.raises(ApiError) as caught:
        fields.done()
    assert caught.value.param == "outer.a"
