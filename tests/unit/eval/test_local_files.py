"""Which files of a folder are which split, as people copy and name them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.local_files import find_splits, read_records

ROW = {"q": "x", "n": 1}


def put(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / "mine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        data = b"q,n\nx,1\n" if ".csv" in name else json.dumps(ROW).encode() + b"\n"
        file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


@pytest.mark.parametrize(
    ("names", "config", "found"),
    [
        (["test.jsonl", "train.csv"], None, {"test": ["test.jsonl"], "train": ["train.csv"]}),
        (["test.JSONL.gz", "README.md", "dataset_infos.json"], None, {"test": ["test.JSONL.gz"]}),
        (["one/test.jsonl", "two/test.jsonl"], "two", {"test": ["two/test.jsonl"]}),
        # A copy of the hub's repository.
        (["data/test-00000-of-00001.jsonl"], None, {"test": ["data/test-00000-of-00001.jsonl"]}),
        (["only/test-00000-of-00001.jsonl", ".cache/x.jsonl"], None, {"test": ["only/test-00000-of-00001.jsonl"]}),
        (
            ["one/test-00001-of-00002.jsonl", "one/test-00000-of-00002.jsonl"],
            "one",
            {"test": ["one/test-00000-of-00002.jsonl", "one/test-00001-of-00002.jsonl"]},
        ),
        # An archive, as C-Eval and CMMLU have them.
        (["dev/law_dev.csv", "val/law_val.csv"], "law", {"val": ["val/law_val.csv"], "dev": ["dev/law_dev.csv"]}),
        (["test/law.csv", "test/lawful.csv"], "law", {"test": ["test/law.csv"]}),
    ],
)
def test_splits_are_found_where_people_put_them(
    tmp_path: Path, names: list[str], config: str | None, found: dict[str, list[str]]
) -> None:
    put(tmp_path, *names)
    splits = find_splits(tmp_path, "mine", config)
    assert {key: [str(file.relative_to(tmp_path / "mine")) for file in some] for key, some in splits.items()} == found
    for some in splits.values():
        for file in some:
            ((_, row),) = read_records(file)
            assert row == ({"q": "x", "n": "1"} if file.suffix == ".csv" else ROW)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test.csv", "test.jsonl"], "the split 'test' is claimed by several files (test.csv, test.jsonl)"),
        (["test-00000-of-00002.jsonl"], "the split 'test' is not there with all its shards (test-00000-of-00002"),
        (["test.xlsx"], "has no split (it has test.xlsx); put <split>.jsonl there"),
        (["one/test.jsonl", "two/test.jsonl"], "has no split (it has one, two)"),
    ],
)
def test_what_is_no_split_is_named(tmp_path: Path, names: list[str], message: str) -> None:
    put(tmp_path, *names)
    with pytest.raises(UserError) as caught:
        find_splits(tmp_path, "mine", None)
    assert message in str(caught.value)


def test_other_encodings_are_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_bytes("q,n\n中文,1\n".encode("gb18030"))
    with pytest.raises(UserError, match="test.csv:2: not UTF-8; convert it to UTF-8$"):
        read_records(tmp_path / "test.csv")


def test_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([ROW, ROW])
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "mine"))
    rows.save_to_disk(str(tmp_path / "other" / "val"))
    rows.save_to_disk(str(tmp_path / "bare"))
    for path, split in (("mine", "test"), ("other", "val")):
        ((found, (file,)),) = find_splits(tmp_path, path, None).items()
        assert found == split and [row for _, row in read_records(file)] == [ROW, ROW]
    with pytest.raises(UserError, match="is one saved data set, without the name of its split; move it to .*<split>"):
        find_splits(tmp_path, "bare", None)


@pytest.mark.parametrize("name", ["test.json", "test.json.gz"])
def test_rows_under_a_key_of_the_file_are_read(tmp_path: Path, name: str) -> None:
    """As SQuAD and BIG-bench Hard have them, with other keys beside."""
    file, notes = tmp_path / name, []
    held = {"canary": "c", "version": "1.1", "tags": ["a"], "examples": [ROW, ROW | {"n": 2}]}
    data = json.dumps(held, indent=1).encode()
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [row["n"] for _, row in read_records(file, note=notes.append)] == [1, 2]
    assert notes == [f"{file}: the rows are those under its key 'examples'"]
    assert read_records(file)[1][0] == f"{file}:{data[: data.rindex(b'{')].count(10) + 1}: item 2"


def test_an_object_that_is_a_row_stays_one(tmp_path: Path) -> None:
    """One of plain values; one whose other keys a task may need, with a list of objects; a line."""
    parts = {"story": "s", "questions": [{"q": "a"}, {"q": "b"}]}
    for name, row, said in (
        ("plain.json", ROW, []),
        ("lists.json", {"q": "x", "choices": ["a", "b"]}, []),
        ("known.json", {"key": 1, "prompt": "x", "kwargs": [{"a": 1}]}, ["key, prompt, kwargs); if 'kwargs' holds"]),
        ("parts.json", parts, ["is read as one row (story, questions); if 'questions' holds the rows, write that"]),
        ("line.jsonl", {"data": [ROW]}, []),
    ):
        notes: list[str] = []
        (tmp_path / name).write_text(json.dumps(row))
        assert [found for _, found in read_records(tmp_path / name, notes.append)] == [row]
        assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes, strict=True))
    (tmp_path / "two.json").write_text(json.dumps({"data": [ROW]}) + "\n" + json.dumps({"data": [ROW]}))
    assert len(read_records(tmp_path / "two.json")) == 2
    (tmp_path / "one.json").write_text(json.dumps([{"choices": ["a", "b"]}]))
    assert len(read_records(tmp_path / "one.json")) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"train": [ROW], "test": [ROW]},
            r"test.json: lists of objects under 'train' and 'test'; write the one that holds the rows alone",
        ),
        (
            {"q": {"0": "x"}, "n": {"0": 1}},
            r"test.json:1: item 1: is one object, and none of its keys \(q, n\) holds the rows, a list of objects",
        ),
        ({"data": []}, r"none of its keys \(data\) holds the rows, a list of objects"),
        ({"data": [ROW, 3]}, r"test.json:1: item 2: expected a JSON object, found int"),
    ],
)
def test_objects_without_one_list_of_rows_are_refused(tmp_path: Path, value: object, message: str) -> None:
    (tmp_path / "test.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        read_records(tmp_path / "test.json")
