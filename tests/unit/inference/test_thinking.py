"""Models that reason before they answer: prompt, split of an answer, the server's reasoning_content, training data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from telechat_twins.core import cli
from telechat_twins.core.data.chat_layout import CHAT_TEMPLATE, BuiltInLayout, ChatLayout, TemplateLayout
from telechat_twins.core.data.chat_template import chat_parts, encode_parts, render
from telechat_twins.core.data.control import TELECHAT2_NAMES
from telechat_twins.core.data.dialogues import parse_dialogue
from telechat_twins.core.data.kinds.messages import Reading, read_messages
from telechat_twins.core.data.packed import PackedDataset
from telechat_twins.core.data.sft import dialogue_samples
from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.requests import Event, shown_marks
from telechat_twins.core.inference.text_stream import Thought, ThoughtStream
from telechat_twins.core.serve.chat import _Answer
from telechat_twins.core.serve.chat import read_messages as served_messages
from telechat_twins.core.serve.fields import Fields
from tests.support.data_support import tiny_tokenizer, tiny_tokenizer_path, write_rows


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


# Both open <think> in the prompt and leave earlier reasoning out; one is given it apart, one in the text.
_SAY = "{{- '<_bot>' + (message['content'] or '') -}}"
_OPEN = "{%- if add_generation_prompt -%}{{- '<_bot>' -}}"
READS = CHAT_TEMPLATE.replace(
    _SAY,
    "{{- '<_bot>' -}}{%- if loop.last and message.reasoning_content -%}{{- '<think>\\n' + message.reasoning_content + "
    "'\\n</think>\\n\\n' -}}{%- endif -%}{{- message['content'] or '' -}}",
).replace(_OPEN, "{%- if add_generation_prompt -%}{{- '<_bot><think>\\n' -}}")
STRIPS = CHAT_TEMPLATE.replace(
    _SAY,
    "{%- set said = message['content'] or '' -%}{{- '<_bot>' + (said if loop.last else "
    "said.split('</think>')[-1].lstrip()) -}}",
).replace(_OPEN, "{%- if add_generation_prompt -%}{{- '<_bot><think>\\n' -}}")


def layouts() -> dict[str, tuple[Tokenizer, ChatLayout]]:
    tiny = tiny_tokenizer()
    marked: Any = Letters(think=True)
    return {
        "builtin": (tiny, BuiltInLayout(tiny, thinking=True)),
        "builtin, marks that are pieces": (marked, BuiltInLayout(marked, thinking=True)),
        "reads": (tiny, TemplateLayout(tiny, READS, "reads")),
        "strips": (tiny, TemplateLayout(tiny, STRIPS, "strips")),
    }


def reasoned_rows(draw: random.Random, count: int) -> list[list[dict[str, Any]]]:
    """OpenAI messages whose answers all have reasoning: calls in parallel, results out of order, weights."""
    words = ("fox", "a b", "\u72d0\u72f8", "<_end>", "</tool_call>", '"q"', "\\n", "  x ")

    def say() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 4)))

    def answer(**more: Any) -> dict[str, Any]:
        weight = {"weight": 0} if draw.random() < 0.2 else {}
        return {"role": "assistant", "reasoning_content": say().strip("\n"), **more, **weight}

    rows = []
    for _ in range(count):
        messages: list[dict[str, Any]] = [{"role": "system", "content": say()}][: draw.randint(0, 1)]
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": say()})
            for _ in range(draw.choice((0, 0, 1, 2))):
                inner = {say(): [1, None, {say(): {"n": 1.5}}]}
                made = [
                    {"id": f"{len(messages)} {n}", "type": "function", "function": {"name": f"f{n}", "arguments": text}}
                    for n, text in enumerate(json.dumps(inner) for _ in range(draw.randint(1, 3)))
                ]
                messages.append(answer(content=draw.choice((None, "", say())), tool_calls=made))
                results = [{"role": "tool", "tool_call_id": call["id"], "content": say()} for call in made]
                messages += draw.sample(results, len(results))
            messages.append(answer(content=say()))
        rows.append(messages)
    return rows


@pytest.mark.parametrize("name", list(layouts()))
def test_reasoning_is_trained_behind_the_prompts_of_chats(name: str) -> None:
    """Each answer to learn stands behind the prompt that the server makes of the messages before it."""
    tokenizer, layout = layouts()[name]
    apart = 0
    for messages in reasoned_rows(random.Random(name), 30):
        row = parse_dialogue({"messages": messages}, "rows:1", reading=Reading(reasoning="think"))
        samples = dialogue_samples(tokenizer, row, layout)
        sent = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        shown = served_messages(Fields({"messages": sent}), list(sent), layout)
        learnt = [n for n, one in enumerate(messages) if one["role"] == "assistant" and one.get("weight") != 0]
        apart += len(samples) > 1
        assert len(samples) == max(1, len(learnt))
        for n, (ids, mask) in zip(learnt, samples, strict=False):
            prompt = layout.encode(shown[:n])
            assert ids[: len(prompt)] == prompt and not any(mask[: len(prompt)]), messages
            learnt_ids = [token for token, one in zip(ids, mask, strict=True) if one]
            assert mask[len(prompt) :][: len(learnt_ids)] == [1] * len(learnt_ids)
            said = messages[n]
            want = f"{said['reasoning_content']}\n</think>\n\n{said['content'] or ''}"
            calls = [f'{{"name": "{c["function"]["name"]}", "arguments": ' for c in said.get("tool_calls", ())]
            if not isinstance(tokenizer, Letters):
                text = tokenizer.decode(learnt_ids).replace(" ", "")
                assert text.startswith(want.replace(" ", "")) and text.endswith("<_end>")
                assert [text.count(call.replace(" ", "")) for call in calls] == [1] * len(calls)
    assert apart > 8


def test_an_answer_without_reasoning_is_refused_where_chats_begin_with_it() -> None:
    row = {"messages": [TALK[0], {"role": "assistant", "content": "2"}]}
    for tokenizer, layout in layouts().values():
        with pytest.raises(UserError, match="rows:1: .*reasoning.*; give it a reasoning_content, or weight 0"):
            dialogue_samples(tokenizer, parse_dialogue(row, "rows:1"), layout)
        context = parse_dialogue({"messages": [TALK[0], {**row["messages"][1], "weight": 0}]}, "rows:1")
        (sample,) = dialogue_samples(tokenizer, context, layout)
        assert not any(sample[1])


def test_rows_with_reasoning_are_packed_an_answer_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"role": "assistant", "content": "2", "reasoning_content": "add"}
    source = write_rows(tmp_path / "a.jsonl", [{"messages": [TALK[0], answer, TALK[0], answer]}])
    options = ["--tokenizer", str(tiny_tokenizer_path()), "--chat-template", "thinking", "--reasoning", "think"]
    packed = ["data", str(source), *options, "--seq-len", "512", "--out", str(tmp_path / "out")]
    assert cli.main([*packed, "--sft", "plain"]) == 0
    assert "apart: each answer of 1 rows is a document behind its own prompt" in capsys.readouterr().out
    data = PackedDataset(tmp_path / "out")
    assert data.meta["documents"] == 2 and data.meta["rows"] == data.meta["rows_apart"] == 1
    assert cli.main([*packed, "--sft", "deepspeed", "--force"]) == 2
    assert "chats with this model follow TeleChat2's layout with reasoning first" in capsys.readouterr().err
