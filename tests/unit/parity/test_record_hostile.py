"""Records as others may hand them over, beyond test_record_files.py: refused in one line that names the file."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.parity.compare.records import compare_records
from telechat_twins.core.parity.record.read import open_record
from tests.support.records import synthetic_record
from tests.unit.parity.test_record_files import Change, columns, header, put, signed, table

DEEP = 5000  # levels of nesting


def link(name: str, target: str) -> Change:
    """The file replaced by a symbolic link."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.symlink(target, folder / name)

    return apply


def text(name: str, content: bytes) -> Change:
    """The file's content replaced, with its hash in the header."""
    return signed(name, lambda path: path.write_bytes(content) and None)


def raw(content: bytes) -> Change:
    """The header's content replaced."""
    return lambda folder: (folder / "record.json").write_bytes(content) and None


def spliced(old: bytes, new: bytes) -> Change:
    """A text in the header replaced, as no writer of JSON would do it."""
    return lambda folder: (
        (folder / "record.json").write_bytes((folder / "record.json").read_bytes().replace(old, new, 1)) and None
    )


def head_of(change: Any) -> Change:
    """The JSON head of the sketches' safetensors file changed."""

    def apply(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        tree = json.loads(data[8 : 8 + length])
        change(tree)
        head = json.dumps(tree).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])

    return signed("sketches.safetensors", apply)


def row(**changes: Any) -> Change:
    return table(lambda rows: rows[0].update(changes))


def fields(**changes: Any) -> Change:
    return header(lambda tree: tree.update(changes))


def layers_of(number: int) -> Change:
    return header(lambda tree: tree["config"]["model"].update(num_layers=number))


def grown(name: str) -> Change:
    """A file of six gigabytes that takes no room, stated in the header: to be refused before it is read."""

    def apply(folder: Path) -> None:
        os.truncate(folder / name, 6 << 30)
        header(lambda tree: tree["files"][name].update(bytes=6 << 30))(folder)

    return apply


SKETCHES, TABLE, TRACE = "sketches.safetensors", "quantities.json", "trace.jsonl"
CASES: dict[str, tuple[Change, str]] = {
    "header empty": (raw(b""), "record.json"),
    "header a list": (raw(b"[]"), "record.json"),
    "header of null bytes": (raw(b"\0" * 4096), "record.json"),
    "header in UTF-16": (lambda f: raw((f / "record.json").read_text().encode("utf-16"))(f), "record.json"),
    "header with a second object": (lambda f: raw((f / "record.json").read_bytes() * 2)(f), "record.json"),
    "header nested": (raw(b'{"format": ' + b"[" * DEEP), "record.json"),
    "config nested": (spliced(b'"config": {', b'"config": {"x": ' + b"[" * DEEP + b"]" * DEEP + b","), "record.json"),
    "header of one key twice": (spliced(b'"rows"', b'"rows": 1, "rows"'), "record.json"),
    "version as text": (fields(version="3"), "version must be"),
    "version true": (fields(version=True), "version must be"),
    "version 1.0": (fields(version=1.0), "version must be"),
    "version 0": (fields(version=0), "version must be"),
    "version of 5,000 digits": (spliced(b'"version": 3', b'"version": 3' + b"0" * 5000), "record.json"),
    "format a list": (fields(format=["tele-record"]), "format must be"),
    "loss not a number": (spliced(b'"loss": ', b'"loss": NaN, "x": '), "record.json"),
    "loss beyond every number": (spliced(b'"loss": ', b'"loss": 1e999, "x": '), "record.json"),
    "seed negative": (fields(seed=-1), "seed: must be"),
    "seed beyond 64 bits": (fields(seed=1 << 70), "seed: must be"),
    "rows zero": (fields(rows=0), "rows: must be"),
    "rows true": (fields(rows=True), "rows: must be"),
    "seq_len a fraction": (fields(seq_len=16.5), "seq_len: must be"),
    "steps empty": (fields(steps=[]), "steps: must be"),
    "steps of text": (fields(steps=["1"]), "steps: must be"),
    "backend of another": (fields(backend="jax"), "backend: must be"),
    "precision of another": (fields(precision="fp8"), "precision: must be"),
    "digests a list": (fields(digests=[]), "digests: must be"),
    "digest in capitals": (header(lambda t: t["digests"].update(batch="A" * 64)), "digests: must be"),
    "versions of numbers": (fields(versions={"python": 3.11}), "versions: must be"),
    "notes of numbers": (fields(notes=[1]), "notes: must be"),
    "buckets negative": (fields(buckets=-256), "buckets: must be"),
    "files a list": (fields(files=[]), "files: must list"),
    "size negative": (header(lambda t: t["files"][TABLE].update(bytes=-1)), "quantities.json"),
    "hash in capitals": (
        header(lambda t: t["files"][TABLE].update(sha256=t["files"][TABLE]["sha256"].upper() + "x")),
        "must have bytes and sha256",
    ),
    "trace a link to a device": (link(TRACE, "/dev/zero"), "trace.jsonl"),
    "trace a link to nothing": (link(TRACE, "/nonexistent/x"), "trace.jsonl"),
    "header a link to itself": (link("record.json", "record.json"), "record.json"),
    "table a pipe": (lambda f: (f / TABLE).unlink() or os.mkfifo(f / TABLE), "quantities.json"),
    "table of nothing": (text(TABLE, b"{}"), "quantities.json"),
    "table not UTF-8": (text(TABLE, b'{"quantities": ["\xff\xfe"]}'), "quantities.json"),
    "table of a key twice": (text(TABLE, b'{"quantities": [], "quantities": []}'), "quantities.json"),
    "row nested": (text(TABLE, b'{"quantities": ' + b"[" * DEEP + b"]" * DEEP + b"}"), "quantities.json"),
    "row a number": (table(lambda rows: rows.__setitem__(0, 7)), "must have kind"),
    "row with a key more": (row(more=1), "must have kind"),
    "kind a list": (row(kind=["activation"]), "kind: must be one of"),
    "dtype an object": (row(dtype={}), "dtype: must be one of"),
    "name empty": (row(name=""), "logical name"),
    "name a number": (row(name=3), "logical name"),
    "name in another script": (row(name="layers.０.attn"), "logical name"),
    "name ending a line": (row(name="embed\n"), "logical name"),
    "step true": (row(step=True), "step: must be one of"),
    "shape of nine axes": (row(shape=[1] * 9), "shape: must be"),
    "shape with a zero": (row(shape=[0, 4]), "shape: must be"),
    "shape of fractions": (row(shape=[2.0, 4.0]), "shape: must be"),
    "shape of 4,000 digits": (row(shape=[int("9" * 4000)]), "4000 digits"),
    "minimum above maximum": (put("min", 1e300), "are not those"),
    "count negative": (put("count", -5), "are not those"),
    "blocks of no quantity": (put("block_rows", 3), "cannot have"),
    "blocks negative": (put("block_rows", -3), "cannot have"),
    "blocks of huge sides": (
        columns(lambda h: h["block_rows"].__setitem__(3, 1 << 62) or h["block_columns"].__setitem__(3, 1 << 62)),
        "cannot have",
    ),
    "blocks left over": (
        columns(lambda h: h.__setitem__("blocks", np.append(h["blocks"], np.float32(1)))),
        "must hold the sums",
    ),
    "sketch of a wide type": (
        columns(lambda h: h.__setitem__("sketch", h["sketch"].astype(np.float32))),
        "sketch must be F64",
    ),
    "sketches of 7 bytes": (text(SKETCHES, b"\x07\0\0\0\0\0\0"), "sketches.safetensors"),
    "sketches of a huge head": (text(SKETCHES, (1 << 62).to_bytes(8, "little") + b"{}"), "sketches.safetensors"),
    "sketches of a negative offset": (
        head_of(lambda t: t["count"].update(data_offsets=[-8, 0])),
        "sketches.safetensors",
    ),
    "sketches that overlap": (
        head_of(lambda t: t["sum"].update(data_offsets=t["norm2"]["data_offsets"])),
        "sketches.safetensors",
    ),
    "sketches of a huge shape": (
        head_of(lambda t: t["count"].update(shape=[1 << 62, 1 << 62])),
        "sketches.safetensors",
    ),
    "sketches of an unknown type": (head_of(lambda t: t["count"].update(dtype="I65")), "sketches.safetensors"),
    "table of six gigabytes": (grown(TABLE), "at most 32000000 bytes"),
    "sketches of six gigabytes": (grown(SKETCHES), "at most 32000000 bytes"),
    "a file outside": (header(lambda t: t["files"].update({"../x": t["files"][TRACE]})), "files: must list"),
    "config without a model": (header(lambda t: t["config"].pop("model")), "config: must hold the model"),
    "model a list": (header(lambda t: t["config"].update(model=[1])), "config: must hold the model"),
    "model of 10^12 layers": (layers_of(10**12), "num_layers: must be"),
    "model of a layer less": (layers_of(1), "num_layers: must be"),
    "seq_len of another batch": (fields(seq_len=10**15), "rows and seq_len: must be"),
    "rows of another batch": (fields(rows=10**15), "rows and seq_len: must be"),
    "sketch not a number": (columns(lambda h: h["sketch"].__setitem__((3, 0), np.nan)), "sketch must be finite"),
    "sum of squares negative": (put("norm2", -1.0), "are not those"),
    "blocks of 2^40 rows": (columns(lambda h: h["block_rows"].__setitem__(3, 1 << 40)), "cannot have"),
    "trace of steps that fall": (text(TRACE, b'{"step": 2}\n{"step": 1}\n'), "trace.jsonl:2"),
    "trace of a loss in quotes": (text(TRACE, b'{"step": 1, "loss": "1.0"}\n'), "trace.jsonl:1"),
    "trace of numbers that are none": (text(TRACE, b'{"step": 1, "loss": NaN}\n'), "trace.jsonl:1"),
    "trace of a step true": (text(TRACE, b'{"step": true}\n'), "trace.jsonl:1"),
    "trace of one endless row": (text(TRACE, b'{"step": 1, "x": "' + b"a" * (1 << 21) + b'"}\n'), "trace.jsonl"),
    "trace nested": (text(TRACE, b'{"step": 1, "x": ' + b"[" * DEEP + b"]" * DEEP + b"}\n"), "trace.jsonl:1"),
    "trace of a loss beyond every number": (text(TRACE, b'{"step": 1, "loss": 1e999}\n'), "trace.jsonl:1"),
    "trace of a key twice": (text(TRACE, b'{"step": 1, "step": 2}\n'), "trace.jsonl:1"),
    "trace of a huge step": (text(TRACE, b'{"step": ' + b"9" * 5000 + b"}\n"), "trace.jsonl:1"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("record") / "record"
    synthetic_record(path)
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_record_is_refused_in_one_line(written: Path, tmp_path: Path, name: str) -> None:
    change, message = CASES[name]
    folder = tmp_path / "record"
    shutil.copytree(written, folder)
    change(folder)
    started = time.process_time()
    with pytest.raises(UserError) as refusal:
        compare_records(open_record(folder), open_record(written), None)
    assert time.process_time() - started < 2.0
    said = str(refusal.value)
    assert message in said and "\n" not in said and said.isprintable() and len(said) < 2000
