"""/v1/responses through OpenAI's own client, which has it as its primary API."""

from __future__ import annotations

import json

import pytest

from tests.support.data_support import tiny_tokenizer
from tests.support.engine_support import CHAT_CONFIG, PlainRunner
from tests.support.serve_support import NAME, Running, ask, running

openai = pytest.importorskip("openai", reason="the openai client is in the dev extra")

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "name": "get_weather", "strict": True, "parameters": CITY}]
PATH = "/v1/responses"


def reply(question: str) -> str:
    if "tool_response" in question:
        return "It rains."
    return {"weather?": "Let me look.\n" + CALL, "nothing": ""}.get(question, f"You said: {question}")


@pytest.fixture(scope="module")
def server():
    with running(reply) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Running):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_an_answer(client, server):
    answer = client.responses.create(
        model=NAME,
        input="hello",
        instructions="Be brief.",
        temperature=0,
        metadata={"a": "b"},
        max_output_tokens=60,
        include=["reasoning.encrypted_content"],
    )
    assert answer.output_text == "You said: hello" and answer.status == "completed" and answer.id.startswith("resp_")
    (item,) = answer.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert (answer.instructions, answer.metadata, answer.temperature, answer.max_output_tokens) == (
        *("Be brief.", {"a": "b"}, 0.0, 60),
    )
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 10
    prompt = tiny_tokenizer(in_vocabulary=True).decode(next(p for p in server.runner.prefixes if p[-1] == 5))
    assert "Be brief." in prompt
    cut = client.responses.create(model=NAME, input="hello", max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert client.responses.create(model=NAME, input="nothing").output_text == ""


def test_a_conversation_with_calls_and_their_results(client, server):
    talk = [{"role": "user", "content": [{"type": "input_text", "text": "weather?"}]}]
    first = client.responses.create(model=NAME, input=talk, tools=TOOLS)
    words, call = first.output
    assert words.content[0].text == "Let me look.\n" and (call.type, call.name) == ("function_call", "get_weather")
    assert json.loads(call.arguments) == {"city": "Paris"}
    talk += [item.model_dump(exclude_none=True) for item in first.output]
    talk.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
    assert client.responses.create(model=NAME, input=talk, tools=TOOLS).output_text == "It rains."
    prompt = tiny_tokenizer(in_vocabulary=True).decode(next(p for p in reversed(server.runner.prefixes) if p[-1] == 5))
    assert prompt.count("Let me look.\n<tool_call>") == 1 and "<tool_response> \nrain\n</tool_response><_bot>" in prompt


def test_a_stream_adds_up_to_the_answer(client):
    with client.responses.stream(model=NAME, input="weather?", tools=TOOLS, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Let me look.\n"
    done = [event.item.type for event in events if event.type == "response.output_item.done"]
    assert done == ["message", "function_call"] == [item.type for item in final.output]
    assert final.output_text == "Let me look.\n" and final.usage.output_tokens > 0


def test_formats_and_forced_calls():
    pytest.importorskip("llguidance")
    form = {
        "type": "object",
        "properties": {"n": {"type": "boolean"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    noise = PlainRunner(CHAT_CONFIG, num_pages=600, page_size=16)
    with running(runner=noise) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        wanted = {"format": {"type": "json_schema", "name": "form", "strict": True, "schema": form}}
        assert list(json.loads(client.responses.create(model=NAME, input="x", text=wanted).output_text)) == ["n"]
        choice = {"type": "function", "name": "get_weather"}
        (call,) = client.responses.create(model=NAME, input="x", tools=TOOLS, tool_choice=choice).output
        assert call.name == "get_weather" and isinstance(json.loads(call.arguments), dict)


@pytest.mark.parametrize(
    ("options", "param", "says"),
    [
        (
            {"previous_response_id": "resp_1"},
            "previous_response_id",
            "stores no responses; send the whole conversation",
        ),
        ({"store": True}, "store", "must be false: this server stores no responses"),
        ({"background": True}, "background", "is not supported by this server"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "is not supported by this server"),
        (
            {"include": ["reasoning.encrypted_content", "message.output_text.logprobs"]},
            "include",
            "include[1]: 'message.output_text.logprobs' is not supported by this server",
        ),
        ({"include": "x"}, "include", "expected a list, found 'x'"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "is not supported by this server"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "must be 'text', 'json_object'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "must be of type 'function', found 'web_search'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "names 'g', which is not"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "found 'item_reference'"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].content", "expected the reasoning's text"),
        (
            {"input": [{"type": "reasoning", "content": "x", "encrypted_content": "y"}]},
            "input[0].encrypted_content",
            "cannot be read by this server",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content", "reads text only"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input", "needs a message of role user"),
        (
            {"instructions": "a", "input": [{"role": "developer", "content": "b"}]},
            "input[0].role",
            "without instructions",
        ),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].type", "must follow a function_call"),
        ({"input": "x " * 9000}, "input", "maximum context length"),
        ({"max_output_tokens": 4000}, "input", "maximum context length"),
        ({"messages": []}, "messages", "Unknown parameter"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(server, options, param, says):
    answer = ask(server.port, PATH, {"model": NAME, "input": "hello", **options})
    assert answer.status == 400 and says in answer.error["message"] and answer.error["param"] == param


def test_an_error_in_a_stream_is_its_last_event(client, server):
    server.runner.failing.append(RuntimeError("planted"))
    *_, last = client.responses.create(model=NAME, input="hello", stream=True)
    assert last.type == "error" and last.message.startswith("internal engine error") and last.sequence_number == 2


def test_every_parameter_of_the_client_is_known(server):
    from openai.types.responses.response_create_params import ResponseCreateParamsBase

    for name in ResponseCreateParamsBase.__annotations__:
        answer = ask(server.port, PATH, {"model": NAME, "input": "hello", name: 3.5})
        assert answer.status in (200, 400, 404), (name, answer.raw)
        assert answer.status == 200 or "Unknown parameter" not in answer.error["message"], name
