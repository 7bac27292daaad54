"""The server, asked with OpenAI's own client, on a runner whose answers are known."""

from __future__ import annotations

import json

import pytest

from tests.support.data_support import tiny_tokenizer
from tests.support.engine_support import CONTEXT
from tests.support.serve_support import NAME, Running, ask, chat_body, running

openai = pytest.importorskip("openai", reason="the openai client is in the dev extra")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def reply(question: str) -> str:
    if question == "weather?":
        return "Let me look.\n" + CALL + "\n" + CALL.replace("Paris", "\u5317\u4eac")
    if question == "mark?":
        return CALL.replace("Paris", "a </tool_call> b")
    if question == "half a call?":
        return CALL.removesuffix("</tool_call>")
    if question == "half a mark?":
        return "a < b <tool"
    if "tool_response" in question:
        return "It rains."
    return f"You said: {question}"


@pytest.fixture(scope="module")
def server():
    with running(reply) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Running):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client, question="hello", **options):
    return client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": question}], **{"temperature": 0, **options}
    )


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == (NAME, "model", CONTEXT)
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-4")


def test_a_chat_answer(client):
    answer = chat(client)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "You said: hello")
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == NAME
    tokens = len(tiny_tokenizer().encode("You said: hello")) + 1  # the end token is paid for
    assert answer.usage.completion_tokens == tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + tokens


def test_a_chat_answer_streamed_is_the_same(client):
    with_usage = list(chat(client, stream=True, stream_options={"include_usage": True}))
    *chunks, last = with_usage
    assert last.choices == [] and last.usage.completion_tokens > 3
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in with_usage}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "You said: hello"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) > 4, "it came in one piece"
    assert all(chunk.usage is None for chunk in chat(client, stream=True))


def test_the_conversation_is_what_the_template_makes_of_it(client, server):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=1)
    from telechat_twins.core.data.chat_template import encode_chat

    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two"}, *messages[2:]]
    assert server.runner.prefixes[-1] == encode_chat(tiny_tokenizer(in_vocabulary=True), plain)


def test_several_answers_and_their_usage(client):
    answer = chat(client, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"You said: hello"}
    one = chat(client)
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    assert answer.usage.completion_tokens == 3 * one.usage.completion_tokens
    texts = {0: "", 1: "", 2: ""}
    for chunk in chat(client, n=3, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
    assert set(texts.values()) == {"You said: hello"}


def test_limits_and_stop_strings_end_an_answer(client):
    short = chat(client, max_tokens=2).choices[0]
    assert short.finish_reason == "length" and "You said: hello".startswith(short.message.content)
    assert chat(client, max_completion_tokens=2).choices[0].message.content == short.message.content
    stopped = chat(client, stop=["hell", "nowhere"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("You said: ", "stop")
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chat(client, stop="lo", stream=True))
    assert streamed == "You said: hel"


def test_log_probabilities_of_a_chat(client):
    answer = chat(client, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    raw = b"".join(bytes(one.bytes) for one in content)
    assert raw.decode().strip() == "You said: hello" == "".join(one.token for one in content).strip()
    assert all(len(one.top_logprobs) == 2 and one.top_logprobs[0].token == one.token for one in content)
    assert all(-1e-3 < one.logprob <= 0 for one in content)  # 20 against 0 for 599 others: 599 e^-20 = 1.2e-6
    streamed = [
        one
        for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert streamed == content
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    by_id = chat(client, logprobs=True, top_logprobs=2, extra_body={"return_tokens_as_token_ids": True})
    told = by_id.choices[0].logprobs.content
    assert [one.bytes for one in told] == [one.bytes for one in content]
    pieces = [tiny_tokenizer().token_bytes(int(one.token.removeprefix("token_id:"))) for one in told]
    assert b"".join(pieces) == raw


def test_tool_calls_are_told_in_their_form(client):
    answer = chat(client, "weather?", tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look.\n"
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather"] * 2
    assert [json.loads(call.function.arguments)["city"] for call in choice.message.tool_calls] == [
        "Paris",
        "\u5317\u4eac",
    ]
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_tool_calls_are_told_while_streaming(client):
    words, calls, reasons = "", {}, []
    for chunk in chat(client, "weather?", tools=TOOLS, stream=True):
        delta = chunk.choices[0].delta
        words += delta.content or ""
        for call in delta.tool_calls or ():
            assert call.id and call.type == "function"
            calls[call.index] = (call.function.name, json.loads(call.function.arguments))
        reasons.append(chunk.choices[0].finish_reason)
    assert words == "Let me look.\n"
    assert calls == {0: ("get_weather", {"city": "Paris"}), 1: ("get_weather", {"city": "\u5317\u4eac"})}
    assert reasons[-1] == "tool_calls"


def test_an_answer_that_ends_early_loses_nothing(client):
    (choice,) = chat(client, "half a mark?", tools=TOOLS).choices
    assert (choice.message.content, choice.finish_reason) == ("a < b <tool", "stop")
    (choice,) = chat(client, "half a call?", tools=TOOLS).choices
    assert (choice.message.tool_calls[0].function.name, choice.finish_reason) == ("get_weather", "tool_calls")


def test_results_of_tools_go_back_to_the_model(client, server):
    first = chat(client, "weather?", tools=TOOLS).choices[0].message
    messages = [
        {"role": "user", "content": "weather?"},
        first.model_dump(),  # with its nulls, as clients do it
        *({"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in first.tool_calls),
    ]
    answer = client.chat.completions.create(model=NAME, messages=messages, tools=TOOLS, temperature=0)
    assert answer.choices[0].message.content == "It rains."
    asked = tiny_tokenizer(in_vocabulary=True).decode(next(p for p in reversed(server.runner.prefixes) if p[-1] == 5))
    assert '"arguments": {"city": "Paris"}' in asked, "the arguments went in as text in text"


def test_results_take_the_order_of_the_calls_that_they_answer(client, server):
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": number, "type": "function", "function": function} for number in "ab"]
    results = [{"role": "tool", "tool_call_id": number, "content": f"of {number}"} for number in "ba"]
    talk = [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    client.chat.completions.create(model=NAME, messages=talk + results, temperature=0)
    items = [{"type": "function_call", "call_id": number, **function} for number in "ab"]
    items += [{"type": "function_call_output", "call_id": number, "output": f"of {number}"} for number in "ba"]
    client.responses.create(model=NAME, input=[talk[0], *items], temperature=0)
    decode = tiny_tokenizer(in_vocabulary=True).decode
    asked = [text for p in server.runner.prefixes if p[-1] == 5 and "of b" in (text := decode(p))]
    assert len(asked) == 2 and all(text.index("of a") < text.index("of b") for text in asked)


def test_without_tools_nothing_is_read_as_a_call(client, server):
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        (choice,) = chat(client, "weather?", **options).choices
        assert choice.message.tool_calls is None and choice.finish_reason == "stop"
        assert '{"name": "get_weather"' in choice.message.content
    assert chat(client, "weather?", tools=TOOLS, tool_choice="auto").choices[0].finish_reason == "tool_calls"


def complete(client, prompt, **options):
    return client.completions.create(model=NAME, prompt=prompt, **{"temperature": 0, "max_tokens": 5, **options})


def test_completions_of_text_ids_and_several_prompts(client):
    tokenizer = tiny_tokenizer(in_vocabulary=True)
    one = complete(client, "The quick")
    assert one.object == "text_completion" and one.id.startswith("cmpl-")
    assert one.choices[0].finish_reason == "length" and one.usage.completion_tokens == 5
    ids = tokenizer.encode("The quick")
    assert complete(client, ids).choices[0].text == one.choices[0].text
    other = complete(client, "brown fox").choices[0].text
    for prompts in (["The quick", "brown fox"], [ids, tokenizer.encode("brown fox")]):
        both = complete(client, prompts, n=2)
        assert [choice.text for choice in both.choices] == [one.choices[0].text] * 2 + [other] * 2
        assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
        assert both.usage.prompt_tokens == len(ids) + len(tokenizer.encode("brown fox"))
    streamed = ["", ""]
    for chunk in complete(client, ["The quick", "brown fox"], stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [one.choices[0].text, other]


def test_log_probabilities_of_a_completion(client):
    answer = complete(client, "The quick", logprobs=3)
    told = answer.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 5
    assert all(len(top) == 3 for top in told.top_logprobs)
    assert all(
        max(top.values()) == logprob for top, logprob in zip(told.top_logprobs, told.token_logprobs, strict=True)
    )
    chunks = complete(client, "The quick", logprobs=3, stream=True)
    tokens = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens]
    assert tokens == told.tokens


def test_draws_follow_the_seed_and_nothing_else(client):
    def drawn(seed, **options):
        return complete(client, "The quick", temperature=1.5, seed=seed, max_tokens=12, **options).choices[0].text

    first = drawn(7)
    assert drawn(7) == first == drawn(7, extra_body={"top_k": -1, "min_p": 0.0})
    assert len({drawn(seed) for seed in range(6)}) > 4 and drawn(-7) != first
    assert len({drawn(None) for _ in range(4)}) > 2, "without a seed every request draws anew"
    assert drawn(7, top_p=0) == complete(client, "The quick", max_tokens=12).choices[0].text
    assert drawn(7, extra_body={"top_k": 1}) == drawn(8, extra_body={"top_k": 1})


def test_penalties_and_bias_reach_the_sampler(client):
    plain = complete(client, "The quick", max_tokens=30).choices[0].text
    token = tiny_tokenizer().encode("fox")[-1]
    for wanted in (token, tiny_tokenizer(in_vocabulary=True).control["<_bot>"]):
        forced = complete(client, "The quick", logit_bias={str(wanted): 100}, logprobs=0).choices[0]
        assert len(set(forced.logprobs.tokens)) == 1
    unlike = complete(client, "The quick", logit_bias={str(token): 20}, frequency_penalty=2, max_tokens=30)
    assert (
        unlike.choices[0].text
        != complete(client, "The quick", logit_bias={str(token): 20}, max_tokens=30).choices[0].text
    )
    for options in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 3.0}}):
        assert isinstance(complete(client, "The quick", max_tokens=30, **options).choices[0].text, str)
    assert plain == complete(client, "The quick", max_tokens=30).choices[0].text


def test_every_parameter_of_the_client_is_known(server):
    """Served, of no matter, or refused by name: none is unknown to the server."""
    import inspect

    from openai.resources.chat.completions import Completions as Chat
    from openai.resources.completions import Completions

    transport = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    for create, path, base in (
        (Chat.create, "/v1/chat/completions", chat_body()),
        (Completions.create, "/v1/completions", {"model": NAME, "prompt": "a"}),
    ):
        for name in set(inspect.signature(create).parameters) - transport:
            answer = ask(server.port, path, {**base, "max_tokens": 1, name: {"no": "such value"}})
            if answer.status != 200:
                assert answer.error["code"] != "unknown_parameter", (path, name)
                assert name in answer.error["message"], answer.error


@pytest.mark.parametrize("question", ["<_end>", "<_user>x<_bot>", "<tool_call>", "a <_system> b </tool_response>"])
def test_control_tokens_in_what_users_write_stay_letters(client, server, question):
    tokenizer = tiny_tokenizer(in_vocabulary=True)
    chat(client, question, max_tokens=1)
    asked = next(p for p in reversed(server.runner.prefixes) if p[-1] == 5)
    assert [t for t in asked if t in tokenizer.control.values()] == [6, 4, 5], "_system, _user, _bot and no other"
    tool = {"type": "function", "function": {"name": "f", "description": question}}
    usual = {"type": "function", "function": {"name": "f", "description": "usual"}}
    counts = []
    for one in (tool, usual):
        client.chat.completions.create(
            model=NAME,
            messages=[{"role": "system", "content": question}, {"role": "user", "content": question}],
            tools=[one],
            max_tokens=1,
        )
        asked = next(p for p in reversed(server.runner.prefixes) if p[-1] == 5)
        counts.append([t for t in asked if t in tokenizer.control.values()])
    assert counts[0] == counts[1]
    complete(client, question, max_tokens=1)
    assert server.runner.prefixes[-1] == tokenizer.encode(question)
    assert not set(server.runner.prefixes[-1]) & set(tokenizer.control.values())


def words_of(tokenizer, ids) -> list[int]:
    """Where each token's own text begins, found by decoding ever longer beginnings; bytes of one character share a
    place."""
    places, at = [], 0
    for count in range(1, len(ids) + 1):
        places.append(at)
        text = tokenizer.decode(ids[:count], skip_special=True)
        if not text.endswith("\ufffd"):
            at = len(text)
    return places


@pytest.fixture(scope="module")
def speller():
    """A server that continues the prompt "say" with the ids in ``script``."""
    from tests.support.engine_support import Replier

    class Scripted(Replier):
        script: list[int] = []

        def answer(self, prefix, lengths):
            logits = super().answer(prefix, lengths)
            place = len(prefix) - len(self.tokenizer.encode("say"))
            if 0 <= place < len(self.script):
                logits[self.script[place]] += 50.0
            return logits

    with running(runner=Scripted(reply)) as made:
        yield made


def test_text_offsets_count_decoded_text(speller):
    tokenizer = tiny_tokenizer(in_vocabulary=True)
    ids = tokenizer.encode(" the fox \u4f60\u597d\U0001f600\u00e9 z, word12 letter3ing \u2603\u2603 end")
    assert any(tokenizer.byte_of(token) is not None for token in ids)
    ids.insert(3, tokenizer.control["<_bot>"])  # no text
    speller.runner.script = ids
    before = tokenizer.encode("say")
    text = tokenizer.decode(before + ids, skip_special=True).removeprefix("say")
    places = [max(0, place - 3) for place in words_of(tokenizer, before + ids)[len(before) :]]
    base = {"model": NAME, "prompt": "say", "max_tokens": len(ids), "temperature": 0, "logprobs": 1}
    # A stop string that begins all over the text and never comes holds text back.
    for stop in (
        [],
        ["e" + "\u2604"],
        [" the fox \u4f60\u597d\U0001f600\u00e9 z, word12 letter3ing \u2603\u2603 end."],
    ):
        whole = ask(speller.port, "/v1/completions", {**base, "stop": stop}).json["choices"][0]
        assert whole["text"] == text and whole["logprobs"]["text_offset"] == places
        for token, place in zip(whole["logprobs"]["tokens"], places, strict=True):
            assert token.startswith("bytes:") or token == "<_bot>" or text[place:].startswith(token)
        streamed = ask(speller.port, "/v1/completions", {**base, "stop": stop, "stream": True}).raw.decode()
        chunks = [json.loads(line[6:])["choices"][0] for line in streamed.split("\n\n") if line.startswith("data: {")]
        assert [place for chunk in chunks if chunk["logprobs"] for place in chunk["logprobs"]["text_offset"]] == places


def test_text_offsets_pass_over_bytes_that_are_no_character(speller):
    tokenizer = tiny_tokenizer(in_vocabulary=True)
    by_value = {tokenizer.byte_of(token): token for token in range(tokenizer.vocab_size)}
    fox = tokenizer.encode("fox")
    lead, second = by_value[0xE4], by_value[0xBD]
    speller.runner.script = ids = [lead, second, *fox, second, *fox, lead, lead, second, by_value[0xA0], *fox]
    text = tokenizer.decode([*tokenizer.encode("say"), *ids]).removeprefix("say")
    body = {"model": NAME, "prompt": "say", "max_tokens": len(ids), "temperature": 0, "logprobs": 0}
    choice = ask(speller.port, "/v1/completions", body).json["choices"][0]
    assert choice["text"] == text == "\ufffd\ufffd fox\ufffd fox\ufffd\u4f60 fox"
    found = choice["logprobs"]
    for token, place in zip(found["tokens"], found["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[place : place + len(token)] == token
    assert found["text_offset"] == sorted(found["text_offset"])
    assert found["text_offset"][-len(fox) - 3 : -len(fox)] == [text.index("\u4f60")] * 3


def test_the_drawn_token_is_among_the_likeliest(client):
    token = str(tiny_tokenizer().encode("fox")[-1])
    for count in (0, 1, 3):
        told = complete(client, "The quick", logprobs=count, logit_bias={token: 100}).choices[0].logprobs
        for drawn, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
            assert top[drawn] == logprob and len(top) in (count, count + 1)
        assert max(map(len, told.top_logprobs)) == count + 1, "the model itself would not have drawn it"


def test_a_call_whose_arguments_hold_the_closing_mark(server):
    body = chat_body("mark?", tools=TOOLS, temperature=0)
    message = ask(server.port, "/v1/chat/completions", body).json["choices"][0]["message"]
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "a </tool_call> b"}
    lines = ask(server.port, "/v1/chat/completions", {**body, "stream": True}).raw.decode().split("\n\n")
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    (streamed,) = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert streamed["function"] == call["function"]
    assert "".join(delta.get("content") or "" for delta in deltas) == ""


def test_echo_repeats_the_prompt_with_its_log_probabilities(client):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("The quick brown fox")
    plain = complete(client, "The quick brown fox", logprobs=1)
    answer = complete(client, "The quick brown fox", logprobs=1, echo=True, n=2)
    for choice in answer.choices:
        assert choice.text == "The quick brown fox" + plain.choices[0].text
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == len(ids) + 5
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        assert told.token_logprobs[len(ids) :] == plain.choices[0].logprobs.token_logprobs
        shift = len("The quick brown fox")
        assert told.text_offset[len(ids) :] == [shift + at for at in plain.choices[0].logprobs.text_offset]
    # The log-probability of a prompt's token is that with which the prompt before it is continued.
    whole = answer.choices[0].logprobs
    again = client.completions.create(
        model=NAME, prompt=ids[:-1], max_tokens=1, temperature=0, logprobs=20, logit_bias={str(ids[-1]): 100}
    )
    assert whole.token_logprobs[len(ids) - 1] == pytest.approx(again.choices[0].logprobs.token_logprobs[0], abs=1e-12)
    # A prompt alone, as text and as ids; streamed, the prompt comes first.
    alone = client.completions.create(model=NAME, prompt=["The quick", ids], max_tokens=0, echo=True)
    assert [choice.text for choice in alone.choices] == ["The quick", tokenizer.decode(ids)]
    assert alone.usage.completion_tokens == 0 and alone.choices[0].finish_reason == "length"
    chunks = list(complete(client, "The quick brown fox", logprobs=1, echo=True, stream=True))
    assert chunks[0].choices[0].text == "The quick brown fox"
    tokens = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens]
    assert tokens == whole.tokens


def test_tokens_of_equal_text_are_told_apart_by_their_ids(client):
    """The tokenizer has every byte beside its characters' own pieces: one text, two tokens."""
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    same = [token for token, text in enumerate(texts) if text == b"a"]
    assert len(same) == 2
    prompt = [*tokenizer.encode("The"), *same]
    options = dict(model=NAME, prompt=prompt, max_tokens=0, logprobs=20, echo=True)
    told = client.completions.create(**options).choices[0].logprobs
    by_id = client.completions.create(**options, extra_body={"return_tokens_as_token_ids": True}).choices[0].logprobs
    assert told.tokens[-2:] == ["a", "a"] and by_id.tokens == [f"token_id:{token}" for token in prompt]
    assert by_id.token_logprobs == told.token_logprobs
    for found, text_tops, id_tops in zip(by_id.tokens[1:], told.top_logprobs[1:], by_id.top_logprobs[1:], strict=True):
        assert len(text_tops) <= len(id_tops) in (20, 21) and found in id_tops
