"""Data sets of tasks from a local folder, in place of the Hugging Face hub: clusters are offline.

    DIR/<dataset path>/<dataset name>/<split>.jsonl     e.g. DIR/allenai/ai2_arc/ARC-Challenge/test.jsonl
    DIR/<dataset path>/<split>.jsonl                    for a data set without a name

    DIR/evaluate-metric/<metric>/<metric>.py            a metric of the hub that a task loads, such as code_eval

Other places and forms of a split: core.eval.local_files. Fields are those of the data set on the hub; what does not
have them is refused with file, line and field.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.data.forms.formats import CSV, TSV, known_form
from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.local_files import ALIKE, Placed, find_splits, read_records
from telechat_twins.core.eval.schemas import check_rows, converted
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    import datasets

LOADERS = ("json", "csv", "parquet", "text", "arrow")  # of datasets: such a task names its own files


class LocalSets:
    """Data sets that have been read, by which a row is found again that a task cannot use."""

    def __init__(self) -> None:
        self._splits: list[tuple[datasets.Dataset, list[str]]] = []
        self._notes: set[str] = set()

    def note(self, text: str) -> None:
        """Print a note, once."""
        if text not in self._notes:
            self._notes.add(text)
            print(f"note: {text}", file=sys.stderr)

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
    files = find_splits(folder, path, name)
    return _splits(files, folder / path / name if name else folder / path, path, name, sets or LocalSets())


def _splits(
    files: dict[str, list[Path]], place: Path, path: str, name: str | None, sets: LocalSets
) -> datasets.DatasetDict:
    """The splits, each checked when a task first takes it: a published test split may lack its answers."""
    import datasets

    rows = {split: [row for one in some for row in read_records(one, sets.note)] for split, some in files.items()}
    for some in rows.values():
        check_fields(some)

    class Splits(datasets.DatasetDict):
        def __getitem__(self, key: str) -> datasets.Dataset:
            if key not in self:
                other = next((other for other in ALIKE.get(key, ()) if other in self), None)
                if other is None:
                    raise UserError(f"{place}: has no split '{key}', which the task needs; there are {', '.join(self)}")
                sets.note(f"{place}: the split '{other}' is read as '{key}'")
                return self[other]
            if key in rows:
                check_rows(rows[key], path, name)
                sets.add(super().__getitem__(key), [where for where, _ in rows.pop(key)])
            return super().__getitem__(key)

    def split(key: str) -> datasets.Dataset:
        if all((form := known_form(file)) is not None and form.name in (CSV, TSV) for file in files[key]):
            rows[key] = [(where, converted(row, path, name)) for where, row in rows[key]]
        try:
            return datasets.Dataset.from_list([row for _, row in rows[key]])
        except (ValueError, TypeError) as error:  # pyarrow's are subclasses: a column of several types
            raise UserError(_mixed(rows[key]) or f"{files[key][0]}: {str(error)[:200]}") from None

    return Splits({key: split(key) for key in files})


def check_fields(rows: list[Placed]) -> None:
    """UserError for the first row that has other fields than the first: in a table its value would be null, and a task
    would write "None" into its question."""
    first_place, first = rows[0]
    for where, row in rows:
        if row.keys() != first.keys():
            field = next(iter([*(first.keys() - row.keys()), *(row.keys() - first.keys())]))
            what = f"lacks the field '{field}', which {first_place} has" if field in first else f"has a field '{field}'"
            raise UserError(f"{where}: {what}; every row must have the fields of the first, null where one is empty")


def _mixed(rows: list[Placed]) -> str | None:
    """The first field with values of two types, with the row where the second appears."""
    seen: dict[str, tuple[type, str]] = {}
    for where, row in rows:
        for name, value in row.items():
            before, place = seen.setdefault(name, (type(value), where))
            if value is not None and before is not type(None) and type(value) is not before:
                return (
                    f"{where}: {name}: must have one type in all rows, found {type(value).__name__} here and "
                    f"{before.__name__} in {place}"
                )
            if before is type(None):
                seen[name] = type(value), where
    return None
