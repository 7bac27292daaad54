"""`tele data` on the rows of examples/, by the commands of its page, and on inputs of the kinds that once failed."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core import cli
from telechat_twins.core.commands import data as data_command
from telechat_twins.core.data.packed import PackedDataset
from telechat_twins.core.data.packing.show import marked
from telechat_twins.core.errors import UserError
from tests import docs
from tests.house import ROOT
from tests.support.data_support import tiny_tokenizer, tiny_tokenizer_path, write_rows
from tests.unit.data.test_data_commands import call, tele_data

EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir() if path.name != "README.md")


def test_the_commands_of_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copy(tiny_tokenizer_path(), tmp_path / "tokenizer.model")
    commands = docs.commands(ROOT, "examples/README.md")
    shown = " ".join(command.text for command in commands)
    assert [name for name in EXAMPLES if f"examples/{name}" not in shown] == []
    for command in commands:
        assert cli.main([*command.words[1:], "--quiet"]) == 0, command.text
    printed = capsys.readouterr().out
    for line in (
        "data/ex-text: 4 documents",
        "data/ex-sft: 5 rows",
        "(1 dialog, 2 messages, 1 query, 1 completion)".strip("()"),
        "context: 1 answers of weight 0",
        "data/ex-pairs: 3 pairs",
        "data/ex-teacher: 9 propositions, 3 of them true",
        "left out: keys that hold nothing to learn: id",
    ):
        assert line in printed
    assert printed.count("\u27e6") >= len(commands)  # a sample with its targets marked behind each summary


def packed_text(source: Path, *words: object) -> str:
    """The decoded contents of the folder that `tele data` makes of a file."""
    out = source.parent / f"{source.name}-packed"
    assert tele_data(source, "--out", out, "--force", *words) == 0
    ids = np.asarray(PackedDataset(out).tokens, np.int64)
    return marked(ids, np.zeros(len(ids), bool), tiny_tokenizer())


SFT = ("--sft", "plain", "--seq-len", 1024)
TALK = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "dog."}]


def test_reported_inputs_give_the_right_value(tmp_path: Path) -> None:
    """Each was packed wrongly, or not at all, by an earlier version."""
    rows = [{"instruction": "Say it twice.", "input": "dog", "output": "dog dog", "history": [["Once.", "dog"]]}]
    assert "<_user>Once.<_bot>dog<_end>\n<_user>Say it twice.\ndog<_bot>dog dog<_end>\n" in packed_text(
        write_rows(tmp_path / "alpaca.jsonl", rows), *SFT
    )
    call = {"function": {"name": "f", "arguments": '{"place": "Rome", "days": 3}'}}
    row = {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    called = packed_text(write_rows(tmp_path / "calls.jsonl", [row]), *SFT)
    assert '{"name": "f", "arguments": {"place": "Rome", "days": 3}}' in called
    late = {"messages": [*TALK, {"role": "system", "content": "Now in verse."}, *TALK]}
    with pytest.raises(UserError, match=r"late.jsonl:1: 'messages\[2\]' is a system message behind others"):
        packed_text(write_rows(tmp_path / "late.jsonl", [late]), *SFT)
    (tmp_path / "list.JSON").write_text('[{"text": "one fox"},\n {"text": "two dogs"}]')
    (tmp_path / "upper.JsonL").write_text('{"text": "upper fox"}\n')
    (tmp_path / "squeezed.jsonl.GZ").write_bytes(gzip.compress(b'{"text": "small fox"}\n'))
    assert packed_text(tmp_path / "list.JSON") == "one fox<_end>two dogs<_end>"
    assert packed_text(tmp_path / "upper.JsonL") == "upper fox<_end>"
    assert packed_text(tmp_path / "squeezed.jsonl.GZ") == "small fox<_end>"
    for name, row in {
        "sharegpt": {"conversations": [{"from": "human", "value": "fox?"}, {"from": "gpt", "value": "dog."}]},
        "query": {"query": "fox?", "response": "dog."},
        "parts": {"messages": [{**TALK[0], "content": [{"type": "text", "text": "fox?"}]}, TALK[1]]},
    }.items():
        assert "<_user>fox?<_bot>dog.<_end>" in packed_text(write_rows(tmp_path / f"{name}.jsonl", [row]), *SFT)
    developer = {"messages": [{"role": "developer", "content": "be short"}, *TALK]}
    assert packed_text(write_rows(tmp_path / "dev.jsonl", [developer]), *SFT).startswith("<_system>be short\n<_user>")


def test_show_prints_samples_with_their_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": [{"role": "system", "content": "s"}, *TALK]}, {"query": "fox", "response": "word " * 300}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    assert tele_data(source, "--out", tmp_path / "out", *SFT) == 0
    first = "<_system>s\n<_user>fox?<_bot>\u27e6dog.<_end>\u27e7\n"
    shown = capsys.readouterr().out
    assert first in shown and "sample 2" not in shown
    assert "rows: 1 messages, 1 query (by their keys)\ndefaulted: 1 rows name no system text" in shown
    words = ["data", "--show", "2", str(tmp_path / "out")]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert first in shown and "\u27e6" + "word " * 300 + "<_end>\u27e7" in shown
    assert tele_data(source, "--out", tmp_path / "out", *SFT, "--force", "--show", 0) == 0
    assert "sample 1" not in capsys.readouterr().out
    text = write_rows(tmp_path / "text.jsonl", [{"text": "fox " * 400}])
    assert tele_data(text, "--out", tmp_path / "text") == 0
    assert " characters) ... " in capsys.readouterr().out
    for words, says in (
        (["--show", "-1"], "--show: must be at least 0"),
        (["--show", "1"], "not a packed folder"),
        (["--verify", "--show", "1"], "--show: not with --verify"),
    ):
        with pytest.raises(UserError, match=says):
            call(data_command, tmp_path, *words)


def test_examples_are_short_and_strict() -> None:
    for name in EXAMPLES:
        contents = (ROOT / "examples" / name).read_bytes()
        assert len(contents) < 3000
        if name.endswith(".jsonl"):
            assert all(isinstance(json.loads(line), dict) for line in contents.splitlines())
