"""Which files are read and how, and that nothing in a dialogue row is lost."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path

import pytest

from telechat_twins.core.commands import data as data_command
from telechat_twins.core.commands import tokenize as tokenize_command
from telechat_twins.core.data.chat_template import encode_chat, render
from telechat_twins.core.data.dialogues import Dialogue, parse_dialogue
from telechat_twins.core.data.forms import json_items as json_items_module
from telechat_twins.core.data.forms import wrapped
from telechat_twins.core.data.forms.json_items import json_items
from telechat_twins.core.data.packed import PackedDataset
from telechat_twins.core.data.packing.dialogue_file import DialogueFile
from telechat_twins.core.data.rows import find_inputs, input_notes, read_documents, read_rows, skipped_inputs
from telechat_twins.core.data.sft import deepspeed_sequences, mindformers_pair
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject
from tests.support.data_support import dialogue_row, encode_dialogue, tiny_tokenizer, tiny_tokenizer_path, write_rows
from tests.unit.data.test_data_commands import call, tele_data

ASKED = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Paris", "n": 1.50}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "12"}


def dialogue(**row: object) -> Dialogue:
    return parse_dialogue(row, "rows:1")


def text_of(row: Dialogue) -> str:
    return tiny_tokenizer().decode(encode_dialogue(tiny_tokenizer(), row)[0])


# ---- rows of instruction, input, output


def test_instruction_input_and_history_are_honoured() -> None:
    row = dialogue(
        instruction="And now two.", input="Of what?", output="red, blue", system="Be brief.", history=[["One.", "red"]]
    )
    roles_and_texts = [("user", "One."), ("bot", "red"), ("user", "And now two.\nOf what?"), ("bot", "red, blue")]
    assert [(m["role"], m["content"]) for m in row.messages] == roles_and_texts
    assert row.system == "Be brief." and row.multiturn and row.pair is None
    for empty in ("", None):
        alone = dialogue(instruction="Name three colours.", input=empty, output="x", history=[], tools=None)
        assert alone.messages[0]["content"] == "Name three colours." and not alone.multiturn
    assert dialogue(instruction="Go.", output="x").messages[0]["content"] == "Go."
    assert dialogue(instruction="", input="q", output="x").pair == ("q", "x")
    earlier = dialogue(input="<_user>b<_bot>c<_user>d", output="e", history=[["a", "b"]])
    assert [m["content"] for m in earlier.messages] == ["a", "b", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"instruction": "a", "output": "b", "history": "c"}, "'history' is text but not a JSON list"),
        ({"instruction": "a", "output": "b", "history": 7}, "'history' must be a list, found int"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "'history[0]' must be a list of two texts"),
        ({"instruction": "a", "output": "b", "history": [["c", 3]]}, "'history[0]' must be a list of two texts"),
        ({"instruction": "a", "output": "b", "history": [{"role": "user"}]}, "'history[0].content' must be text"),
        ({"instruction": ["a"], "output": "b"}, "'instruction' must be text, found list"),
        ({"instruction": None, "output": "b"}, "neither 'instruction' nor 'input' holds text"),
        ({"instruction": "a"}, "a row of no kind that is read: dialog (dialog); messages (messages)"),
        ({"output": "a"}, "keys found: output"),
        ({"utterances": [{"from": "human", "value": "hi"}]}, "keys found: utterances"),
        ({"messages": [ASKED, SAID], "dialog": [ASKED]}, "can be of several kinds (dialog, messages) by its keys"),
        ({"query": "a", "question": "b", "response": "c"}, "'query' and 'question' both hold the question"),
        ({"chosen": "a", "rejected": "b"}, "a chosen and a rejected answer; pack such pairs with --preference"),
        ({"statement": "a", "label": 1}, "a teacher's proposition; pack them with --teacher"),
        ({"messages": [ASKED, SAID], "rejected_response": "b"}, "'rejected_response' holds a rejected answer; pack"),
        ({"messages": [ASKED, SAID], "rejected_messages": [SAID]}, "pack such rows as pairs with --preference, or"),
        ({"query": "a", "response": "b", "rejected": "c"}, "or the dialogues alone with --ignore-key rejected"),
        ({"dialog": [ASKED, SAID], "rejected": "c"}, "key 'rejected' is not read"),
    ],
)
def test_rows_of_other_forms_are_refused(row: JsonObject, says: str) -> None:
    with pytest.raises(UserError) as error:
        dialogue(**row)
    assert str(error.value).startswith("rows:1: ") and says in str(error.value)


# ---- keys


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"messages": [ASKED, SAID], "weight": 0}, "weight"),
        ({"messages": [ASKED, SAID], "train": False}, "train"),
        ({"messages": [ASKED, SAID], "text": "both"}, "text"),
        ({"messages": [ASKED, SAID], "instruction": "be kind"}, "instruction"),
        ({"dialog": [ASKED, SAID], "rejected": "c"}, "rejected"),
        ({"messages": [ASKED, {**SAID, "refusal": "no"}]}, "messages[1].refusal"),
        ({"messages": [{**ASKED, "audio": {"id": "a"}}, SAID]}, "messages[0].audio"),
        ({"messages": [{**ASKED, "reasoning_content": "hm"}, SAID]}, "messages[0].reasoning_content"),
        ({"conversations": [{"from": "human", "value": "q", "content": "x"}]}, "conversations[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]},
            "messages[0].content[0].x",
        ),
        ({"messages": [{**ASKED, "tool_calls": [CALL]}, SAID]}, "messages[0].tool_calls"),
        ({"messages": [ASKED, {**SAID, "tool_calls": [{**CALL, "extra": 1}]}]}, "messages[1].tool_calls[0].extra"),
        (
            {"messages": [ASKED, {**SAID, "tool_calls": [{"function": {"name": "f", "strict": True}}]}]},
            "messages[1].tool_calls[0].function.strict",
        ),
    ],
)
def test_a_key_that_is_not_read_is_named(row: JsonObject, key: str) -> None:
    with pytest.raises(UserError) as error:
        dialogue(**row)
    assert str(error.value).startswith(f"rows:1: key '{key}' is not read, so its content would be lost")
    if "content" not in key:
        parse_dialogue(row, "rows:1", ignore=[key.rpartition(".")[2]])  # the way out that the message gives


def test_empty_values_say_nothing() -> None:
    row = dialogue(messages=[{**ASKED, "name": None}, {**SAID, "annotations": []}], images=[], note="", history=None)
    assert [set(m) for m in row.messages] == [{"role", "content"}] * 2


def test_ignored_keys_are_recorded(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{**dialogue_row(n), "note": n + 1} for n in range(4)])
    words = [source, "--out", tmp_path / "out", "--sft", "plain", "--seq-len", 128]
    with pytest.raises(UserError, match=r"rows.jsonl:1: key 'note' is not read.*--ignore-key note"):
        tele_data(*words)
    assert tele_data(*words, "--ignore-key", "note") == 0
    assert PackedDataset(tmp_path / "out").meta["keys_ignored"] == ["note"]


def test_what_the_dialogue_consists_of_cannot_be_left_out() -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row, key, place in (
        ({"messages": talk, "system": "s"}, "system", "system"),
        ({"messages": talk}, "content", r"messages\[0\].content"),
        ({"instruction": "q", "output": "a", "history": [["p", "b"]]}, "history", "history"),
    ):
        with pytest.raises(UserError, match=rf"^rows:1: --ignore-key {key} would leave out '{place}', which is part"):
            parse_dialogue(row, "rows:1", ignore=[key])
    # Another shape's key is left out, and one that is empty, as is a key that only calls and results have.
    extra: JsonObject = {"messages": talk, "history": None, "instruction": "x", "name": "n"}
    assert parse_dialogue(extra, "rows:1", ignore=["history", "instruction", "name"]).messages == talk


@pytest.mark.parametrize("row", [{"system": "s", "messages": [{"role": "system", "content": "t"}, ASKED, SAID]}, {
    "messages": [ASKED, SAID, {"role": "system", "content": "rhyme"}, ASKED, SAID]
}, {"dialog": [{"role": "system", "content": "s"}, {"role": "system", "content": "t"}, ASKED, SAID]}])  # fmt: skip
def test_a_second_system_message_is_refused(row: JsonObject) -> None:
    with pytest.raises(UserError, match=r"rows:1: '(messages|dialog)\[\d\]' is a (second )?system message"):
        dialogue(**row)


def test_what_to_do_with_a_second_system_message_hangs_on_where_it_stands() -> None:
    told = {"role": "system", "content": "s"}
    for row, way in (
        ({"messages": [told, ASKED, SAID, {**told, "content": "t"}, ASKED, SAID]}, "join its text to 'messages[0]'"),
        ({"messages": [ASKED, told, SAID]}, "behind others; the chat layout has a place for one, in front: move it"),
        ({"system": "t", "messages": [told, ASKED, SAID]}, "beside the row's own system text; the chat layout"),
        ({"system": "t", "messages": [ASKED, told, SAID]}, "join its text to the row's own system text"),
    ):
        with pytest.raises(UserError, match=re.escape(way)):
            dialogue(**row)


# ---- tools


def test_arguments_as_text_are_the_object_they_write() -> None:
    flat = {"name": "f", "arguments": {"city": "Paris", "n": 1.5}}
    rows = [
        dialogue(messages=[ASKED, {**SAID, "tool_calls": calls}, RESULT, SAID], tools=[{"name": "f"}])
        for calls in ([CALL], json.dumps([CALL]), [{**flat, "id": "c1"}], [{"function": flat, "id": "c1", "index": 0}])
    ]
    assert len({text_of(row) for row in rows}) == 1
    assert '{"name": "f", "arguments": {"city": "Paris", "n": 1.5}}' in text_of(rows[0])
    absent: list[JsonObject] = [{}, {"arguments": None}, {"arguments": ""}, {"arguments": {}}, {"arguments": "{}"}]
    for nothing in absent:
        row = dialogue(messages=[ASKED, {**SAID, "tool_calls": [{"name": "f", **nothing}]}])
        assert row.messages[1]["tool_calls"] == [{"name": "f", "arguments": {}}]
    as_text: list[object] = [
        ASKED,
        {"role": "bot", "content": "", "tool_calls": [{"name": "f", "arguments": '{"a":  1}'}]},
    ]
    assert '"arguments": {"a": 1}}' in render(as_text)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"name": "f", "arguments": "[1]"}, "arguments' must be a JSON object or the text of one, found list"),
        ({"name": "f", "arguments": "{"}, "arguments' must be a JSON object or the text of one (Expecting"),
        ({"name": "f", "arguments": [1]}, "found list"),
        ({"name": "f", "arguments": 0}, "found int"),
        ({"name": "f", "arguments": '{"a": 1, "a": 2}'}, "key 'a' appears twice"),
        ({"name": "f", "arguments": '{"a": NaN}'}, "NaN is not a JSON number"),
        ({"name": None}, "name' must be text"),
        ({"function": "f"}, "function' must be an object, found str"),
        ({"name": "f", "type": "code"}, "'type' must be 'function', found 'code'"),
        ({"name": "f", "index": 1}, "'index' must be 0, found 1"),
        ("f", "must be an object, found str"),
    ],
)
def test_calls_that_are_none_are_refused(call: object, says: str) -> None:
    with pytest.raises(UserError) as error:
        dialogue(messages=[ASKED, {**SAID, "tool_calls": [call]}])
    assert str(error.value).startswith("rows:1: 'messages[1].tool_calls[0]") and says in str(error.value)


def test_results_stand_in_the_order_of_their_calls() -> None:
    calls = [{**CALL, "id": "a"}, {**CALL, "id": "b"}]
    results = [{**RESULT, "tool_call_id": "a"}, {**RESULT, "tool_call_id": "b"}]
    said = {**SAID, "tool_calls": calls}
    row = dialogue(messages=[ASKED, said, *results, SAID])
    assert [set(m) for m in row.messages[2:4]] == [{"role", "content"}] * 2
    for wrong, says in (
        ([ASKED, said, results[1]], r"'messages\[2\].tool_call_id': the result of the call 'a' is missing"),
        ([ASKED, said, {**results[0], "name": "g"}], r"'messages\[2\].name' is 'g', but in its place 'f'"),
        ([ASKED, results[0]], r"'messages\[1\].tool_call_id': 'a' is the id of no call before it"),
        ([ASKED, said, *results, results[0]], r"the result of the call 'b' is missing or there twice"),
        ([ASKED, said, *results, results[1]], r"the result of the call 'b' is missing or there twice"),
    ):
        with pytest.raises(UserError, match=says):
            dialogue(messages=wrong)


def test_released_packings_refuse_what_they_would_leave_out() -> None:
    tools = dialogue(messages=[ASKED, SAID], tools=[{"name": "f"}])
    called = dialogue(messages=[ASKED, {**SAID, "tool_calls": [CALL]}], tool=False, multiturn=False)
    result = dialogue(messages=[ASKED, SAID, {"role": "tool", "content": "x"}], tool=False, multiturn=False)
    for row in (tools, called, result):
        with pytest.raises(UserError, match="rows:1: .* use --sft plain"):
            list(deepspeed_sequences([row], tiny_tokenizer(), 500))
        with pytest.raises(UserError, match="rows:1: .*use --sft plain"):
            mindformers_pair(row)
    for template in (True, False):
        flagged = dialogue(messages=[ASKED, {**SAID, "tool_calls": [CALL]}])
        if template:
            [ids] = deepspeed_sequences([flagged], tiny_tokenizer(), 500)
            assert '"city": "Paris"' in tiny_tokenizer().decode(ids)
        else:
            with pytest.raises(UserError, match="tool calls, which the released deepspeed pipeline leaves out"):
                list(deepspeed_sequences([flagged], tiny_tokenizer(), 500, template=False))


def test_system_texts_that_mindformers_leaves_out_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [dialogue_row(n, system="Be brief." if n % 2 else None) for n in range(20)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    tele_data(source, "--out", tmp_path / "mf", "--sft", "mindformers", "--seq-len", 128)
    assert "left out: the system text of 10 rows" in capsys.readouterr().out


def test_chat_of_tele_tokenize_reads_messages_like_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["encode", "--tokenizer", tiny_tokenizer_path(), "--ids", "--chat"]
    called: list[object] = [{"role": "system", "content": "s"}, ASKED, {**SAID, "tool_calls": [CALL]}]
    call(tokenize_command, *words, json.dumps(called))
    wanted = [*called[:2], {**SAID, "tool_calls": [{"name": "f", "arguments": {"city": "Paris", "n": 1.5}}]}]
    assert capsys.readouterr().out.split() == list(map(str, encode_chat(tiny_tokenizer(), wanted)))
    with pytest.raises(UserError, match=r"--chat: 'messages\[1\]' is a system message behind others"):
        call(tokenize_command, *words, json.dumps([ASKED, called[0]]))


# ---- files


def items(text: str | bytes, limit: int = 1 << 20) -> list[tuple[int, int, bytes]]:
    data = text.encode() if isinstance(text, str) else text
    found = list(json_items(io.BytesIO(data), Path("x.json"), limit))
    assert all(data[item.offset : item.offset + len(item.data)] == item.data for item in found)
    return [(item.line, item.item, item.data) for item in found]


def random_value(draw: random.Random, depth: int) -> object:
    kind = draw.randrange(6 if depth < 4 else 4)
    if kind == 0:
        return draw.choice([None, True, 1, -2.5e-3])
    if kind < 4:
        return "".join(draw.choices('ab[]{}",:\\\n 中😈', k=draw.randrange(9)))
    if kind == 4:
        return [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {f'{n}"}}{{]': random_value(draw, depth + 1) for n in range(draw.randrange(4))}


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_objects_of_a_json_file_are_cut_where_a_parser_cuts_them(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_items_module, "BLOCK_BYTES", block)
    draw = random.Random(block)
    for _ in range(60):
        rows = [{"a": random_value(draw, 0)} for _ in range(draw.randrange(5))]
        indent, ascii_only = draw.choice([None, 1]), draw.random() < 0.5
        whole = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
        texts = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
        apart = draw.choice(["\n", "", " \r\n\t"]).join(texts) + draw.choice(["", "\n"])
        for text in (whole, apart, "\ufeff" + whole, f"\n {apart}"):
            found = items(text)
            assert [json.loads(data) for *_, data in found] == rows
            assert [number for _, number, _ in found] == list(range(1, len(rows) + 1))
    listed = '[\n{"a": 1},\n\n {"a":\n2}, {"a": 3}\n]\n'
    assert [line for line, *_ in items(listed)] == [2, 4, 5]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1}', "x.json:1: item 1: the file ends before it does"),
        ('[{"a": 1},\n {"a": ', "x.json:2: item 2: the file ends before it does"),
        ('[{"a": "x]}', "item 1: the file ends before it does"),
        ('[{"a": 1},]', "item 2: a value is missing in the list"),
        ("[,]", "item 1: a value is missing in the list"),
        ('[{"a": 1}] {"b": 2}', "text behind the end of the list"),
        ('{"a": 1}, {"b": 2}', "expected an object, which begins with a brace"),
        ('"text"', "not JSON rows; expected a list of objects, or objects"),
        (b"\xff\xfe[\x00", "not UTF-8 but utf-16; add --encoding"),
        ('{"a": ' + "[" * 50, "item 1: the file ends"),
        ('[{"a": "' + "x" * 2_000_000 + '"}]', "a row of more than 1048576 bytes; split it"),
    ],
)
def test_json_files_that_are_no_rows_are_named(text: str | bytes, says: str) -> None:
    with pytest.raises(UserError) as error:
        items(text)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert items("") == items(" \n") == items("[]") == items("[ ]\n") == []


def test_json_and_upper_case_suffixes_are_rows(tmp_path: Path) -> None:
    (tmp_path / "list.JSON").write_text('[{"text": "one"},\n {"text": "two", "id": 7}]', encoding="utf-8")
    (tmp_path / "lines.json").write_text('{"text": "three"}\n{"text": "four"}\n', encoding="utf-8")
    (tmp_path / "upper.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "five"}\n')
    (tmp_path / "plain.TXT").write_text("six", encoding="utf-8")
    found = [block.text for file in find_inputs([tmp_path]) for block in read_documents(file)]
    assert found == ["three", "four", "one", "two", "six", "five"]
    assert [where.rpartition("/")[2] for where, _ in read_rows(tmp_path / "list.JSON")] == [
        "list.JSON:1: item 1",
        "list.JSON:2: item 2",
    ]
    rows = [dialogue_row(n) for n in range(5)]
    (tmp_path / "talk.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    stored = DialogueFile([tmp_path / "talk.json", write_rows(tmp_path / "talk.ndjson", rows)])
    assert [d.messages for d in stored[:5]] == [d.messages for d in stored[5:]] and len(stored) == 10
    assert stored[3].messages == parse_dialogue(rows[3], "").messages
    (tmp_path / "bad.json").write_text('[{"text": "a"},\n {"text": "b", "c": }]', encoding="utf-8")
    with pytest.raises(UserError, match=r"bad.json:2: item 2: not valid JSON .Expecting value at column 20"):
        tele_data(tmp_path / "bad.json", "--out", tmp_path / "out")


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", ['{"text": "a", "text": "b"}'])
    with pytest.raises(UserError, match=r"rows.jsonl:1: not valid JSON .key 'text' appears twice"):
        tele_data(source, "--out", tmp_path / "out")


def test_packed_folders_among_the_inputs_are_not_rows(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "rows.jsonl", [{"text": "fox"}])
    tele_data(tmp_path / "in", "--out", tmp_path / "in" / "sub" / "packed")
    assert [file.name for file in find_inputs([tmp_path / "in"])] == ["rows.jsonl"]
    assert "sub/packed (a packed folder); read: 1" in skipped_inputs([tmp_path / "in"])[0]
    with pytest.raises(UserError, match="no folder or pattern with files in it"):
        find_inputs([tmp_path / "in" / "sub" / "packed"])


def test_skipped_files_and_fields_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "corpus"
    (folder / "sub" / ".git").mkdir(parents=True)
    write_rows(folder / "a.jsonl", [{"text": "fox", "url": "u", "id": 1}, {"text": "dog", "lang": "en"}])
    for name in ("b.gz", "sub/c.docx", "sub/d", ".hidden.txt", "sub/.git/e.txt"):
        (folder / name).write_text("x")
    (folder / "link").symlink_to(tmp_path)
    (folder / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert tele_data(folder, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert f"note: skipped in {folder}: b.gz (compressed, and its name does not say what it holds" in shown.err
    for one in (
        "broken.txt (not a file)",
        "link (a link to a folder)",
        "sub/c.docx (a document and not plain text; save it as .txt or .md)",
    ):
        assert one in shown.err
    assert "sub/d (no suffix); 2 hidden; read: 1\n" in shown.err
    assert "left out: keys that hold nothing to learn: id, lang, url" in shown.out
    assert PackedDataset(tmp_path / "out").meta["documents"] == 2
    for n in range(12):
        (folder / f"z{n:02}.bin").write_text("x")
    assert "z08.bin, z09.bin and 2 more (neither text nor rows" in skipped_inputs([folder])[0]
    assert skipped_inputs([folder / "a.jsonl", tmp_path / "*.txt"]) == []
    call(tokenize_command, "train", folder, "--out", tmp_path / "t.model", "--vocab-size", 299)
    assert "note: skipped in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("t.jsonl.gz", "damaged or cut off, not a whole .gz file"),
        ("t.gz", "compressed, and its name does not say what it holds; name it as .jsonl.gz"),
        ("t.ZIP", "an archive; unpack it first"),
        ("t.docx", "a document and not plain text; save it as .txt or .md"),
        ("t.xlsx", "a table in a form that is not read; convert it to .csv, .parquet or .jsonl"),
        ("t.csv", ": holds JSON rows, not a table; name it .jsonl"),
        ("t.txt", ":1: holds JSON rows, and a file of this name is read as one text; name it .jsonl"),
        ("t.jl", ":1: holds JSON rows, and a file of this name is read as one text; name it .jsonl"),
        ("t", ":1: holds JSON rows, and a file of this name is read as one text; name it .jsonl"),
    ],
)
def test_files_that_would_be_packed_as_something_else_are_refused(tmp_path: Path, name: str, says: str) -> None:
    write_rows(tmp_path / name, ["", {"text": "a"}])
    for given in (tmp_path / name, tmp_path / "t*"):
        with pytest.raises(UserError) as error:
            tele_data(given, "--out", tmp_path / "out")
        assert says in str(error.value) and name in str(error.value)
    lists = ('[{"messages": []}]', '[\n  {\n    "id": 1,\n    "text": "a"\n  }\n]', '[{"text": "a"},\n{"text": "b"}]')
    for text in (*lists, '\n{\n  "instruction": "a",\n  "output": "b"\n}\n'):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as error:
            tele_data(tmp_path / name, "--out", tmp_path / "out")
        assert says in str(error.value)


def test_text_that_begins_like_json_stays_text(tmp_path: Path) -> None:
    for n, text in enumerate(
        ('{"name": "x"}\nmore', "{not json}", "[1, 2]\n", "[{}]", "[{1}]", '{"id": 1}\n"text": a')
    ):
        (tmp_path / f"{n}.txt").write_text(text)
        assert "".join(block.text for block in read_documents(tmp_path / f"{n}.txt")) == text


# ---- verifying


def test_verify_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "some text"}] * 5)
    for name in ("a", "b"):
        tele_data(source, "--out", tmp_path / name)
    capsys.readouterr()
    assert call(data_command, "--verify", tmp_path / "a", tmp_path / "b") == 0
    shown = capsys.readouterr()
    assert shown.out.count("verified, 4 files") == 2 and "verifying: 100%" in shown.err
    tokens = tmp_path / "b" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[::-1])
    (tmp_path / "b" / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError) as error:
        call(data_command, "--verify", tmp_path / "a", tmp_path / "b", "--quiet")
    assert "b/tokens.bin: altered (SHA-256" in str(error.value) and "b/tokenizer.model: expected" in str(error.value)
    assert "a: verified" in capsys.readouterr().out
    for words, says in (
        (["--verify", tmp_path / "a", "--out", "x"], "--out: not with --verify"),
        (["--verify", tmp_path / "a", "--sft", "plain"], "--sft: not with --verify"),
        ([source], "--out: missing"),
        ([source, "--out", "x"], "--tokenizer: missing"),
        (["--verify", source], "no such packed folder"),
    ):
        with pytest.raises(UserError, match=says):
            call(data_command, *words)


# ---- files that are one object with the rows under a key


TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PAIRS = [{"instruction": "q", "output": "a"}, {"instruction": "r", "output": "b"}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("held", "key"),
    [
        ({"version": "1.1", "data": PAIRS}, "data"),
        ({"code": 0, "msg": "ok", "data": PAIRS, "total": 2}, "data"),
        ({"rows": [{"text": "a"}, {"text": "b"}], "tools": []}, "rows"),
        ({"conversations": [{"id": 1, "conversations": TURNS}] * 2}, "conversations"),
        ({"items": [{"input": "q", "target": "a", "kind": "NLI"}] * 2, "description": "d"}, "items"),
    ],
)
def test_rows_under_a_key_are_rows(held: JsonObject, key: str, indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(held, indent=indent), encoding="utf-8-sig")
    found = list(read_rows(tmp_path / "a.json"))
    assert [row for _, row in found] == held[key]
    assert input_notes([tmp_path / "a.json"]) == [f"{tmp_path}/a.json: the rows are those under its key '{key}'"]
    lines = json.dumps(held, indent=indent).split("\n")
    for where, row in found:  # the line on which the row begins
        assert next(iter(row)) in "".join(lines[int(where.split(":")[1]) - 1 :][:2])


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": TURNS},
        {"id": 3, "data": [ASKED, SAID]},
        {"tools": [{"type": "function"}], "messages": [ASKED, SAID]},
        {"conversation": [{"system": "s", "input": "q", "output": "a"}]},
        {"question": "q", "choices": [{"label": "A", "text": "x"}], "answerKey": "A"},
        {"story": "s", "questions": [{"text": "x"}]},
        {"data": ["q", "a"]},
        {"data": []},
    ],
)
def test_a_row_alone_in_its_file_is_a_row(row: JsonObject, tmp_path: Path) -> None:
    for text in (json.dumps(row), json.dumps(row, indent=1), json.dumps(row) + "\n" + json.dumps({"data": PAIRS})):
        (tmp_path / "a.json").write_text(text)
        assert next(read_rows(tmp_path / "a.json"))[1] == row
        assert input_notes([tmp_path / "a.json"]) == []


def test_rows_under_a_key_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind the part that is looked at first is judged where it is met."""
    monkeypatch.setattr(wrapped, "MAX_LINE", 300)
    rows = [{"text": "abc" * 9, "id": n} for n in range(100)]
    whole = json.dumps({"version": 1, "data": rows, "license": "mit", "system": ""}, indent=1)
    (tmp_path / "a.json").write_text(whole)
    assert [row for _, row in read_rows(tmp_path / "a.json")] == rows
    assert [block.text for block in read_documents(tmp_path / "a.json")] == [row["text"] for row in rows]
    pairs = [{"query": "q", "response": str(n)} for n in range(40)]
    indexed = DialogueFile([write_held(tmp_path / "b.json", pairs)])
    assert [indexed[n].messages[-1]["content"] for n in (39, 0, 7)] == ["39", "0", "7"]
    for behind, says in (
        ('"license": [{"text": "b"}], "system": "x"', r"a.json:\d+: 'system' beside the rows under 'data'"),
        ('"other": [{"text": "b"}]', r"a.json:\d+: 'other' beside the rows under 'data'; write the rows alone"),
        ('"license" "mit"', "expected a key with a colon"),
        ('"license": "mit" "x": 1', "the value of 'license' is not valid JSON"),
        (f'"data": {json.dumps(rows[:1])}', "key 'data' appears twice; remove one"),
    ):
        (tmp_path / "a.json").write_text(json.dumps({"data": rows})[:-1] + f", {behind}}}")
        with pytest.raises(UserError, match=says):
            list(read_rows(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}) + "[]")
    with pytest.raises(UserError, match="text behind the object whose 'data' holds the rows"):
        list(read_rows(tmp_path / "a.json"))


def test_what_stands_before_the_rows_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is about the key beside the rows, and not about a row that is too long."""
    monkeypatch.setattr(wrapped, "MAX_LINE", 300)
    (tmp_path / "a.json").write_text(json.dumps({"system": "s", "data": PAIRS * 20}))
    with pytest.raises(UserError, match=r"a.json: 'system' beside the rows under 'data'; write the rows alone"):
        list(read_rows(tmp_path / "a.json"))
    row = {"data": [{"a": 1}], "text": "abc" * 200}  # a long text alone in its file
    (tmp_path / "a.json").write_text(json.dumps(row))
    assert [found for _, found in read_rows(tmp_path / "a.json")] == [row]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_documents_under_a_key_are_no_dialogue(name: str, tmp_path: Path) -> None:
    held: JsonObject = {"data": [{"text": "b"}], "n": 1}
    for row, says in (
        (held, "found: data, n; 'data' holds objects: if these are the rows"),
        ({**held, "title": "t"}, "another field is named by --text-key; 'data' holds objects: if these are the rows"),
        ({"data": PAIRS, "n": 1}, "pack dialogues with --sft"),
        ({"data": ["q", "a"]}, "pack dialogues with --sft"),
    ):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=says):
            list(read_documents(tmp_path / name))


def test_several_lists_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.json"
    source.write_text(json.dumps({"train": PAIRS, "test": PAIRS}))
    with pytest.raises(UserError, match=r"a.json: lists of objects under 'train' and 'test'; write the one that holds"):
        tele_data(source, "--out", tmp_path / "out", "--sft", "plain", "--seq-len", "64")
    source.write_text(json.dumps({"system": "s", "train": PAIRS, "test": PAIRS}))
    with pytest.raises(UserError, match=r"found: system, train, test; .* 'train' and 'test' hold objects: if these"):
        tele_data(source, "--out", tmp_path / "out", "--sft", "plain", "--seq-len", "64")
    write_held(source, PAIRS)
    assert tele_data(source, "--out", tmp_path / "out", "--sft", "plain", "--seq-len", "64") == 0
    said = capsys.readouterr()
    assert "rows: 2 alpaca" in said.out and "note: " + input_notes([source])[0] in said.err


def write_held(path: Path, rows: list[JsonObject]) -> Path:
    path.write_text(json.dumps({"version": 2, "data": rows}))
    return path
