"""Rows as published data sets write them: read where they mean one thing, else refused with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from telechat_twins.core.data.dialogues import Dialogue, parse_dialogue
from telechat_twins.core.data.kinds.columns import Columns
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.preference import parse_preference
from telechat_twins.core.data.kinds.table import KINDS
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject
from tests.support.data_support import write_rows
from tests.unit.data.test_data_commands import tele_data

Q, A, NO = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "no")))
H, G = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
MAGPIE = {"gen_input_configs": {"t": 1}, "intent": "", "difficulty": "easy", "input_quality": "good"}
SHP = {"post_id": "x", "upvote_ratio": 0.9, "score_A": 3, "seconds_difference": 1.0}


def read(row: JsonObject, **options: Any) -> Dialogue:
    return parse_dialogue(row, "rows:1", reading=Reading(**options))


def said(dialogue: Dialogue) -> list[str]:
    return [*([dialogue.system] if dialogue.system is not None else []), *(m["content"] for m in dialogue.messages)]


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"kind": "NLI", "input": "q", "target": "a"}, ["q", "a"]),
        ({"conversation": [{"system": "s", "input": "q", "output": "a"}]}, ["s", "q", "a"]),
        ({"conversations": ["q", "a", "p", "b"], "source": "x"}, ["q", "a", "p", "b"]),
        ({"id": "1", "data": ["q", "a"]}, ["q", "a"]),
        ({"id": "1", "items": [H, G]}, ["q", "a"]),
        ({"prompt": "q", "prompt_id": "1", "messages": [Q, A]}, ["q", "a"]),
        ({"problem": "q", "solution": "a", "messages": [Q, A]}, ["q", "a"]),
        ({"instruction": "q", "response": "a", "conversations": [H, G], **MAGPIE}, ["q", "a"]),
        ({"conversations": [H, G], "label": {"ability_en": ["x"]}, "langdetect": "en"}, ["q", "a"]),
        ({"conversations": [H, G], "skip_prompt_formatting": False, "title": None, "views": 5}, ["q", "a"]),
        ({"instruction": "q", "output": "a", "answer_from": "human", "human_verified": True}, ["q", "a"]),
        ({"instruction": "Human:q\nAssistant:a\nHuman:p\nAssistant:\n", "output": "b"}, ["q", "a", "p", "b"]),
        ({"text": "<_system>s\n<_user>q\n<_bot>a<_end>\n"}, ["s", "q\n", "a"]),
        ({"text": "### Human: q### Assistant: # a\n### b"}, ["q", "# a\n### b"]),
        ({"system": "SYSTEM: s", "chat": "USER: q\n\n\nASSISTANT: a <|endoftext|>\n\n\n"}, ["s", "q", "a"]),
        ({"prefix": "s", "plain_text": "[Human]: q<eoh> [MOSS]: a<eoa>", "num_turns": 1}, ["s", "q", "a"]),
    ],
)
def test_published_dialogues_are_read(row: JsonObject, texts: list[str]) -> None:
    assert said(read(row)) == texts


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "p", "completion": "c", "label": True}, "(KTO), which no training here uses"),
        ({"messages": [Q, A], "label": "false"}, "or join a wanted and an unwanted answer"),
        ({"message_tree_id": "x", "prompt": {"text": "q", "replies": []}}, "a tree of messages (OASST)"),
        ({"message_id": "y", "parent_id": "x", "text": "a", "role": "assistant"}, "one message of a tree (OASST)"),
        ({"meta_instruction": "m", "chat": {"turn_1": {}}}, "turns with inner thoughts, commands and results (MOSS)"),
        ({"custom_id": "1", "body": {"messages": [Q]}}, "a request of a batch, which has a question and no answer"),
        ({"custom_id": "1", "response": {"body": {}}}, "an answer of a batch, which has no question"),
        ({"prompt": "p", "responses": ["a", "b"]}, "several answers of one question with their ratings"),
        ({"input_ids": [1], "labels": [1]}, "token ids of a tokenizer that the row does not name"),
        ({"prompt": "other", "messages": [Q, A]}, "key 'prompt' is not read"),
        ({"instruction": "other", "output": "a", "messages": [Q, A]}, "several kinds (messages, alpaca)"),
        ({"instruction": "q", "output": "a", "conversations": [H, G], "x": 1, "y": 2}, "--ignore-key x --ignore-key y"),
        ({"text": "### Human: q### Human: p"}, "its turns cannot be told"),
        ({"text": "<_user>q<_bot><tool_call>{}</tool_call><_end>"}, "its turns cannot be told"),
        ({"chat": "USER: q\n\nASSISTANT: <functioncall> {} <|endoftext|>"}, "its turns cannot be told"),
        ({"text": "Once upon a time"}, "a text; pack texts without --sft ('text' is no dialogue in marks of: <_user>"),
        ({"query": "q", "answers": "[]", "tools": "[]"}, "'answers' holds no call"),
        ({"question": "q", "reasoning": "r", "answer": "a"}, "'reasoning' has no place in the chat layout"),
        ({"prompt": "p", "completion": ["a", "b"]}, "'completion[0]' must be an object with role and content"),
        (
            {"data": [{"instruction": "q", "input": "", "output": "a"}]},
            "a row, not a turn of a dialogue; write the list",
        ),
    ],
)
def test_published_forms_that_must_be_chosen_are_refused(row: JsonObject, says: str) -> None:
    with pytest.raises(UserError) as error:
        read(row)
    assert str(error.value).startswith("rows:1: ") and says in str(error.value)


def test_reasoning_beside_an_answer() -> None:
    for row in (
        {"Question": "q", "Complex_CoT": "r", "Response": "a"},
        {"instruction": "q", "output": "a", "reasoning": "r"},
        {"prompt": "q", "completion": "a", "reasoning_content": "r"},
        {"input": "q", "target": "a", "cot": "r"},
    ):
        assert said(read(row, reasoning="think")) == ["q", "<think>\nr\n</think>\n\na"]
        assert said(read(row, reasoning="leave-out")) == ["q", "a"]


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        (
            {"prompt": "q", "chosen": [Q, A], "rejected": [Q, NO], "messages": [Q, A], "score_chosen": 5.0},
            ["q", "a", "no"],
        ),
        ({"question": "q", "response_j": "a", "response_k": "no", "qid": 1}, ["q", "a", "no"]),
        ({"prompt": "q", "chosen": "a", "reject": "no"}, ["q", "a", "no"]),
        ({"history": "q", "human_ref_A": "no", "human_ref_B": "a", "labels": 0, **SHP}, ["q", "a", "no"]),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "no", "labels": 1, **SHP}, ["q", "a", "no"]),
        ({"prompt": "q", "response_0": "no", "response_1": "a", "better_response_id": 1}, ["q", "a", "no"]),
        ({"conversation_a": [Q, NO], "conversation_b": [Q, A], "winner": "model_b", "turn": 1}, ["q", "a", "no"]),
    ],
)
def test_published_preferences_are_read(row: JsonObject, texts: list[str]) -> None:
    pair = parse_preference(row, "rows:1", Reading())
    chosen, rejected = said(pair.chosen), said(pair.rejected)
    assert [*chosen, rejected[-1]] == texts and chosen[:-1] == rejected[:-1]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"conversation_a": [Q, NO], "conversation_b": [Q, A], "winner": "tie"}, "which prefers neither answer"),
        ({"prompt": "q", "response_0": "a", "response_1": "b"}, "without the verdict that goes with them"),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": True}, "prefers neither"),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "labels": 1}, "without the verdict that goes with"),
        (
            {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0},
            "key 'safer_response_id' is not read",
        ),
        ({"prompt": "q", "chosen": ["a", "b"], "rejected": "c"}, "'chosen[0]' must be an object"),
    ],
)
def test_comparisons_without_a_verdict_are_refused(row: JsonObject, says: str) -> None:
    with pytest.raises(UserError, match="rows:1: ") as error:
        parse_preference(row, "rows:1", Reading())
    assert says in str(error.value)


def test_a_shared_verdict_picks_one_answer_only() -> None:
    """Planted: a verdict that is turned around gives another pair."""
    row = {"prompt": "q", "response_0": "x", "response_1": "y", "better_response_id": 0}
    first = parse_preference(row, "rows:1", Reading())
    second = parse_preference({**row, "better_response_id": 1}, "rows:1", Reading())
    assert said(first.chosen) == said(second.rejected) == ["q", "x"]


# ---- names of one's own


def test_what_a_key_stands_for_decides_and_not_its_name() -> None:
    columns = Columns((("prompt", "q"), ("response_a", "x"), ("response_b", "y"), ("winner", "best")))
    for winner, texts in (("model_a", ["q", "a", "no"]), ("b", ["q", "no", "a"])):
        pair = parse_preference({"q": "q", "x": "a", "y": "no", "best": winner}, "rows:1", Reading(columns=columns))
        assert [*said(pair.chosen), said(pair.rejected)[-1]] == texts
    columns = Columns((("functions", "api"), ("question", "functions"), ("answer", "A")))
    (tool,) = read({"api": [{"name": "f"}], "functions": "q", "A": "a"}, columns=columns).tools or ()
    assert tool == {"type": "function", "function": {"name": "f"}}


def test_columns_name_the_parts_of_rows() -> None:
    columns = Columns((("question", "Q"), ("answer", "A"), ("system", "S")))
    assert said(read({"Q": "q", "A": "a", "S": "s", "id": 1}, columns=columns)) == ["s", "q", "a"]
    with pytest.raises(UserError, match=r"rows:1: key 'system' is not read"):
        read({"Q": "q", "A": "a", "system": "s"}, columns=columns)
    talk = [{"speaker": "client", "text": "q"}, {"speaker": "agent", "text": "a"}]
    columns = Columns(
        (("messages", "talk"), ("role", "speaker"), ("content", "text")), (("client", "user"), ("agent", "assistant"))
    )
    assert [m["role"] for m in read({"talk": talk}, columns=columns).messages] == ["user", "assistant"]
    taken = Columns((("instruction", "input"), ("output", "context")))  # both names of the input have other parts
    assert said(read({"input": "q", "context": "a"}, columns=taken)) == ["q", "a"]
    swapped = Columns((("question", "answer"), ("answer", "question")))
    assert said(read({"answer": "q", "question": "a"}, columns=swapped)) == ["q", "a"]


def test_columns_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"Q": "why", "A": "because"}])
    words = [source, "--out", tmp_path / "out", "--sft", "plain", "--seq-len", 400]
    with pytest.raises(UserError, match=r"rows.jsonl:1: .* keys found: Q, A; .* --column question=KEY"):
        tele_data(*words)
    assert tele_data(*words, "--column", "question=Q", "--column", "answer=A", "--column", "system=S") == 0
    shown = capsys.readouterr().out
    assert "<_user>why<_bot>\u27e6because" in shown and "no row has the key S of --column system=S" in shown
    for given, says in (
        (["--column", "question"], "must be two names with = between them"),
        (["--column", "nothing=Q"], "--column nothing: no part of such rows; legal: "),
        (["--column", "query=Q", "--column", "answer=Q"], "'Q' is given twice"),
        (["--role", "agent=boss"], "--role boss: no role; legal: system"),
        (["--column", "a=b", "--dataset-info", "x.json"], "--dataset-info: not with --column"),
    ):
        with pytest.raises(UserError) as error:
            tele_data(*words, "--force", *given)
        assert says in str(error.value)


def info(folder: Path, **entry: object) -> Path:
    path = folder / "dataset_info.json"
    path.write_text(json.dumps({"mine": {"file_name": "rows.jsonl", **entry}, "hub": {"hf_hub_url": "a/b"}}))
    return path


def test_llama_factory_descriptions_name_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"talk": [{"who": "kunde", "was": "why"}, {"who": "bot", "was": "because"}], "sys": "short"}
    source = write_rows(tmp_path / "rows.jsonl", [row])
    words = [source, "--out", tmp_path / "out", "--sft", "plain", "--seq-len", 64, "--force"]
    tags = {"role_tag": "who", "content_tag": "was", "user_tag": "kunde", "assistant_tag": "bot"}
    columns = {"messages": "talk", "system": "sys"}
    path = info(tmp_path, formatting="sharegpt", columns=columns, tags=tags)
    assert tele_data(*words, "--dataset-info", path) == 0
    shown = capsys.readouterr().out
    assert "<_system>short\n<_user>why<_bot>\u27e6because" in shown and "no row has the key" not in shown
    for entry, says in (
        ({"ranking": True}, "'ranking' is true; pack such rows with --preference"),
        ({"columns": {"kto_tag": "k"}}, "mine: 'columns.kto_tag' has no place in rows that are read"),
        ({"num_samples": 5}, "mine: 'num_samples' is not read"),
        ({"formatting": "other"}, "mine: 'formatting' must be alpaca or sharegpt"),
        ({"ranking": "yes"}, "mine: 'ranking' must be true or false, found 'yes'"),
        ({"split": "test"}, "mine: 'split' is 'test'; a file has no splits"),
        ({"columns": {"prompt": "a", "query": "a"}}, "mine: 'columns' gives 'a' to two parts"),
        ({"file_name": "else.json"}, "no entry has a file_name of"),
    ):
        with pytest.raises(UserError) as error:
            tele_data(*words, "--dataset-info", info(tmp_path, **entry))
        assert says in str(error.value)


def test_every_mark_of_a_kind_is_a_slot_of_it() -> None:
    for kind in KINDS.values():
        assert all(slot in kind.slots for group in kind.marks for slot in group), kind.name


@pytest.mark.parametrize("key", ["arguments", "args", "parameters", "input"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_arguments_of_calls_under_every_name(key: str, wrapped: bool) -> None:
    """LangChain's, Llama 3's and Anthropic's names; left out, the call would have no arguments."""
    call: JsonObject = {"name": "f", key: {"a": 1}}
    row = {"messages": [Q, {"role": "assistant", "tool_calls": [{"function": call} if wrapped else call]}, A]}
    assert read(row).messages[1]["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]
    for more, says in (
        ({"args": {"b": 2}, "arguments": {"a": 1}}, "has both arguments and args"),
        ({key: [1]}, f".{key}' must"),
    ):
        with pytest.raises(UserError, match="rows:1: ") as error:
            read({"messages": [Q, {"role": "assistant", "tool_calls": [{"name": "f", **more}]}, A]})
        assert says in str(error.value)


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
RESULT = "<tool_response>\nr\n</tool_response>"


def test_calls_and_results_written_as_text_are_refused() -> None:
    """As Hermes' data sets have them: calls in the texts of a dialogue with tools."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    talk = [Q, {"role": "assistant", "content": f"ok\n{CALL}"}, {"role": "tool", "content": "r"}, A]
    for row in ({"messages": talk}, {"messages": talk[:2], "tools": tools}):
        with pytest.raises(
            UserError, match=r"rows:1: the answer in message 1 has a call in its text, .* \"tool\": true"
        ):
            read(row)
        assert read({**row, "tool": True}).tags
    pair = {"messages": [Q], "tools": tools, "chosen": A, "rejected": {"role": "assistant", "content": CALL}}
    with pytest.raises(UserError, match="rows:1: the answer in message 0 has a call .* write it in tool_calls$"):
        parse_preference(pair, "rows:1", Reading())
    said = {
        "messages": [Q, {"role": "assistant", "content": f"It is written {CALL}."}]
    }  # no tools: words on the format
    assert not read(said).tags
    written = {
        "messages": [Q, {"role": "assistant", "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": RESULT}, A]
    }
    for more in ({}, {"tool": True}):
        with pytest.raises(UserError, match="rows:1: the result in message 2 stands in <tool_response> tags"):
            read({**written, **more})


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"instruction": "q", "input": "", "output": "a", "task_name_in_eng": "x", "other": None}, ["q", "a"]),
        ({"inputs": "q", "targets": "a", "_task_name": "x", "_template_type": "zs"}, ["q", "a"]),
        ({"prompt": "q", "completion": "a", "turns": 3}, ["q", "a"]),
        ({"conversation": [Q, A], "turns": 3}, ["q", "a"]),
        ({"turns": [H, G]}, ["q", "a"]),
        ({"conversations": [{"role": "prompter", "value": "q"}, {"role": "assistant", "value": "a"}]}, ["q", "a"]),
        ({"conversations": [{"from": "Human", "content": "q"}, {"from": "gpt", "content": "a"}]}, ["q", "a"]),
        ({"messages": [{"role": "\u7528\u6237", "content": "q"}, {"role": "Chatbot", "content": "a"}]}, ["q", "a"]),
    ],
)
def test_what_counts_turns_or_is_spelt_otherwise_is_read(row: JsonObject, texts: list[str]) -> None:
    assert said(read(row)) == texts


OPEN = "Human: q\nAssistant: a\nHuman: p\nAssistant:"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"instruction": OPEN, "input": "x", "output": "b"}, "would stand in the place of its answer"),
        ({"instruction": "q", "output": ["a", "b"]}, "'output' is a list of 2 texts, which may be alternatives"),
        ({"prompt": "q", "answers": [{"answer": "a", "rank": 1.0}]}, "several answers of one question"),
        ({"context": "c", "question": "q", "answer": "a"}, "--column instruction=question"),
        ({"messages": [{"author": "user", "text": "q"}]}, "other names are given by --column role=KEY"),
        ({"messages": [{"role": "user", "content": "q", "value": "p"}, A]}, "key 'messages[0].value' is not read"),
        (
            {"messages": [Q, {**A, "content": "<tool_call>\n{'name': 'f'}\n</tool_call>"}], "tools": [{"name": "f"}]},
            "has a call in its text",
        ),
        (
            {"messages": [Q, {**A, "content": '<tool_call>[{"name": "f"}]</tool_call>'}], "tools": [{"name": "f"}]},
            "has a call in its text",
        ),
    ],
)
def test_what_would_be_learnt_by_mistake_is_refused(row: JsonObject, says: str) -> None:
    with pytest.raises(UserError) as error:
        read(row)
    assert str(error.value).startswith("rows:1: ") and says in str(error.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"data": ["\u95ee\uff1aq", "\u7b54\uff1aa"]}, "begin with a speaker"),
        ({"instruction": "User: q\nAssistant: a\nUser: p", "output": "b"}, "begin with a speaker"),
        ({"conversations": [G, H, G]}, "dialogues begin with an answer"),
    ],
)
def test_what_is_hardly_meant_is_counted(row: JsonObject, says: str) -> None:
    reading = Reading()
    parse_dialogue(row, "rows:1", reading=reading)
    assert [says in what for what in reading.noticed] == [True] and next(iter(reading.noticed.values())) == (
        1,
        "rows:1",
    )
    parse_dialogue({"messages": [Q, A]}, "rows:2", reading=reading)
    assert next(iter(reading.noticed.values()))[0] == 1


@pytest.mark.parametrize("rejected", ["no", [NO], [Q, NO]])
def test_rejected_messages_may_begin_with_the_prompt(rejected: object) -> None:
    """Beside messages that end with the chosen answer; with another prompt they are refused."""
    pair = parse_preference({"messages": [Q, A], "rejected_messages": rejected}, "rows:1", Reading())
    assert [said(side) for side in (pair.chosen, pair.rejected)] == [["q", "a"], ["q", "no"]]
    with pytest.raises(UserError, match="answer different prompts"):
        parse_preference({"messages": [Q, A], "rejected_messages": [{**Q, "content": "p"}, NO]}, "rows:1", Reading())
