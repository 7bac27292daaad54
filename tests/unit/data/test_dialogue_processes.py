"""Dialogues packed by several processes: what one process makes of them, whatever the form of the rows."""

from __future__ import annotations

import csv
import gzip
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from telechat_twins.core.data.dialogues import parse_dialogue
from telechat_twins.core.data.encoders import parallel, tasks
from telechat_twins.core.data.encoders.tasks import TableRow
from telechat_twins.core.data.encoders.wire import from_bytes, to_bytes
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.packed import PackedWriter
from telechat_twins.core.data.prepare import pack_dialogues
from telechat_twins.core.data.rows import find_inputs, read_rows
from telechat_twins.core.data.sft import dialogue_samples
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_LINE
from tests.support.data_support import SENTENCES, tiny_tokenizer, write_rows

SEQ_LEN = 64


def write_forms(folder: Path) -> None:
    """Rows of several kinds, short ones and ones that are cut, in every form."""
    draw = random.Random(3)

    def said(most: int = 2) -> str:
        return "".join(draw.choices(SENTENCES, k=draw.randint(1, most)))

    folder.mkdir()
    pairs = [{"instruction": said(), "input": said(), "output": said(9), "id": n} for n in range(120)]
    chats = [
        {"messages": [{"role": ("user", "assistant")[n % 2], "content": said()} for n in range(2 * draw.randint(1, 4))]}
        for _ in range(90)
    ]
    write_rows(folder / "a.jsonl", pairs)
    write_rows(folder / "b.jsonl", ["", *(json.dumps(row) + "\r" for row in chats), " "])
    (folder / "c.json").write_text(json.dumps([{**row, "url": "u"} for row in chats[:40]]), encoding="utf-8")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    with (folder / "e.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("query", "response"), *((row["input"], row["output"]) for row in pairs[:50])])
    pq.write_table(pa.Table.from_pylist(chats[:60]), folder / "f.parquet")


def packed(source: Path, out: Path, threads: int) -> tuple[dict[str, bytes], Reading]:
    reading = Reading()
    pack_dialogues([source], out, tiny_tokenizer(), seq_len=SEQ_LEN, threads=threads, reading=reading, quiet=True)
    return {file.name: file.read_bytes() for file in out.iterdir()}, reading


def test_the_number_of_processes_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_forms(tmp_path / "in")
    once = packed(tmp_path / "in", tmp_path / "whole", 1)
    assert once[1].left_out == {"id", "url"} and sum(once[1].kinds.values()) == 120 + 90 + 40 + 120 + 50 + 60
    monkeypatch.setattr(tasks, "TASK", 2000)
    monkeypatch.setattr(parallel, "_PLACE", 1 << 13)
    for threads in (1, 2, 5):
        files, reading = packed(tmp_path / "in", tmp_path / str(threads), threads)
        assert files == once[0] and asdict(reading) == asdict(once[1]), threads


def test_sequences_are_those_of_the_rows_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against packing written down anew: rows while they fit, and windows of longer ones that share a token."""
    write_forms(tmp_path / "in")
    monkeypatch.setattr(tasks, "TASK", 2000)
    made: list[tuple[list[int], list[int]]] = []
    add = PackedWriter.add_sequence

    def noted(self: PackedWriter, ids: np.ndarray, mask: np.ndarray, *others: Any) -> None:
        made.append((ids.tolist(), mask.tolist()))
        add(self, ids, mask, *others)

    monkeypatch.setattr(PackedWriter, "add_sequence", noted)
    packed(tmp_path / "in", tmp_path / "out", 2)
    wanted: list[tuple[list[int], list[int]]] = []
    room = 0
    for file in find_inputs([tmp_path / "in"], rows=True):
        for where, row in read_rows(file):
            ((ids, mask),) = dialogue_samples(tiny_tokenizer(), parse_dialogue(row, where, reading=Reading()))
            if len(ids) > SEQ_LEN:
                for begin in range(0, len(ids) - 1, SEQ_LEN - 1):
                    wanted.append((ids[begin : begin + SEQ_LEN], [0, *mask[begin + 1 : begin + SEQ_LEN]]))
                room = 0
            elif len(ids) <= room:
                wanted[-1] = wanted[-1][0] + ids, wanted[-1][1] + mask
                room -= len(ids)
            else:
                wanted.append((ids, mask))
                room = SEQ_LEN - len(ids)
    assert made == wanted


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [400, 3])
def test_the_first_row_at_fault_is_named(
    threads: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where this process has already met a later line that cannot be read, in the same task or in another."""
    if rows > 3:
        monkeypatch.setattr(tasks, "TASK", 500)
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a fox", "completion": "a dog"}] * rows)
    lines = source.read_bytes().splitlines(keepends=True)
    lines[-2], lines[-1] = b'{"prompt": 1, "completion": "b"}\n', b'{"prompt": "' + b"x" * MAX_LINE + b'"}\n'
    source.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=rf"rows.jsonl:{rows - 1}: "):
        packed(source, tmp_path / "out", threads)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_row_of_a_table_travels_as_it_is() -> None:
    task: list[Any] = [TableRow("f.parquet: row 1", b"{}\n\xff."), TableRow("中", b"")]
    assert from_bytes(to_bytes(task)) == task
