"""Tools in a conversation and the release's chat(), with the real template on a runner whose answers are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from telechat_twins.core.commands.chat import repl
from telechat_twins.core.data.chat_template import encode_chat
from telechat_twins.core.data.dialogues import parse_dialogue
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.chat import Chat, ChatModel
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.tool_calls import ToolCall
from telechat_twins.core.model.config import load_model_config
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer, tiny_tokenizer_path
from tests.support.engine_support import CHAT_CONFIG as CONFIG
from tests.support.engine_support import Replier

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "tells the weather"}}
PARIS = {"name": "get_weather", "arguments": {"city": "Paris"}}
USER, BOT = 4, 5


def reply(question: str) -> str:
    if question == "weather?":
        return "Let me look.\n" + CALL
    if question == "twice?":
        return CALL + "\n" + CALL
    if "tool_response" in question:
        return "It rains."
    return f"You said: {question}"


def chat_of(**options: object) -> Chat:
    engine = Engine(Replier(reply), tiny_tokenizer(in_vocabulary=True))
    return Chat(engine, **{"max_new_tokens": 300, "system": "S", **options})


def prompts_of(chat: Chat) -> list[str]:
    """What the model was asked for the first token of each answer, as text."""
    asked = [prefix for prefix in chat.engine.runner.prefixes if prefix[-1] == BOT]
    return [tiny_tokenizer(in_vocabulary=True).decode(ids) for ids in asked]


def test_tool_calls_are_told_apart_from_words_and_join_the_history():
    chat = chat_of(tools=[TOOL])
    pieces = list(chat.ask("weather?", stream=True))
    assert "".join(pieces[:-1]) == "Let me look.\n" and len(pieces) > 3
    assert pieces[-1] == ToolCall("get_weather", '{"city": "Paris"}')
    assert chat.history[-1] == {"role": "assistant", "content": "Let me look.\n", "tool_calls": [PARIS]}
    assert chat.report(["rain"]) == "It rains."
    assert [turn["role"] for turn in chat.history] == ["user", "assistant", "tool", "assistant"]
    assert chat.calls == [] and "tool_calls" not in chat.history[-1]
    messages = [{"role": "system", "content": "S"}, *chat.history[:3]]
    expected = encode_chat(tiny_tokenizer(in_vocabulary=True), messages, [TOOL])
    assert [ids for ids in chat.engine.runner.prefixes if ids[-1] == BOT][1] == expected


def test_results_are_as_many_as_calls():
    chat = chat_of(tools=[TOOL])
    with pytest.raises(
        UserError, match="results: must be one for each tool call of the last answer, which has 0; found 1"
    ):
        chat.report(["rain"])
    chat.ask("weather?")
    with pytest.raises(
        UserError, match="results: must be one for each tool call of the last answer, which has 1; found 2"
    ):
        chat.report(["rain", "sun"])
    chat.reset()
    with pytest.raises(UserError, match="which has 0; found"):
        chat.report(["rain"])


def tight(chat: Chat, tokens: int) -> None:
    """A budget of so many tokens beside the system prompt and the tools."""
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "?"}]
    chat.budget = len(encode_chat(chat.tokenizer, messages, chat.tools)) + tokens


def test_without_tools_an_answer_is_all_words():
    chat = chat_of()
    assert "get_weather" in chat.ask("weather?") and chat.calls == []


def test_a_question_and_the_results_to_it_are_left_out_together():
    chat = chat_of(tools=[TOOL])
    chat.ask("weather?")
    chat.report(["rain " * 20])
    tight(chat, 90)
    chat.ask("and now? " * 10)
    (asked,) = prompts_of(chat)[2:]
    assert "weather?" not in asked and "rain" not in asked, "a result without its question"
    assert asked.count("<_user>") == 1


def test_results_never_lose_their_question():
    chat = chat_of(tools=[TOOL])
    chat.ask("hello")
    chat.ask("weather?")
    kept = [{"role": "system", "content": "S"}, *chat.history[2:], {"role": "tool", "content": "rain"}]
    chat.budget = len(encode_chat(chat.tokenizer, kept, chat.tools)) + 5
    chat.report(["rain"])
    assert "hello" not in prompts_of(chat)[-1] and "weather?" in prompts_of(chat)[-1]
    chat.ask("weather?")
    alone = [{"role": "system", "content": "S"}, {"role": "tool", "content": "rain " * 30}]
    chat.budget = len(encode_chat(chat.tokenizer, alone, chat.tools)) + 5
    with pytest.raises(UserError, match="beside an answer of 300"):
        chat.report(["rain " * 30])


def test_an_iterator_that_is_dropped_asks_nothing():
    chat = chat_of()
    chat.ask("hello", stream=True)
    assert not chat.engine.busy


# The terminal


def test_tools_at_the_terminal(tmp_path, capsys):
    tools, saved = tmp_path / "tools.json", tmp_path / "talk.jsonl"
    tools.write_text(json.dumps([TOOL]))
    chat = chat_of(tools=None)
    lines = ["/tools", f"/tools {tools}", "/tools", "twice?", "/result rain", "/result sun", f"/save {saved}"]
    assert repl(chat, iter([*lines, "/result more", "/tools off", "weather?"])) == 2
    told = capsys.readouterr()
    words = told.out.splitlines()
    assert words[:2] == ["", "It rains."] and words[2].startswith("Let me look.")
    for line in (
        "(no tools; /tools FILE offers some)",
        "(1 tools; history cleared)",
        json.dumps(TOOL),
        '(tool call 1 of 2: get_weather {"city": "Paris"})',
        '(tool call 2 of 2: get_weather {"city": "Paris"})',
        "(/result TEXT gives its result)",
        "(now give the result of call 2)",
        "error: /result: needs a tool call in the last answer, found none; ask a question first",
        "(0 tools; history cleared)",
    ):
        assert line in told.err.splitlines(), line
    assert told.err.count("(tool call") == 2
    dialogue = parse_dialogue(json.loads(saved.read_text(encoding="utf-8")), "talk")
    assert dialogue.tool and dialogue.tools == [TOOL]
    assert [message["role"] for message in dialogue.messages] == ["user", "bot", "tool", "tool", "bot"]
    assert dialogue.messages[1]["tool_calls"] == [PARIS, PARIS]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such file"),
        ("{", "cannot be read (Expecting"),
        ("{}", "expected a JSON list of tools"),
        ("[]", "expected a JSON list of tools"),
        ('[{"name": "f"}]', "tool 0 is not of the form"),
    ],
)
def test_a_file_without_tools_is_a_mistake(tmp_path, capsys, text, says):
    if text is not None:
        (tmp_path / "tools.json").write_text(text)
    repl(chat_of(), iter([f"/tools {tmp_path / 'tools.json'}", "hi"]))
    told = capsys.readouterr()
    assert told.err.startswith("error: /tools ") and says in told.err and told.out == "You said: hi\n"


# chat() as released


class Source:
    """A model without weights."""

    tokenizer_path = tiny_tokenizer_path()
    assets = ()

    def __init__(self, config=CONFIG):
        self.config = config

    def tensor(self, name):
        raise AssertionError("the runner here has no weights")


def model_of(config=CONFIG) -> ChatModel:
    def made(config, *_):
        runner = Replier(reply)
        runner.config = config
        return runner

    return ChatModel(Source(config), made, None, "chat", "fp32", "none")


def test_an_answer_and_its_history():
    model = model_of()
    answer, history = model.chat("one")
    assert answer == "You said: one"
    assert history == [{"role": "user", "content": "one"}, {"role": "bot", "content": answer}]
    before = [dict(message) for message in history]
    again, longer = model.chat("two", history)
    assert history == before, "the caller's list is his own"
    assert longer == [*before, {"role": "user", "content": "two"}, {"role": "bot", "content": again}]
    expected = encode_chat(model.tokenizer, [*before, {"role": "user", "content": "two"}])
    assert [ids for ids in model.engine.runner.prefixes if ids[-1] == BOT][1] == expected


def test_a_stream_gives_the_new_text_and_the_history_so_far():
    model = model_of()
    text, histories = "", []
    for delta, history in model.chat("one", [{"role": "system", "content": "S"}], stream=True):
        text += delta
        assert history[-1] == {"role": "bot", "content": text}
        histories.append(history)
    assert text == "You said: one" and len(histories) > 3
    assert [message["role"] for message in histories[-1]] == ["system", "user", "bot"]
    assert prompts_of(model)[0].startswith("<_system> S\n")
    # What a call returned can be handed to the next one.
    model.chat("two", histories[-1])
    assert "<_bot> You said: one<_end>" in prompts_of(model)[1]


def test_tool_calls_are_in_the_history():
    model = model_of()
    deltas = list(model.chat("weather?", tools=[TOOL], stream=True, max_new_tokens=300))
    assert "".join(delta for delta, _ in deltas) == "Let me look.\n"
    history = deltas[-1][1]
    assert history[-1] == {"role": "bot", "content": "Let me look.\n", "tool_calls": [PARIS]}
    answer, _ = model.chat("thanks", [*history, {"role": "tool", "content": "rain"}], tools=[TOOL], max_new_tokens=300)
    assert answer == "You said: thanks"


def small(longest: int) -> ChatModel:
    return model_of(load_model_config({"preset": "telechat2-tiny", "vocab_size": VOCAB_SIZE, "max_seqlen": longest}))


def test_the_oldest_turns_are_left_out_and_a_long_question_loses_its_beginning(capsys):
    system = {"role": "system", "content": "S"}
    model = small(100)
    history = [system, {"role": "user", "content": "old " * 60}, {"role": "bot", "content": "older " * 60}]
    _, told = model.chat("new " * 5, history, max_new_tokens=20)
    (asked,) = prompts_of(model)
    assert "old" not in asked and "new new" in asked and len(told) == 5
    assert capsys.readouterr().err == ""

    question = " ".join(f"word{n}" for n in range(60))
    model.chat(question, history, max_new_tokens=20)
    ids = [ids for ids in model.engine.runner.prefixes if ids[-1] == BOT][-1]
    assert len(ids) == 100 - 20 - 1, "the budget is max_seqlen - max_new_tokens - 1"
    asked = ids[ids.index(USER) + 1 : -1]
    assert asked == model.tokenizer.encode(question)[-len(asked) :]
    whole = len(model.tokenizer.encode(question))
    assert capsys.readouterr().err == f"note: question: too long, its last {len(asked)} of {whole} tokens are used\n"
    with pytest.raises(UserError, match="system prompt: must leave room for a question in"):
        model.chat("hello", [{"role": "system", "content": "S" * 200}], max_new_tokens=20)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"question": " "}, "question: must not be empty"),
        ({"question": "a", "max_new_tokens": 2045}, "leaves 2 tokens of max_seqlen 2048"),
        ({"question": "a", "history": [{"role": "robot", "content": "x"}]}, "'robot' is not one of"),
        ({"question": "a", "history": [{"role": "user", "content": 3}]}, "expected text, found int"),
        ({"question": "a", "temperatur": 1.0}, "temperatur"),
        ({"question": "a", "temperature": -1.0}, "sampling.temperature: must be at least 0.0"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_said_at_once(call, says, stream):
    with pytest.raises(UserError, match=says):
        model_of().chat(**call, stream=stream)


def test_a_failing_model_is_said_while_streaming():
    model = model_of()
    model.engine.runner.answer = lambda prefix, lengths: np.full(VOCAB_SIZE, np.nan, np.float32)
    with pytest.raises(UserError, match="not finite"):
        list(model.chat("a", stream=True))
    assert model.engine.pool.available == model.engine.pool.num_pages - 1
