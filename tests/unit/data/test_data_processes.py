"""Tokenizing in several processes: the same as in one, whatever the form of the input, and clean ends of all kinds."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from telechat_twins.core.data.encoders import parallel, tasks
from telechat_twins.core.data.encoders.parallel import encode_blocks
from telechat_twins.core.data.encoders.tasks import Encoder, Pace, Part
from telechat_twins.core.data.encoders.wire import from_bytes, to_bytes
from telechat_twins.core.data.forms import json_rows, texts
from telechat_twins.core.data.forms.json_rows import UnreadLines, UnreadRow
from telechat_twins.core.data.forms.long_rows import document_rows
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.prepare import pack_text
from telechat_twins.core.data.rows import Block
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_LINE
from tests.support.data_support import SENTENCES, tiny_tokenizer, tiny_tokenizer_path, write_rows

WORK = parallel._work


def write_forms(folder: Path) -> None:
    """The same kind of rows in every form that texts are read from, and texts."""
    draw = random.Random(5)
    rows = [{"text": "".join(draw.choices(SENTENCES, k=draw.choice((0, 1, 3, 40)))), "id": n} for n in range(400)]
    write_rows(folder / "a.jsonl", rows)
    write_rows(folder / "b.jsonl", ["", *(json.dumps(row) + "\r" for row in rows[:50]), "  "])
    (folder / "c.json").write_text(json.dumps(rows[:90]), encoding="utf-8")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    (folder / "e.jsonl").write_text("\ufeff" + json.dumps(rows[3]), encoding="utf-8")  # a mark, and no last line break
    with (folder / "f.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "id"), *((row["text"], row["id"]) for row in rows[:80])])
    pq.write_table(pa.Table.from_pylist(rows[:70]), folder / "g.parquet")
    (folder / "h.txt").write_text("".join(SENTENCES) * 60, encoding="utf-8")
    (folder / "i.txt").write_text("中国" * 2000, encoding="utf-8")


def packed(source: Path, out: Path, threads: int, **options: Any) -> tuple[dict[str, bytes], Reading]:
    """The files of what is packed of ``source``, and what was noticed."""
    reading = Reading()
    pack_text([source], out, tiny_tokenizer(), threads=threads, reading=reading, quiet=True, **options)
    return {file.name: file.read_bytes() for file in out.iterdir()}, reading


def small_tasks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(tasks, "TASK", size)
    monkeypatch.setattr(texts, "BLOCK_BYTES", size)


@pytest.mark.parametrize("bos", [False, True])
def test_the_number_of_processes_leaves_no_trace(bos: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    write_forms(tmp_path / "in")
    once = packed(tmp_path / "in", tmp_path / "whole", 1, add_bos=bos)
    where = once[1].noticed["texts are empty, and no documents"][1]
    first = next(n for n, line in enumerate((tmp_path / "in" / "a.jsonl").open(), 1) if '"text": ""' in line)
    assert where == f"{tmp_path / 'in' / 'a.jsonl'}:{first}"
    small_tasks(monkeypatch, 2000)
    monkeypatch.setattr(parallel, "_PLACE", 1 << 14)
    for threads in (1, 2, 5):
        assert packed(tmp_path / "in", tmp_path / str(threads), threads, add_bos=bos) == once, threads


def test_lines_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a plain file only places are handed out; other processes hold none of it before."""
    source = write_rows(tmp_path / "a.jsonl", [{"text": "a fox " * 5}] * 300)
    light, whole = [], []
    monkeypatch.setattr(tasks, "TASK", 1000)
    old = UnreadLines.light
    monkeypatch.setattr(UnreadLines, "light", lambda self: light.append(old(self)) or light[-1])
    packed(source, tmp_path / "out", 2)
    assert light and all(lines.data is None for lines in light)
    compressed = tmp_path / "b.jsonl.gz"
    compressed.write_bytes(gzip.compress(source.read_bytes()))
    whole += [lines for lines in document_rows(compressed, "text", size=lambda: 1000)]
    assert all(isinstance(lines, UnreadLines) and lines.light().data for lines in whole)


@pytest.mark.parametrize("limit", [40, 90, 1000])
def test_lines_come_whole_and_numbered(limit: int, tmp_path: Path) -> None:
    draw = random.Random(limit)
    for trial in range(40):
        lines = [
            draw.choice((b"\n", b" \n", json.dumps({"text": "x" * draw.randrange(70)}).encode() + b"\n"))
            for _ in range(draw.randrange(1, 30))
        ]
        lines[-1] = lines[-1].rstrip(b"\n") if trial % 2 else lines[-1]
        (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
        found: list[tuple[int, bytes]] = []
        long = 0
        for part in document_rows(tmp_path / "a.jsonl", "text", limit=limit, size=lambda: draw.randrange(1, 60)):
            if isinstance(part, UnreadLines):
                assert [*part.light().rows()] == [*part.rows()]
                found += [(row.line, row.data) for row in part.rows()]
            else:
                assert not isinstance(part, json_rows.RawRow)
                text = "".join(part.parts)
                found.append((part.line, json.dumps({"text": text}).encode()))
                long += 1
        assert found == [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()], trial
        assert long == sum(len(line) > limit for line in lines), trial


def test_tasks_travel_as_bytes() -> None:
    odd, path = "中\n\ud800\0", Path("a\udcff\n.jsonl")
    task = [
        Part(odd, odd, True, False),
        UnreadRow(path, 3, 0, b'{"text": "\xff\n"}'),
        Part("", "", False, True),
        UnreadLines(path, 1, None, 4, b"{}\n\n"),
        UnreadLines(path, 7, 0, 4, b"{}\n\n"),
    ]
    assert from_bytes(to_bytes(task)) == [*task[:4], task[4]._replace(data=None)]
    assert from_bytes(to_bytes([])) == []


def test_tasks_grow_smaller_toward_the_end() -> None:
    pace = Pace(100 << 20, 2)
    assert pace.size() == tasks.TASK
    pace.left = 4 << 20
    assert pace.size() == 1 << 19
    pace.left = 0
    assert pace.size() == 1 << 14 and Pace(0, 1).size() == tasks.TASK


def test_others_notice_what_one_process_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASK", 500)
    rows = [
        {"text": "fox " * (n % 9), "id": n} if n % 2 else {"text": "dog " * (n % 7), "url": "u"} for n in range(200)
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    once, again = (packed(source, tmp_path / str(threads), threads) for threads in (1, 2))
    assert once == again
    assert once[1].left_out == {"id", "url"} and once[1].noticed["texts are empty, and no documents"][0] == 26


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_first_row_at_fault_is_named(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are parsed by others, while this process has already met a later line that is too long."""
    monkeypatch.setattr(tasks, "TASK", 500)
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "a fox"}] * 400)
    lines = source.read_bytes().splitlines(keepends=True)
    lines[350], lines[380], lines[399] = (
        b'{"text": 1}\n',
        b"{\n",
        b'{"text": "a", ' + b" " * MAX_LINE + b'"text": "b"}\n',
    )
    source.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"rows.jsonl:351: expected text in field 'text', found int"):
        packed(source, tmp_path / "out", threads)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_id_outside_the_vocabulary_is_named(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASK", 500)
    tokenizer = tiny_tokenizer()
    encode = type(tokenizer).encode_batch

    def beyond(self: Any, texts: list[str], begins: Any = None) -> list[np.ndarray]:
        return [ids + 600 * ("dog" in text) for text, ids in zip(texts, encode(self, texts, begins), strict=True)]

    source = write_rows(tmp_path / "rows.jsonl", [{"text": "a fox"}] * 150 + [{"text": "a dog"}] * 9)
    monkeypatch.setattr(type(tokenizer), "encode_batch", beyond)
    with pytest.raises(UserError, match=r"rows.jsonl:151: token id \d+ is outside the vocabulary of 600"):
        packed(source, tmp_path / "out", threads)


# ---- ends of other processes, and of this one


def test_others_outlive_a_hangup_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup, where the parent goes on as well."""
    monkeypatch.setattr(tasks, "TASK", 10)
    monkeypatch.setattr(parallel, "_work", _is_hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        blocks = [Block("a", "some words of text") for _ in range(9)]
        assert sum(len(found.starts) for found in encode_blocks(blocks, Encoder(tiny_tokenizer()), 3)) == 9
    finally:
        signal.signal(signal.SIGHUP, before)


def _is_hung_up(*task: Any) -> parallel._Found:
    os.kill(os.getpid(), signal.SIGHUP)
    return WORK(*task)


def test_a_lost_process_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASK", 10)
    monkeypatch.setattr(parallel, "_work", _dies)
    with pytest.raises(UserError, match="a worker process ended"):
        list(encode_blocks([Block("a", "some words of text") for _ in range(50)], Encoder(tiny_tokenizer()), 2))


def test_processes_end_by_themselves_behind_their_last_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASK", 10)
    close, codes = parallel._Pool.close, []

    def closed(self: parallel._Pool) -> None:
        for worker in self._workers:
            worker.process.join(20)
            codes.append(worker.process.exitcode)
        close(self)

    monkeypatch.setattr(parallel._Pool, "close", closed)
    list(encode_blocks([Block("a", "some words of text") for _ in range(50)], Encoder(tiny_tokenizer()), 3))
    assert codes == [0, 0]


def _dies(*task: Any) -> parallel._Found:
    os._exit(9)


def test_what_fails_elsewhere_fails_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only mistakes of the user: no other process' failure is lost."""
    monkeypatch.setattr(tasks, "TASK", 10)
    encode, here = Encoder.encode, os.getpid()

    def fails(self: Encoder, *given: Any) -> tasks.Encoded:
        if os.getpid() != here:
            raise MemoryError("no room")
        return encode(self, *given)

    monkeypatch.setattr(Encoder, "encode", fails)
    with pytest.raises(MemoryError, match="no room"):
        list(encode_blocks([Block("a", "some words of text") for _ in range(50)], Encoder(tiny_tokenizer()), 2))


# The command with tasks that take three seconds, so that none of it ends before it is ended.
SLOW = """
import sys, time
from telechat_twins.core.cli import main
from telechat_twins.core.data.encoders.tasks import Encoder
encode = Encoder.encode
Encoder.encode = lambda *given: time.sleep(3) or encode(*given)
sys.exit(main(["data", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_end_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group, as from a terminal; a kill only the command, whose others then end themselves."""
    text = write_rows(tmp_path / "long.jsonl", [{"text": "The quick brown fox.\n" * 200}] * 1500)
    words = [str(text), "--tokenizer", str(tiny_tokenizer_path()), "--out", str(tmp_path / "out"), "--threads", "3"]
    command = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words, "--quiet"],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    others: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while len(others) < 2:
        assert command.poll() is None and time.monotonic() < deadline
        others = psutil.Process(command.pid).children(recursive=True)
        time.sleep(0.01)
    (os.killpg if number == signal.SIGINT else os.kill)(command.pid, number)
    _, said = command.communicate(timeout=60)
    _, alive = psutil.wait_procs(others, timeout=30)
    assert not alive
    assert command.returncode == (-number if number == signal.SIGKILL else 130)
    assert "Traceback" not in said
    if number != signal.SIGKILL:
        assert [path.name for path in tmp_path.iterdir()] == ["long.jsonl"]


ENCODES = """
import resource, sys
from telechat_twins.core.data.encoders import words
from telechat_twins.core.data.tokenizer import load_tokenizer
words._KEPT = int(sys.argv[2]) or words._KEPT
tokenizer, faults = load_tokenizer(sys.argv[1]), []
for _ in range(9):
    tokenizer.encode_batch(["The quick brown fox. \\n" * 24_000])
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[3])
"""


@pytest.mark.parametrize("kept", [0, 1])
def test_the_arrays_of_a_task_lie_where_those_of_the_last_one_lay(kept):
    """And with too small an array freed before them (1) they do not: each is mapped anew."""
    words = [sys.executable, "-c", ENCODES, str(tiny_tokenizer_path()), str(kept)]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (int(found.stdout) < 5000) == (kept == 0)
