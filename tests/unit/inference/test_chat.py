"""The conversation and its terminal loop, on a made-up model that spells out a reply."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from telechat_twins.core.commands import chat as command
from telechat_twins.core.commands.chat import piped_lines, repl
from telechat_twins.core.data import chat_layout
from telechat_twins.core.data.chat_template import DEFAULT_SYSTEM
from telechat_twins.core.data.detokenizer import StreamDecoder
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.chat import Chat
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.model.config import load_model_config
from tests.support.engine_support import Speller

SIZE = 400
CONFIG = load_model_config({"preset": "telechat2-tiny", "vocab_size": SIZE, "max_seqlen": 100})
NAMES = ("<_unk>", "<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>", "<_system>")
END, USER, BOT, SYSTEM = 2, 4, 5, 6
FIRST = 10


class CharTokenizer:
    """One token a byte, after the control tokens."""

    path, vocab_size, control, anchor = "toy", SIZE, {name: i for i, name in enumerate(NAMES)}, FIRST + ord("a")
    silent = control

    def encode(self, text, add_bos=False, allow_control=False):
        assert not allow_control
        return [FIRST + b for b in text.encode()]

    def stream(self):
        return StreamDecoder(self)

    def is_silent(self, index):
        return index < FIRST

    def byte_of(self, index):
        return index - FIRST

    def decode(self, ids, skip_special=False):
        return bytes(t - FIRST for t in ids if t >= FIRST).decode(errors="replace")


def fake_encode_chat(tokenizer, messages, tools=None, prompt=True, allow_control=False, thinking=False):
    """The template's shape: system, then turns, then the opening of the answer."""
    ids, marks = [], {"system": SYSTEM, "user": USER, "assistant": BOT}
    for message in messages:
        ids += [marks[message["role"]], *tokenizer.encode(message["content"])]
        ids += [END] if message["role"] == "assistant" else []
    return [*ids, BOT]


@pytest.fixture(autouse=True)
def template(monkeypatch):
    monkeypatch.setattr(chat_layout, "encode_chat", fake_encode_chat)


def spelled(*replies, end=END, tokenizer=None) -> Engine:
    """An engine whose model says the given replies, one a request, each followed by its end token."""
    return Engine(Speller(CONFIG, *([FIRST + b for b in text.encode()] for text in replies), end=end), tokenizer)


def chat_of(*replies, end=END, **options) -> Chat:
    return Chat(spelled(*replies, end=end, tokenizer=CharTokenizer()), **options)


def prompts_of(chat: Chat) -> list[list[int]]:
    return chat.engine.runner.prompts


def test_turns_join_the_prompt_of_the_next_question():
    chat = chat_of("one", "two", system="S")
    assert chat.ask("a") == "one"
    assert chat.ask("b") == "two"
    turns = [("system", "S"), ("user", "a"), ("assistant", "one"), ("user", "b")]
    expected = fake_encode_chat(CharTokenizer(), [{"role": r, "content": c} for r, c in turns])
    assert prompts_of(chat)[1] == expected
    assert [turn["content"] for turn in chat.history] == ["a", "one", "b", "two"]
    assert chat.finish_reason == "stop"


def test_streamed_pieces_are_the_answer_and_join_the_history():
    chat = chat_of("h\u00e9llo")
    pieces = list(chat.ask("q", stream=True))
    assert pieces == ["h", "\u00e9", "l", "l", "o"]  # the two bytes of one letter come together
    assert chat.history[-1] == {"role": "assistant", "content": "h\u00e9llo"}


@pytest.mark.parametrize("stop", [2, 1, 4, 5, 6])
def test_every_turn_token_ends_an_answer(stop):
    chat = chat_of("ok", end=stop)
    assert (chat.ask("q"), chat.finish_reason) == ("ok", "stop")


def test_an_answer_ends_at_the_limit():
    chat = chat_of("abcdef", max_new_tokens=4)
    assert (chat.ask("q"), chat.finish_reason) == ("abcd", "length")
    assert set(chat.engine.runner.lengths) == {-1, 3 + 4}  # one rotary scaling, that of the planned end


def test_oldest_turns_leave_the_prompt_when_it_is_full():
    chat = chat_of("x" * 20, "y" * 20, "z", max_new_tokens=25)  # budget 100 - 25 - 1 = 74
    for question in ("first " * 3, "second " * 3, "third"):
        chat.ask(question)
    # 18+20+21+20+5 bytes and 3 + 3 + 2 marks = 92 tokens do not fit; without the first turn 51 do.
    expected = [
        {"role": "user", "content": "second " * 3},
        {"role": "assistant", "content": "y" * 20},
        {"role": "user", "content": "third"},
    ]
    assert prompts_of(chat)[2] == fake_encode_chat(CharTokenizer(), expected)
    assert len(chat.history) == 6  # only the prompt is cut


def test_history_is_cut_at_the_budget_itself():
    # Released rule: left out when the length reaches the budget, so the longest prompt with history is budget - 1.
    for size, turns in ((58, 1), (57, 3)):
        chat = chat_of("r", "s", max_new_tokens=35)  # budget 64
        chat.ask("q")  # takes <_user> q <_bot> r <_end>: 5, and the question adds 2 marks
        chat.ask("a" * (size - 1))
        assert prompts_of(chat)[1].count(USER) == (turns + 1) // 2, size


def test_a_question_too_long_by_itself_is_refused_and_leaves_no_trace():
    chat = chat_of("r", max_new_tokens=35)
    with pytest.raises(UserError, match="question: must fit into 64 tokens with the system prompt, .*both take 65"):
        chat.ask("a" * 63)
    assert chat.history == [] and prompts_of(chat) == []
    assert chat.ask("a" * 62) == "r"


@pytest.mark.parametrize(
    ("new", "message"), [(97, "leaves 2 tokens of max_seqlen 100"), (0, "max_new_tokens: must be at least 1")]
)
def test_answer_lengths_without_room_are_refused(new, message):
    with pytest.raises(UserError, match=message):
        chat_of(max_new_tokens=new)


def test_default_answer_length_leaves_room():
    assert chat_of().max_new_tokens == 25


def test_bos_comes_first_when_asked():
    chat = chat_of("r", add_bos=True)
    chat.ask("q")
    assert prompts_of(chat)[0][:2] == [CONFIG.bos_token_id, USER]


def test_a_stopped_answer_keeps_what_was_said():
    chat = chat_of("hello", "again")
    pieces = chat.ask("q", stream=True)
    assert next(pieces) == "h"
    chat.stop()
    assert list(pieces) == []
    assert chat.finish_reason == "interrupted"
    assert chat.history[-1]["content"] == "h"
    assert chat.ask("q") == "again"


def test_a_reader_who_leaves_keeps_what_was_said():
    chat = chat_of("hello")
    pieces = chat.ask("q", stream=True)
    next(pieces), next(pieces)
    pieces.close()
    assert chat.history[-1]["content"] == "he"


def test_a_failing_model_leaves_no_turn():
    chat = chat_of("hello")
    chat.engine.runner.answer = lambda prefix, lengths: np.full(SIZE, np.nan, np.float32)
    with pytest.raises(UserError, match="not finite"):
        chat.ask("q")
    assert chat.history == []


def test_a_tokenizer_of_another_size_is_refused():
    tokenizer = CharTokenizer()
    tokenizer.vocab_size = 399
    with pytest.raises(UserError, match="399 pieces but model.vocab_size is 400"):
        Chat(spelled(tokenizer=tokenizer))


# The terminal loop


def test_a_conversation_over_a_pipe(capsys, tmp_path):
    saved = tmp_path / "talk.jsonl"
    chat = chat_of("one", "two", "three")
    lines = ["hi", "", "/system Be brief", "/system", "there", f"/save {saved}", "/reset", "you", "/exit", "no"]
    assert repl(chat, (line + "\n" for line in lines)) == 0
    told = capsys.readouterr()
    assert told.out == "one\ntwo\nthree\n"
    assert "Be brief" in told.err
    prompts = prompts_of(chat)
    assert prompts[1] == fake_encode_chat(
        CharTokenizer(), [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "there"}]
    )
    assert len(prompts) == 3 and prompts[2].count(USER) == 1
    assert [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()] == [
        {
            "system": "Be brief\n",
            "dialog": [{"role": "user", "content": "there"}, {"role": "bot", "content": "two"}],
            "multiturn": False,
        }
    ]


def test_saving_adds_to_the_file(tmp_path):
    chat = chat_of("one")
    chat.ask("a")
    for _ in range(2):
        command.save(chat, str(tmp_path / "talk.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    assert rows[0]["system"] == DEFAULT_SYSTEM + "\n"  # what the template put there


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/save", "/save: give a file"),
        ("/save nowhere.jsonl", "/save: needs a conversation, found none"),
        ("/sing", "/sing: unknown command"),
        ("a" * 200, "question: must fit into 74 tokens with the system prompt, beside an answer of 25; both take 202"),
    ],
)
def test_mistakes_are_one_line_and_the_talk_goes_on(capsys, line, message):
    assert repl(chat_of("still here"), iter([line, "hi"])) == 2  # piped in, they end in an error
    told = capsys.readouterr()
    assert told.out == "still here\n"
    assert told.err.startswith(f"error: {message}") and told.err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_a_mistake(tmp_path):
    chat = chat_of("one")
    chat.ask("a")
    with pytest.raises(UserError, match="cannot be written"):
        command.save(chat, str(tmp_path / "none" / "talk.jsonl"))


def test_help_lists_every_command(capsys):
    repl(chat_of(), iter(["/help"]))
    told = capsys.readouterr().err
    assert all(word in told for word in ("/system", "/reset", "/save", "/exit", "/help", "Ctrl-C"))


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys):
    chat = chat_of("hello", "fine")
    run, count = chat.engine.runner.run, 0

    def interrupted(step):
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return run(step)

    chat.engine.runner.run = interrupted
    before = signal.getsignal(signal.SIGINT)
    assert repl(chat, iter(["hi", "still there?"])) == 0
    told = capsys.readouterr()
    assert told.out == "hel\nfine\n"
    assert told.err == "(answer stopped)\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_is_an_interrupt(capsys):
    chat = chat_of("hello")

    def stuck(step):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # two that arrive together are one
        raise AssertionError("the second interrupt was lost")

    chat.engine.runner.run = stuck
    # Tests that were started in the background inherit "ignore".
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            repl(chat, iter(["hi"]))
    finally:
        signal.signal(signal.SIGINT, before)
    assert chat.history[-1] == {"role": "assistant", "content": ""}


def test_piped_lines_must_be_utf8(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\u4f60\u597d\n".encode() + b"ab\xff\n")))
    lines = piped_lines()
    assert next(lines) == "\u4f60\u597d\n"
    with pytest.raises(UserError, match=r"stdin:2: must be UTF-8 text, found another byte at 2"):
        next(lines)
