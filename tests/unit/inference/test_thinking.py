"""Models that reason before they answer: prompt, split of an answer, the server's reasoning_content, training data."""

from __future__ import annotations

from typing import Any

import pytest

from telechat_twins.core.data.chat_layout import BuiltInLayout
from telechat_twins.core.data.chat_template import chat_parts, encode_parts, render
from telechat_twins.core.data.control import TELECHAT2_NAMES
from telechat_twins.core.data.kinds.messages import Reading, read_messages
from telechat_twins.core.inference.requests import Event, shown_marks
from telechat_twins.core.inference.text_stream import Thought, ThoughtStream
from telechat_twins.core.serve.chat import _Answer


class Letters:
    """A tokenizer of bytes and control tokens, with or without the marks of reasoning."""

    IDS = {name: 1000 + i for i, name in enumerate((*TELECHAT2_NAMES, "<think>", "</think>"))}

    def __init__(self, think: bool) -> None:
        self.control = {name: self.IDS[name] for name in TELECHAT2_NAMES}
        self.silent = self.IDS if think else self.control

    def control_id(self, name: str) -> int:
        return self.control[name]

    def encode(self, text: str, add_bos: bool = False, allow_control: object = False) -> list[int]:
        return list(text.encode())


TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"},
    {"role": "user", "content": "<think> of 3"},
]


def test_the_prompt_opens_the_thought_and_drops_earlier_ones() -> None:
    system = "<_system>" + render(TALK).split("<_user>")[0].removeprefix("<_system>")
    assert render(TALK, thinking=True) == f"{system}<_user>1+1?<_bot>2<_end>\n<_user><think> of 3<_bot><think>\n"
    assert "add" in render(TALK) and render(TALK).endswith("<_bot>")
    layout = BuiltInLayout(Letters(think=True), thinking=True)  # type: ignore[arg-type]
    ids = layout.encode(TALK)
    # The mark at the end is the control token; what the user wrote is letters.
    assert ids[-3:] == [Letters.IDS["<_bot>"], Letters.IDS["<think>"], ord("\n")]
    assert ids.count(Letters.IDS["<think>"]) == 1 and Letters.IDS["</think>"] not in ids
    plain = BuiltInLayout(Letters(think=False), thinking=True).encode(TALK)
    assert bytes(plain[-8:]).decode() == "<think>\n"


ANSWERS = {
    "\nadd 1 and 1\n</think>\n\n2 <b>": ("add 1 and 1", "2 <b>"),
    "a </thin k> b</think>c</think>d": ("a </thin k> b", "c</think>d"),
    "no end </thi": ("no end </thi", ""),
    "</think>\n\nat once": ("", "at once"),
    "": ("", ""),
}


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_split_the_same_however_it_arrives(text: str) -> None:
    for size in (1, 2, 3, 7, 100):
        stream = ThoughtStream()
        parts = [part for n in range(0, len(text), size) for part in stream.push(text[n : n + size])] + stream.flush()
        thought = "".join(part for part in parts if isinstance(part, Thought))
        said = "".join(part for part in parts if not isinstance(part, Thought))
        assert (thought, said) == ANSWERS[text], size


def test_the_server_sends_reasoning_apart() -> None:
    answer = _Answer(tools=True, thinking=True)
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    deltas: list[Any] = []
    for text, reason in (("\nlet me", None), (" see\n</think>\n\nSo", None), (f" it is{call}", None), ("", "stop")):
        deltas += answer.take(Event(0, 0, text=text, finish_reason=reason))
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "let me see"
    assert "".join(delta.get("content", "") for delta in deltas) == "So it is"
    assert answer.calls[0]["function"]["name"] == "f" and answer.finish_reason == "tool_calls"


def test_marks_that_are_pieces_are_shown() -> None:
    marks = shown_marks(Letters(think=True), "answer")
    assert marks == {Letters.IDS["<think>"]: "<think>", Letters.IDS["</think>"]: "</think>"}
    assert shown_marks(Letters(think=False), "answer") is None and shown_marks(Letters(think=True), "none") is None


def test_reasoning_of_training_data_is_learnt_with_its_marks() -> None:
    row = {"role": "assistant", "content": "2", "reasoning_content": "add"}
    rows = [{"role": "user", "content": "1+1?"}, row]
    parts = chat_parts(read_messages(rows, "messages", "f:1", Reading(reasoning="think")), None, False)
    written = "".join(part.text for part in parts if part.answer)
    assert written == "<think>\nadd\n</think>\n\n2<_end>"
    ids, mask = encode_parts(Letters(think=True), parts)
    marks = [i for i, token in enumerate(ids) if token in (Letters.IDS["<think>"], Letters.IDS["</think>"])]
    assert len(marks) == 2 and all(mask[i] for i in marks)
    letters = bytes(i for i in encode_parts(Letters(think=False), parts)[0] if i < 256)
    assert b"<think>\nadd\n</think>\n\n2" in letters
