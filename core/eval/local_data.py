"""Data sets of tasks from a local folder, in place of the Hugging Face hub: clusters are offline.

    DIR/<dataset path>/<dataset name>/<split>.jsonl     e.g. DIR/allenai/ai2_arc/ARC-Challenge/test.jsonl
    DIR/<dataset path>/<split>.jsonl                    for a data set without a name

    DIR/evaluate-metric/<metric>/<metric>.py            a metric of the hub that a task loads, such as code_eval

A split may also be .json (a list of objects), .csv or .parquet. Fields are those of the data set on the hub; what does
not have them is refused with file, line and field.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.schemas import check_rows, converted
from telechat_twins.core.files.foreign import read_text
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
LOADERS = ("json", "csv", "parquet", "text", "arrow")  # of datasets: such a task names its own files
MAX_BYTES = 1 << 31
Placed = tuple[str, JsonObject]  # file and line of a row, and the row


class LocalSets:
    """Data sets that have been read, by which a row is found again that a task cannot use."""

    def __init__(self) -> None:
        self._splits: list[tuple[datasets.Dataset, list[str]]] = []

    def add(self, split: datasets.Dataset, places: list[str]) -> None:
        self._splits.append((split, places))

    def place_of(self, doc: JsonObject) -> str | None:
        """File and line of a row; None where none is equal to ``doc``."""
        for split, places in self._splits:
            if set(split.column_names) <= doc.keys():
                for number, row in enumerate(split):
                    if all(doc[name] == value for name, value in row.items()):
                        return places[number]
        return None


@contextlib.contextmanager
def local_data(folder: Path | None) -> Iterator[LocalSets]:
    """While active, ``datasets.load_dataset`` reads below ``folder``; None changes nothing."""
    sets = LocalSets()
    if folder is None:
        yield sets
        return
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder")
    import datasets
    import evaluate

    load_dataset, load_metric = datasets.load_dataset, evaluate.load

    def load(path: str, name: str | None = None, **options: object) -> datasets.DatasetDict:
        if path in LOADERS:
            return load_dataset(path, name, **options)
        return load_folder(folder, path, name, sets)

    def metric(name: str, *args: object, **options: object) -> object:
        local = folder / "evaluate-metric" / name
        return load_metric(str(local) if local.is_dir() else name, *args, **options)

    datasets.load_dataset, evaluate.load = load, metric
    try:
        yield sets
    finally:
        datasets.load_dataset, evaluate.load = load_dataset, load_metric


def load_folder(folder: Path, path: str, name: str | None, sets: LocalSets | None = None) -> datasets.DatasetDict:
    """The splits of one data set. UserError names the folder where they are expected."""
    if Path(path).is_absolute() or ".." in Path(path).parts or ".." in Path(name or "").parts:
        raise UserError(f"dataset_path: '{path}' must be a name below --data {folder}")
    place = folder / path / name if name else folder / path
    files = sorted(file for file in place.glob("*") if file.suffix in SUFFIXES) if place.is_dir() else []
    if not files:
        raise UserError(f"{place}: has no split; put <split>.jsonl there, with the fields of the data set '{path}'")
    return _splits(files, place, path, name, sets or LocalSets())


def _splits(files: list[Path], place: Path, path: str, name: str | None, sets: LocalSets) -> datasets.DatasetDict:
    """The splits, each checked when a task first takes it: a published test split may lack its answers."""
    import datasets

    rows = {file.stem: read_records(file) for file in files}
    for one in rows.values():
        check_fields(one)
    by_name = {file.stem: file for file in files}

    class Splits(datasets.DatasetDict):
        def __getitem__(self, key: str) -> datasets.Dataset:
            if key not in self:
                raise UserError(f"{place}: has no split '{key}', which the task needs; there are {', '.join(self)}")
            if key in rows:
                check_rows(rows[key], path, name)
                sets.add(super().__getitem__(key), [where for where, _ in rows.pop(key)])
            return super().__getitem__(key)

    def split(key: str) -> datasets.Dataset:
        if by_name[key].suffix == ".csv":
            rows[key] = [(where, converted(row, path, name)) for where, row in rows[key]]
        try:
            return datasets.Dataset.from_list([row for _, row in rows[key]])
        except (ValueError, TypeError) as error:  # pyarrow's are subclasses: a column of several types
            raise UserError(f"{by_name[key]}: {_mixed(rows[key]) or str(error)[:200]}") from None

    return Splits({key: split(key) for key in by_name})


def read_records(file: Path) -> list[Placed]:
    """The rows of a file with their places. UserError names file and line of what is not a row."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        try:
            found = pyarrow.parquet.read_table(file).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a Parquet file ({str(error)[:100]})") from None
        return [(f"{file}: row {number}", row) for number, row in enumerate(found, 1)]
    text = read_text(file, MAX_BYTES)
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        rows: list[Placed] = [(f"{file}:{reader.line_num}", dict(row)) for row in reader]
    else:
        rows = list(_json_rows(file, text))
    if not rows:
        raise UserError(f"{file}: has no row")
    return rows


def check_fields(rows: list[Placed]) -> None:
    """UserError for the first row that has other fields than the first: in a table its value would be null, and a task
    would write "None" into its question."""
    first_place, first = rows[0]
    for where, row in rows:
        if row.keys() != first.keys():
            field = next(iter([*(first.keys() - row.keys()), *(row.keys() - first.keys())]))
            what = f"lacks the field '{field}', which {first_place} has" if field in first else f"has a field '{field}'"
            raise UserError(f"{where}: {what}; every row must have the fields of the first, null where one is empty")


def _json_rows(file: Path, text: str) -> Iterator[Placed]:
    lines = [text] if file.suffix == ".json" else text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON ({error})") from None
        several = file.suffix == ".json" and isinstance(found, list)
        for place, row in enumerate(found if several else [found], 1):
            where = f"{file}: row {place}" if several else f"{file}:{number}"
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object, found {type(row).__name__}")
            yield where, row


def _mixed(rows: list[Placed]) -> str | None:
    """The first field with values of two types, with the row where the second appears."""
    seen: dict[str, tuple[type, str]] = {}
    for where, row in rows:
        for name, value in row.items():
            before, place = seen.setdefault(name, (type(value), where))
            if value is not None and before is not type(None) and type(value) is not before:
                line = where.rpartition(":")[2]
                return (
                    f"{line}: {name}: must have one type in all rows, found {type(value).__name__} here and "
                    f"{before.__name__} in {place}"
                )
            if before is type(None):
                seen[name] = type(value), where
    return None
