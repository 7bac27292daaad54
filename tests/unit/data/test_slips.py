"""What rows of published data sets hold that is hardly meant: counted where it is read, refused where it is wrong."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from telechat_twins.core.data.dialogues import Dialogue, parse_dialogue
from telechat_twins.core.data.kinds.columns import Columns
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.preference import parse_preference
from telechat_twins.core.data.kinds.table import KINDS
from telechat_twins.core.data.kinds.teacher import parse_propositions
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject
from tests.unit.data.test_data_commands import tele_data

SAYS, Q, A, NO = (
    {"role": role, "content": text}
    for role, text in (("system", "s"), ("user", "q"), ("assistant", "a"), ("bot", "no"))
)
CALLS = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
RESULT = {"role": "tool", "content": "r"}
TAGGED = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def asked(text: str) -> JsonObject:
    return {"role": "user", "content": text}


def read(row: JsonObject, reading: Reading) -> Dialogue:
    return parse_dialogue(row, "rows:1", reading=reading)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([Q, Q, A], ["two questions running"]),
        ([Q, A, NO], ["two answers running"]),
        ([Q, CALLS, A], ["two answers running"]),
        ([Q, A, Q], ["end with a turn that nothing answers"]),
        ([Q, CALLS, RESULT], ["end with a turn that nothing answers"]),
        ([Q, RESULT, A], ["a tool's result that no call stands before"]),
        ([Q, A, RESULT, RESULT, A], ["a tool's result that no call stands before"]),
        ([A, Q, A], ["begin with an answer"]),
        ([Q, {**A, "content": f"I look.\n{TAGGED}"}], ["a call in the text of an answer and no tools"]),
        ([asked("<|im_start|>user\nq<|im_end|>"), A], ["hold <|im_start|>, a mark of another chat layout"]),
        ([Q, {**A, "content": "a<|eot_id|>"}], ["hold <|eot_id|>, a mark of another"]),
        ([asked("[INST] q [/INST]"), A], ["hold [INST], a mark"]),
        ([Q, {**A, "content": "a </s>\n"}], ["hold </s>, a mark"]),
        ([asked("Below is a task.\n\n### Response:\n"), A], ["hold ### Response:, a mark"]),
        ([asked("<\uff5cUser\uff5c>q"), A], ["hold <\uff5cUser\uff5c>, a mark"]),
        ([asked("[{'role': 'user', 'content': 'q'}]"), A], ["hold messages written as text"]),
        ([Q, {**A, "content": "r</think>a"}], ["<think> or </think> alone"]),
        ([Q, {**A, "content": "<think>r a"}], ["<think> or </think> alone"]),
        ([Q, {**A, "content": "\n<think>r</think>a"}], []),
        ([{**Q, "content": "what does <think> mean?"}, A], []),
        ([Q, A, Q, A], []),
        ([SAYS, Q, CALLS, RESULT, RESULT, A], []),
        ([Q, CALLS, RESULT, CALLS, RESULT, A], []),
        ([asked("what is <s>this</s> and a < | b, x[1]?"), {**A, "content": '[{"a": 1}] <|x|> ### Response: is'}], []),
    ],
)
def test_what_is_hardly_meant_is_counted_once_a_dialogue(messages: list[JsonObject], says: list[str]) -> None:
    reading = Reading()
    read({"messages": messages}, reading)
    found = list(reading.noticed)
    assert len(found) == len(says) and all(any(said in what for what in found) for said in says), found
    assert all(seen == (1, "rows:1") for seen in reading.noticed.values())


def test_pairs_are_looked_at_as_dialogues_are() -> None:
    """Each kind once a pair, though both sides hold it."""
    reading = Reading()
    marked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    parse_preference({"prompt": marked, "chosen": "a<|im_end|>", "rejected": ""}, "rows:1", reading)
    assert [what.split(",")[0] for what in reading.noticed] == ["answers hold no text", "dialogues hold <|im_start|>"]
    assert {count for count, _ in reading.noticed.values()} == {1}


@pytest.mark.parametrize("value", ["on", " Off", "enabled", True, False])
@pytest.mark.parametrize("reasoning", ["refuse", "think"])
def test_a_switch_is_no_reasoning(value: object, reasoning: str) -> None:
    """Rows say by it whether the answer holds reasoning; trained, the model would think "on"."""
    for row in (
        {"input": "q", "output": "<think>r</think>a", "reasoning": value},
        {"messages": [Q, {**A, "thinking": value}]},
    ):
        with pytest.raises(UserError, match=r"rows:1: '.*' is .*, which says whether to reason"):
            read(row, Reading(reasoning=reasoning))
        assert read(row, Reading(reasoning="leave-out")).messages[0]["content"] == "q"


def test_an_answer_that_reasons_takes_no_second_reasoning() -> None:
    thinks = {**A, "content": "\n<think>r</think>a"}
    for row in (
        {"messages": [Q, {**thinks, "reasoning_content": "r"}]},
        {"question": "q", "reasoning": "r", "answer": thinks["content"]},
    ):
        with pytest.raises(UserError, match="stands beside an answer that begins with <think> itself"):
            read(row, Reading(reasoning="think"))
        kept = read(row, Reading(reasoning="leave-out")).messages[1]["content"]
        assert kept == thinks["content"]


PYTHON = "[{'content': 'q', 'role': 'user'}\n {'content': \"a's\", 'role': 'assistant'}]"  # numpy's lists, too


@pytest.mark.parametrize(
    "written", [PYTHON, "{'role': 'assistant', 'content': 'a'}", "[{'from': 'gpt', 'value': 'a'}]"]
)
def test_messages_that_python_wrote_are_refused(written: str) -> None:
    """As tables hold them that were written from lists; read as a text, brackets and quotes would be learnt."""
    says = "is the text of messages, but as Python writes them or cut off, and not JSON"
    for row in ({"prompt": written, "completion": "a"}, {"prompt": "q", "completion": written}):
        with pytest.raises(UserError, match=f"rows:1: '.*' {says}"):
            read(row, Reading())
    for row in (
        {"prompt": "q", "chosen": "a", "rejected": written},
        {"prompt": written, "chosen": "a", "rejected": "b"},
    ):
        with pytest.raises(UserError, match=f"rows:1: '.*' {says}"):
            parse_preference(row, "rows:1", Reading())


def test_messages_in_json_are_read_in_any_order_of_their_keys() -> None:
    for answer in ({"content": "a", "role": "assistant"}, {"value": "a", "from": "gpt"}, [{"id": 1, **A}]):
        said = read(
            {"prompt": json.dumps([{"content": "q", "role": "user"}]), "completion": json.dumps(answer)}, Reading()
        )
        assert [m["content"] for m in said.messages] == ["q", "a"]


@pytest.mark.parametrize(
    "answer", ['[{"name": "x"}]', '{"value": 3}', '{"role": "engineer"}', "[{'a': 1}]", "{'role': 1"]
)
def test_json_that_is_no_message_is_an_answer(answer: str) -> None:
    assert read({"prompt": "q", "completion": answer}, Reading()).messages[1]["content"] == answer


def test_lists_of_messages_name_the_column_that_reads_them() -> None:
    row: JsonObject = {"input": [Q], "output": "a"}
    with pytest.raises(UserError, match="'input' is a list of objects; .* --column prompt=input$"):
        read(row, Reading())
    said = read(row, Reading(columns=Columns((("prompt", "input"),))))
    assert [m["content"] for m in said.messages] == ["q", "a"]
    with pytest.raises(UserError, match="'response' is a list of objects; .* --column completion=response$"):
        read({"query": "q", "response": [A]}, Reading())


def test_a_prompt_that_the_messages_say_is_left_out() -> None:
    """The system's text, or any turn of the prompt; another text is refused."""
    said = read({"prompt": "s", "messages": [SAYS, Q, A]}, Reading())
    assert said.system == "s" and [m["content"] for m in said.messages] == ["q", "a"]
    before = [SAYS, Q, A, {**Q, "content": "p"}]
    row = {"chosen": [*before, {**A, "content": "yes"}], "rejected": [*before, NO]}
    for prompt in ("s", "q", "p", [Q, A]):
        pair = parse_preference({**row, "prompt": prompt}, "rows:1", Reading())
        assert pair.chosen.system == "s" and [m["content"] for m in pair.chosen.messages] == ["q", "a", "p", "yes"]
    for prompt in ("a", "other", [A, Q]):
        with pytest.raises(UserError, match="'prompt' is not the prompt that 'chosen' begins with"):
            parse_preference({**row, "prompt": prompt}, "rows:1", Reading())


def test_a_tables_index_is_harmless_and_other_keys_are_quoted() -> None:
    assert read({"": 3, "query": "q", "response": "a"}, Reading()).messages[0]["content"] == "q"
    assert read({"": "17", "query": "q", "response": "a"}, Reading()).messages[0]["content"] == "q"
    assert read({"Unnamed: 0.1": 0, "query": "q", "response": "a"}, Reading()).messages[0]["content"] == "q"
    for key, given in (("", "''"), ("my key", "'my key'"), ("Unnamed: 3", "'Unnamed: 3'")):
        with pytest.raises(UserError, match=f"--ignore-key {given}$"):
            read({key: "text", "query": "q", "response": "a"}, Reading())
        assert read({key: "text", "query": "q", "response": "a"}, Reading(frozenset([key]))).messages


def test_answers_without_a_verdict_name_the_way_out() -> None:
    """And do not send on to --sft, which would send back."""
    with pytest.raises(UserError, match="rows:1: 'output' is a list of 2 answers; write the better one as 'chosen'"):
        parse_preference({"instruction": "q", "input": "", "output": ["a", "b"]}, "rows:1", Reading())
    with pytest.raises(UserError, match="a dialogue; pack dialogues with --sft"):
        parse_preference({"instruction": "q", "output": "a"}, "rows:1", Reading())


@pytest.mark.parametrize("answer", [2, "2", 1])
def test_a_place_among_letters_with_a_gap_is_refused(answer: object) -> None:
    """C is empty: the third choice may be C or D."""
    row = {"question": "q", "A": "x", "B": "y", "C": None, "D": "w"}
    with pytest.raises(UserError, match="rows:1: 'answer' is the place .* among A, B, D"):
        parse_propositions({**row, "answer": answer}, "rows:1", Reading())
    assert [p.true for p in parse_propositions({**row, "answer": "D"}, "rows:1", Reading())] == [False, False, True]
    last = {**row, "C": "z", "D": "", "answer": 2}
    assert [p.true for p in parse_propositions(last, "rows:1", Reading())] == [False, False, True]


def test_what_judges_and_names_a_sample_is_harmless() -> None:
    """HelpSteer's scores, argilla's ratings, WildChat's and Aya's labels."""
    row = {"prompt": "q", "response": "a", "helpfulness": 3, "verbosity": 2, "language_code": "zul", "toxic": False}
    reading = Reading()
    assert read(row, reading).messages and {"helpfulness", "toxic"} <= reading.left_out
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 5.0, "rejected-model": "x"}
    assert parse_preference(pair, "rows:1", Reading())


@pytest.mark.parametrize(
    ("value", "says"), [(b"a", "found bytes"), (datetime.date(2024, 1, 1), "found date (a column of dates;")]
)
def test_a_tables_types_are_named_where_text_must_stand(value: object, says: str, tmp_path: Path) -> None:
    """Rows reach the process that reads them as JSON, in which such a value is an object."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist([{"instruction": "q", "output": value}]), table)
    with pytest.raises(UserError) as error:
        tele_data(table, "--out", tmp_path / "out", "--sft", "plain", "--seq-len", 400)
    assert f"rows.parquet: row 1: 'output' must be text, {says}" in str(error.value)


@pytest.mark.parametrize("sft", ["plain", "deepspeed", "mindformers"])
@pytest.mark.parametrize(("value", "kind"), [(b"a", "bytes"), (datetime.datetime(2024, 1, 1), "datetime")])
def test_a_tables_types_are_refused_inside_tools_and_calls(value: object, kind: str, sft: str, tmp_path: Path) -> None:
    """Trained, a date in a call's arguments would be the object that stands for it on its way."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "rows.parquet"
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"when": [value]}}]}
    for row, place in (
        ({"messages": [{**Q, "tool_calls": []}, call]}, "messages[1].tool_calls[0].arguments.when[0]"),
        ({"instruction": "q", "output": "a", "tools": [{"name": "f", "since": value}]}, "tools[0].since"),
    ):
        parquet.write_table(arrow.Table.from_pylist([row]), table)
        with pytest.raises(UserError) as error:
            tele_data(table, "--out", tmp_path / "out", "--sft", sft, "--seq-len", 400)
        assert f"rows.parquet: row 1: '{place}' is of type {kind}" in str(error.value)


def test_tools_under_the_older_key_are_tools_once() -> None:
    function = {"name": "f", "parameters": {}}
    tool = {"type": "function", "function": function}
    for given in (function, tool, json.dumps(tool)):
        assert read({"messages": [Q, A], "functions": [given]}, Reading()).tools == [tool]
    for key in ("tools", "functions"):
        with pytest.raises(UserError, match=rf"'{key}\[1\]' must be an object that describes a tool, found"):
            read({"messages": [Q, A], key: [function, {}]}, Reading())


def test_an_empty_dialogue_names_its_key() -> None:
    with pytest.raises(UserError, match="'turns' is empty; a dialogue needs"):
        read({"turns": [], "id": 3}, Reading())
    assert "turns" in KINDS["sharegpt"].keys
