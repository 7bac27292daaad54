"""Every form of file gives the same rows, in constant memory; what cannot be read is refused by file and line."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import json
import lzma
import random
import sys
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.data import rows as rows_module
from telechat_twins.core.data.dialogues import parse_dialogue
from telechat_twins.core.data.forms import json_items, long_rows
from telechat_twins.core.data.forms.find import find_inputs, skipped_inputs, total_bytes
from telechat_twins.core.data.forms.formats import SUFFIXES
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.packed import PackedDataset
from telechat_twins.core.data.prepare import pack_dialogues, pack_text
from telechat_twins.core.data.rows import read_documents, read_rows
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject
from tests.support.data_support import tiny_tokenizer, write_rows
from tests.unit.data.test_data_commands import tele_data

ROWS = [{"instruction": f"fox {n}\n\u4e2d\u56fd", "input": "", "output": f'say "{n}", dog'} for n in range(70)]
MESSAGES = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"city": "Paris"}}]},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "12 degrees", "weight": 0},
]


def jsonl(rows: list[JsonObject]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_csv(path: Path, rows: list[JsonObject], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)
    return path


def arrow() -> Any:
    return pytest.importorskip("pyarrow", reason="needs the extra data")


def save_to_disk(folder: Path, shards: list[list[JsonObject]], schema: Any = None, **state: object) -> Path:
    """A folder as ``save_to_disk`` of Hugging Face datasets leaves it: Arrow streams, and the state that names them."""
    pa = arrow()
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{n:05}-of-{len(shards):05}.arrow" for n in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        table = pa.Table.from_pylist(rows, schema=schema)
        with pa.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    facts = {"_data_files": [{"filename": name} for name in names], "_format_columns": None, **state}
    (folder / "state.json").write_text(json.dumps(facts))
    return folder


def rows_of(path: Path, encoding: str = "utf-8") -> list[JsonObject]:
    return [row for _, row in read_rows(path, None, encoding)]


def test_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    data = jsonl(ROWS)
    files = {
        "a.jsonl": data,
        "b.JSONL": b"\xef\xbb\xbf" + data,
        "c.Json": json.dumps(ROWS, indent=1).encode(),
        "d.jsonl.gz": gzip.compress(data[:100]) + gzip.compress(data[100:]),
        "e.ndjson.XZ": lzma.compress(data[:100]) + lzma.compress(data[100:]),
        "f.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
        "i.jsonl": b"\xef\xbb\xbf\r\n" + json.dumps(ROWS).encode(),
        "j.ndjson.gz": gzip.compress(b"\n".join(json.dumps(row, indent=1).encode() for row in ROWS)),
    }
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    write_csv(tmp_path / "g.csv", ROWS, encoding="utf-8-sig")
    write_csv(tmp_path / "h.TSV", ROWS, "\t")
    found = find_inputs([tmp_path])
    assert len(found) == 10 and skipped_inputs([tmp_path]) == []
    for path in found:
        seen = 0

        def count(size: int) -> None:
            nonlocal seen
            seen += size

        assert [row for _, row in read_rows(path, count)] == ROWS, path
        assert seen == path.stat().st_size == total_bytes([path])


def test_zstandard_frames(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs the extra data")
    packed = [zstandard.ZstdCompressor().compress(part) for part in (jsonl(ROWS)[:99], jsonl(ROWS)[99:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(packed))
    assert rows_of(tmp_path / "a.jsonl.zst") == ROWS
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(packed)[:-3])
    with pytest.raises(UserError, match=r"b.jsonl.zst: damaged or cut off, not a whole .zst file \(it ends inside"):
        rows_of(tmp_path / "b.jsonl.zst")


def test_parquet_and_saved_datasets(tmp_path: Path) -> None:
    pa = arrow()
    import pyarrow.parquet as parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=16)
    assert rows_of(tmp_path / "a.parquet") == ROWS
    assert [where for where, _ in read_rows(tmp_path / "a.parquet")][69] == f"{tmp_path / 'a.parquet'}: row 70"
    save_to_disk(tmp_path / "set" / "train", [ROWS[:40], ROWS[40:]])
    # Saving again with fewer shards leaves the files of the earlier save behind.
    (tmp_path / "set" / "train" / "data-00002-of-00003.arrow").write_bytes(b"older")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for given in (tmp_path / "set", tmp_path / "set" / "train", tmp_path):
        [*_, folder] = find_inputs([given])
        assert rows_of(folder) == ROWS and folder == tmp_path / "set" / "train"
    save_to_disk(tmp_path / "shown", [[{**row, "note": "x"} for row in ROWS]], _format_columns=[*ROWS[0]])
    assert rows_of(tmp_path / "shown") == ROWS
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"set: holds the splits train, test; name the folder of one, e.g. .*set/train"):
        find_inputs([tmp_path])
    with pytest.raises(UserError, match="flatten_indices"):
        rows_of(save_to_disk(tmp_path / "chosen", [ROWS], _indices_files=[{"filename": "i.arrow"}]))
    with pytest.raises(UserError, match="no such file, though state.json names it"):
        rows_of(save_to_disk(tmp_path / "chosen", [ROWS], _data_files=[{"filename": "gone.arrow"}]))


def test_what_columns_do_to_messages_is_undone(tmp_path: Path) -> None:
    pa = arrow()
    other = [{"role": "assistant", "tool_calls": [{"name": "g", "arguments": {"n": 1}}]}]
    plain = [{"messages": MESSAGES}, {"messages": [MESSAGES[0], *other]}]
    # One type a column: the second row's call would have a city, the first one's a number.
    as_structs = rows_of(save_to_disk(tmp_path / "structs", [plain]))
    assert [row["messages"] for row in as_structs] == [row["messages"] for row in plain]
    # The types of a file that was written with them: pyarrow itself cannot make nested ones from Python's objects.
    facts = {"ARROW:extension:name": "arrow.json", "ARROW:extension:metadata": ""}
    kind = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string(), metadata=facts)])
    mixed = [{"messages": [{"role": "user", "content": text} for text in ("12", '"12"', "true", '["a"]', '{"b": 1}')]}]
    [row] = rows_of(save_to_disk(tmp_path / "json", [mixed], pa.schema([("messages", pa.list_(kind))])))
    # datasets writes the text "12" as 12, so a bare number or truth value is the text that it was.
    assert [m["content"] for m in row["messages"]] == ["12", "12", "true", ["a"], {"b": 1}]
    item = pa.field("item", pa.string(), metadata=facts)
    whole = pa.schema([pa.field("messages", pa.list_(item)), pa.field("id", pa.string(), metadata=facts)])
    texts = [{"messages": [json.dumps(message) for message in MESSAGES], "id": "7"}]
    assert rows_of(save_to_disk(tmp_path / "whole", [texts], whole)) == [{"messages": MESSAGES, "id": 7}]
    dated = [{"text": datetime(2024, 1, 2), "date": datetime(2024, 1, 2)}]
    with pytest.raises(
        UserError, match=r"data-00000-of-00001.arrow: row 1: expected text in field 'text', found datetime"
    ):
        list(read_documents(save_to_disk(tmp_path / "dated", [dated])))


def test_maps_are_objects_and_what_json_cannot_say_is_refused(tmp_path: Path) -> None:
    """Arguments of calls that differ from row to row are maps in tables; NaN and dates are in no call."""
    pa, parquet = arrow(), pytest.importorskip("pyarrow.parquet")

    def calls(kind: Any, value: object, file: str) -> Path:
        call = pa.struct([("name", pa.string()), ("arguments", kind)])
        message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
        said = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": value}]}
        rows = pa.array([[{"role": "user", "content": "q", "tool_calls": None}, said]], pa.list_(message))
        parquet.write_table(pa.table({"messages": rows}), tmp_path / file)
        return tmp_path / file

    [row] = rows_of(calls(pa.map_(pa.string(), pa.string()), [("city", "x")], "a.parquet"))
    assert row["messages"][1]["tool_calls"][0]["arguments"] == {"city": "x"}
    for kind, value, says in (
        (pa.float64(), float("nan"), "is nan, which is no number in JSON"),
        (pa.timestamp("us"), datetime(2024, 1, 2), "is of type datetime .*, which JSON cannot say"),
        (pa.binary(), b"x", "is of type bytes, which JSON cannot say"),
    ):
        [(where, row)] = read_rows(calls(pa.struct([("a", kind)]), {"a": value}, "b.parquet"))
        with pytest.raises(UserError, match=rf"b.parquet: row 1: 'messages\[1\].tool_calls\[0\].arguments.a' {says}"):
            parse_dialogue(row, where)
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["query", "response", "response"])
    parquet.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(UserError, match="c.parquet: row 1 or below: two columns are named 'response'"):
        rows_of(tmp_path / "c.parquet")


def test_tables_are_packed_like_lines(tmp_path: Path) -> None:
    rows = [
        {"messages": MESSAGES, "system": "be kind"},
        {"messages": MESSAGES[:1] + [{"role": "assistant", "content": "a"}]},
    ]
    flat = [{"messages": json.dumps(row["messages"]), "system": row.get("system", "")} for row in rows]
    sources = [write_rows(tmp_path / "a.jsonl", rows), write_csv(tmp_path / "b.csv", flat)]
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(rows)))
    sources.append(tmp_path / "c.jsonl.gz")
    if "pyarrow" in sys.modules or __import__("importlib.util").util.find_spec("pyarrow"):
        sources.append(save_to_disk(tmp_path / "d", [rows]))
    seen = []
    for n, source in enumerate(sources):
        pack_dialogues([source], tmp_path / f"out{n}", tiny_tokenizer(), seq_len=500, quiet=True)
        data = PackedDataset(tmp_path / f"out{n}")
        assert data.mask is not None
        seen.append((data.tokens.tolist(), data.mask.tolist()))
    assert all(one == seen[0] for one in seen)
    # By number, as the published pipelines read: rows that do not lie in the file as JSON go through a copy.
    talks = [{"query": f"q {n}", "response": f"fox {n}", "system": "s"} for n in range(40)]
    sources = [write_rows(tmp_path / "t.jsonl", talks), write_csv(tmp_path / "t.csv", talks)]
    for variant in ("deepspeed", "mindformers"):
        streams = []
        for source in sources:
            out = tmp_path / f"{variant}{source.suffix}"
            pack_dialogues([source], out, tiny_tokenizer(), seq_len=150, variant=variant, quiet=True)
            streams.append(PackedDataset(out).tokens.tolist())
        assert streams[0] == streams[1]


# ---- encodings


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "utf-16", "utf-16-le", "utf-8-sig"])
def test_other_encodings(encoding: str, tmp_path: Path) -> None:
    rows = [{"text": f'\u4e2d\u570b {n} {{[\\"'} for n in range(30)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows).decode().encode(encoding))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(rows, ensure_ascii=False).encode(encoding)))
    (tmp_path / "c.txt").write_bytes("\u4e2d\u570b\n".encode(encoding))
    write_csv(tmp_path / "d.csv", rows, encoding=encoding)
    for name in ("a.jsonl", "b.json.gz", "d.csv"):
        assert rows_of(tmp_path / name, encoding) == rows
    assert [block.text for block in read_documents(tmp_path / "c.txt", encoding=encoding)] == ["\u4e2d\u570b\n"]


def test_bytes_of_another_encoding_are_named_by_line(tmp_path: Path) -> None:
    chinese = jsonl([{"text": "fox"}, {"text": "\u4e2d\u56fd"}]).decode()
    (tmp_path / "a.jsonl").write_bytes(chinese.encode("gb18030"))
    (tmp_path / "b.csv").write_bytes("text\nfox\n\u4e2d\u56fd\n".encode("gb18030"))
    (tmp_path / "c.jsonl").write_bytes(chinese.encode("utf-16"))
    (tmp_path / "d.txt").write_bytes("fox\nfox\n".encode("utf-16-le"))
    (tmp_path / "e.jsonl").write_bytes(chinese.encode())
    (tmp_path / "f.jsonl").write_bytes(gzip.compress(chinese.encode()))
    (tmp_path / "g.jsonl").write_bytes(chinese.encode("utf-32"))
    (tmp_path / "h.jsonl").write_bytes('{"text": "fox"}\n'.encode("utf-16-le"))
    for name, says in (
        ("a.jsonl", r"a.jsonl:2: not UTF-8; name the file's encoding, e.g. --encoding gb18030"),
        ("b.csv", r"b.csv:3: not UTF-8; name"),
        ("c.jsonl", r"c.jsonl:1: not UTF-8 but utf-16; add --encoding utf-16"),
        ("d.txt", r"d.txt:1: a zero byte, so not a text; is it UTF-16\?"),
        ("g.jsonl", r"g.jsonl:1: not UTF-8 but utf-32; add --encoding utf-32"),
        ("h.jsonl", r"h.jsonl:1: a zero byte, so not UTF-8 text; is it UTF-16\?"),
        ("f.jsonl", r"f.jsonl:1: not a text; its first bytes are those of gzip \(.gz\)"),
    ):
        with pytest.raises(UserError, match=says):
            tele_data(tmp_path / name, "--out", tmp_path / "out")
    with pytest.raises(UserError, match=r"e.jsonl:2: not ascii \(ordinal not in range"):
        tele_data(tmp_path / "e.jsonl", "--out", tmp_path / "out", "--encoding", "ascii")
    for name in ("klingon", "rot13", "base64"):
        with pytest.raises(UserError, match=f"--encoding: '{name}' is not a text encoding"):
            tele_data(tmp_path / "e.jsonl", "--out", tmp_path / "out", "--encoding", name)
    assert tele_data(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--encoding", "gb18030") == 0


# ---- damaged files and tables


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_files_that_are_cut_off_are_refused(suffix: str, tmp_path: Path) -> None:
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(jsonl(ROWS))[:-9])
    with pytest.raises(UserError, match=rf"a.jsonl{suffix}: damaged or cut off, not a whole {suffix} file"):
        rows_of(tmp_path / f"a.jsonl{suffix}")


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.idx"]
)
def test_what_git_lfs_did_not_fetch_is_no_data(name: str, tmp_path: Path) -> None:
    """A .txt would be packed as the text of the pointer."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"
    for file in {name, name.replace(".idx", ".bin")}:
        (tmp_path / file).write_text(pointer)
    with pytest.raises(UserError, match=rf"{name.replace('.', '[.]')}: is a pointer of Git LFS"):
        tele_data(tmp_path / name, "--out", tmp_path / "out")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_an_empty_compressed_file_is_no_file_without_rows(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a.jsonl{suffix}").touch()
    for on_bytes in (None, lambda _: None):
        with pytest.raises(UserError, match=rf"not a whole {suffix} file \(it is empty\)"):
            list(read_rows(tmp_path / f"a.jsonl{suffix}", on_bytes))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("text,id\nfox,1\nfox\n", ":3: 1 cells under 2 names"),
        ("text,id\nfox, dog,1\n", ":2: 3 cells under 2 names; quote cells that hold the separator"),
        ('text,id\n"fox\n\n"",1\n', ":4: not a table (unexpected end of data)"),
        ('text\nfox\n"fox" dog\n', ":3: not a table (',' expected after '\"')"),
        ("text,text\nfox,1\n", ":1: two columns are named 'text'"),
        ("text,,id\na,b,c\n", ":1: column 2 has no name"),
        ("text;id\nfox;1\n", ":1: one column, named 'text;id'; cells are separated by commas"),
        ('text, id\n"fox, dog", 1\n', ":1: a space behind each separator"),
        ("text,note\nfox,1\n", ":2: key 'note' is not read"),
        ('text\n"fox\nfox"\n\nfox\n"a" b\n', ":6: not a table"),
    ],
)
def test_tables_that_are_none_are_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError) as error:
        list(read_documents(tmp_path / "a.csv", reading=Reading()))
    assert f"a.csv{says}" in str(error.value)


def test_a_missing_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("a.parquet", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"x" * 50)
        with pytest.raises(UserError, match=rf"{name}: is read with .* not installed .*'telechat-twins\[data\]'"):
            rows_of(tmp_path / name)


# ---- Megatron's token files


def write_megatron(path: Path, documents: list[list[list[int]]], code: int = 8, dtype: str = "<u2") -> Path:
    """``documents`` of sequences of ids, as Megatron's preprocessing writes them."""
    sequences = [np.asarray(sequence, dtype) for document in documents for sequence in document]
    path.with_suffix(".bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    sizes = np.asarray([len(sequence) for sequence in sequences], "<i4")
    offsets = np.cumsum([0, *(sequence.nbytes for sequence in sequences)])[:-1].astype("<i8")
    bounds = np.cumsum([0, *map(len, documents)]).astype("<i8")
    head = b"MMIDIDX\x00\x00" + np.uint64(1).tobytes() + bytes([code])
    counts = np.asarray([len(sequences), len(bounds)], "<u8").tobytes()
    path.with_suffix(".idx").write_bytes(head + counts + sizes.tobytes() + offsets.tobytes() + bounds.tobytes())
    return path


def test_token_files_are_taken_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    write_megatron(folder / "a.idx", [[[30, 31], [32, 2]], [], [[40, 41, 42]]])
    write_megatron(folder / "b.idx", [[[50, 2]]], 4, "<i4")
    (folder / "weights.bin").write_bytes(b"x")
    for given in ([folder], [folder / "a.bin", folder / "b.idx"], [folder / "a", folder / "b"]):
        assert [path.name for path in find_inputs(given)] == ["a.idx", "b.idx"]
    assert tele_data(folder, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert "1 of their documents do not end with <_end>" in shown.out and "weights.bin (neither text nor" in shown.err
    data = PackedDataset(tmp_path / "out")
    assert data.tokens.tolist() == [30, 31, 32, 2, 40, 41, 42, 50, 2] and data.documents.tolist() == [0, 4, 7, 9]
    write_megatron(folder / "a.idx", [[[30, 900]]])
    for words, says in (
        ([], r"a.bin: document 1: token id 900 is outside the vocabulary of 600"),
        (["--bos"], "leave --bos out"),
    ):
        with pytest.raises(UserError, match=says):
            tele_data(folder / "a.idx", "--out", tmp_path / "out2", *words)
    (folder / "a.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a.idx: damaged, or not the index of a.bin \(1 bytes\)"):
        tele_data(folder / "a.idx", "--out", tmp_path / "out2")
    index = write_megatron(folder / "a.idx", [[[30, 31]], [[32, 2]]], 4, "<i4").read_bytes()
    with (folder / "a.bin").open("ab") as file:
        file.write(bytes(8))
    assert tele_data(folder / "a.idx", "--out", tmp_path / "out3") == 0
    assert f"note: {folder}/a.idx: names 16 of the 24 bytes of a.bin" in capsys.readouterr().err
    (folder / "a.idx").write_bytes(index[:50] + b"\x06" + index[51:])  # the second offset, which was 8
    with pytest.raises(UserError, match=r"a.idx: damaged, or not the index of a.bin \(24 bytes\)"):
        tele_data(folder / "a.idx", "--out", tmp_path / "out2")
    (folder / "a.idx").write_bytes(b"TNTIDX\x00\x00" + b"0" * 40)
    with pytest.raises(UserError, match="fairseq's older layout"):
        tele_data(folder / "a.idx", "--out", tmp_path / "out2")


# ---- memory


def test_memory_is_constant_in_every_form(tmp_path: Path) -> None:
    """Twice the rows in no more memory, for rows of 80 KB."""
    zstandard = pytest.importorskip("zstandard", reason="needs the extra data")
    peaks: dict[str, list[int]] = {}
    for copies in (40, 80):
        draw = random.Random(0)
        rows = [{"query": f"\u4e2d {draw.randbytes(40000).hex()}", "response": "dog " * 500} for _ in range(copies)]
        data, folder = jsonl(rows), tmp_path / str(copies)
        folder.mkdir()
        (folder / "a.json").write_bytes(json.dumps(rows).encode())
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(data))
        (folder / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
        (folder / "d.jsonl").write_bytes(data.decode().encode("gb18030"))
        write_csv(folder / "e.csv", rows)
        for path in sorted(folder.iterdir()):
            encoding = "gb18030" if path.name == "d.jsonl" else "utf-8"
            tracemalloc.start()
            assert sum(1 for _ in read_rows(path, None, encoding)) == copies
            peaks.setdefault(path.name, []).append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert all(large < small + 100_000 for small, large in peaks.values()), peaks


def test_suffixes_are_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [suffix for suffix in SUFFIXES if suffix not in page] == []


def test_long_documents_of_every_form_encode_alike(tmp_path: Path) -> None:
    text = "The quick brown fox.\n\u4e2d\u56fd\u7535\u4fe1 " * 9000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.txt").write_bytes(text.encode("gb18030"))
    streams = []
    for name, encoding in (("a.txt", "utf-8"), ("b.txt.gz", "utf-8"), ("c.txt", "gb18030")):
        out = tmp_path / f"out-{name}"
        pack_text([tmp_path / name], out, tiny_tokenizer(), encoding=encoding, quiet=True)
        streams.append(PackedDataset(out).tokens.tolist())
    assert streams[0] == streams[1] == streams[2]


# ---- rows that are longer than what is held


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json"])
def test_long_documents_are_read_in_parts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_rows, "PART_BYTES", 64)
    monkeypatch.setattr(long_rows, "_MOST", 256)
    monkeypatch.setattr(json_items, "BLOCK_BYTES", 61)
    draw = random.Random(0)
    pieces = ("fox ", "\n", "\\", '"', "\u4e2d", "\U0001f608", "\t", "{[", "\\n", "\x01")
    for trial in range(60):
        rows = []
        for n in range(draw.randint(1, 4)):
            text = "".join(draw.choices(pieces if draw.random() < 0.7 else pieces[2:], k=draw.choice((3, 400, 900))))
            rows.append(dict(draw.sample([("id", n), ("text", text), ("meta", {"a": [1, "}"]})], 3)))
        dumped = [json.dumps(row, ensure_ascii=draw.random() < 0.5) for row in rows]
        whole = {"a.jsonl": "\n".join(dumped), "a.json": f"[{', '.join(dumped)} ]", "b.json": " ".join(dumped)}[name]
        (tmp_path / name).write_text(whole, encoding="utf-8")
        texts: list[str] = []
        reading, parts = Reading(), 0
        with monkeypatch.context() as patch:
            patch.setattr(rows_module, "document_rows", functools.partial(long_rows.document_rows, limit=200))
            for block in read_documents(tmp_path / name, reading=reading):
                texts += [block.text] if block.first else []
                if not block.first:
                    texts[-1] += block.text
                    parts += 1
        assert texts == [row["text"] for row in rows], trial
        assert reading.left_out <= {"id", "meta"} and reading.kinds == {"text": len(rows)}
        assert parts > 0 or all(len(one) < 400 for one in dumped)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"text": "LONG', "1: not valid JSON (the file ends inside a text)"),
        ('{"text": "LONG"', "1: not valid JSON (expected a comma or a brace"),
        ('{"text": "LONG", "note": "x"}', "1: key 'note' is not read"),
        ('{"text": "LONG", "text": "x"}', "1: not valid JSON (key 'text' appears twice)"),
        ('{"text": "LONG",}', "1: not valid JSON (expected a key"),
        ('{"text": "LONG"} {}', "1: not valid JSON (more behind the object of this line)"),
        ('{"text": "LONG\\ud800"}', "1: not valid JSON (an unpaired surrogate"),
        ('{"text": "LONG\t"}', "1: not valid JSON (Invalid control character"),
        ('{"id": "LONG", "txt": 1}', "1: expected text in field 'text'; keys found: id, txt"),
        ('{"id": "LONGLONG"}', "1: a row of more than"),
        ('["LONG"]', "1: item 1: expected a JSON object"),
    ],
)
def test_long_rows_that_are_none_are_refused(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "document_rows", functools.partial(long_rows.document_rows, limit=404))
    (tmp_path / "a.jsonl").write_text(text.replace("LONG", "fox " * 100))
    with pytest.raises(UserError) as error:
        list(read_documents(tmp_path / "a.jsonl"))
    assert f"a.jsonl:{says}" in str(error.value)


def test_a_long_row_takes_constant_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_rows, "PART_BYTES", 1 << 17)
    monkeypatch.setattr(json_items, "BLOCK_BYTES", 1 << 17)
    monkeypatch.setattr(rows_module, "document_rows", functools.partial(long_rows.document_rows, limit=1 << 19))
    text, peaks = "The quick brown fox jumps over the lazy dog.\n" * 12_000, []
    for copies in (2, 6):
        (tmp_path / "a.json").write_text(json.dumps([{"text": text * copies, "id": 1}]))
        tracemalloc.start()
        assert sum(len(block.text) for block in read_documents(tmp_path / "a.json")) == copies * len(text)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000, peaks


def test_empty_texts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "fox"}, {"text": ""}, {"text": " "}, {"text": ""}]
    for source in (
        write_rows(tmp_path / "a.jsonl", rows),
        write_csv(tmp_path / "a.csv", [{**r, "id": 1} for r in rows]),
    ):
        assert tele_data(source, "--out", tmp_path / "out", "--force") == 0
        said = capsys.readouterr().out
        assert f"look at: 2 texts are empty, and no documents (first: {source}:" in said and "2 documents" in said


def test_a_folder_is_searched_for_rows_where_rows_are_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows(folder / "a.jsonl", ROWS)
    (folder / "README.md").write_text("A card.")
    write_megatron(folder / "b.idx", [[[1]]])
    assert tele_data(folder, "--out", tmp_path / "out", "--sft", "plain", "--seq-len", "2048") == 0
    said = capsys.readouterr()
    assert "README.md, b.bin, b.idx (no rows); read: 1" in said.err and "70 rows" in said.out
    with pytest.raises(UserError, match=r"README.md: dialogues are read from files of rows"):
        tele_data(folder / "README.md", "--out", tmp_path / "out", "--sft", "plain", "--seq-len", "2048", "--force")
