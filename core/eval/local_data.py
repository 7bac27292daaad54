"""Data sets of tasks from a local folder, in place of the Hugging Face hub: clusters are offline.

    DIR/<dataset path>/<dataset name>/<split>.jsonl     e.g. DIR/allenai/ai2_arc/ARC-Challenge/test.jsonl
    DIR/<dataset path>/<split>.jsonl                    for a data set without a name

A split may also be .json (a list of objects), .csv or .parquet. Fields are those of the data set on the hub.
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
from telechat_twins.core.files.foreign import read_text
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
MAX_BYTES = 1 << 31


@contextlib.contextmanager
def local_data(folder: Path | None) -> Iterator[None]:
    """While active, ``datasets.load_dataset`` reads below ``folder``; None changes nothing."""
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder")
    import datasets

    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **_: object) -> datasets.DatasetDict:
        return load_folder(folder, path, name)

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def load_folder(folder: Path, path: str, name: str | None) -> datasets.DatasetDict:
    """The splits of one data set. UserError names the folder where they are expected."""
    import datasets

    if Path(path).is_absolute() or ".." in Path(path).parts or ".." in Path(name or "").parts:
        raise UserError(f"dataset_path: '{path}' must be a name below --data {folder}")
    place = folder / path / name if name else folder / path
    files = sorted(file for file in place.glob("*") if file.suffix in SUFFIXES) if place.is_dir() else []
    if not files:
        raise UserError(f"{place}: has no split; put <split>.jsonl there, with the fields of the data set '{path}'")
    return _Splits({file.stem: datasets.Dataset.from_list(read_records(file)) for file in files}, place)


def _Splits(found: dict[str, datasets.Dataset], place: Path) -> datasets.DatasetDict:  # noqa: N802 (makes a class's instance)
    import datasets

    class Splits(datasets.DatasetDict):
        def __getitem__(self, key: str) -> datasets.Dataset:
            if key not in self:
                raise UserError(f"{place}: has no split '{key}', which the task needs; there are {', '.join(self)}")
            return super().__getitem__(key)

    return Splits(found)


def read_records(file: Path) -> list[JsonObject]:
    """The rows of a file. UserError names file and line of what is not a row with the fields of the first."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(file).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a Parquet file ({str(error)[:100]})") from None
    text = read_text(file, MAX_BYTES)
    if file.suffix == ".csv":
        return [dict(row) for row in csv.DictReader(io.StringIO(text))]
    rows: list[JsonObject] = []
    lines = [text] if file.suffix == ".json" else text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON ({error})") from None
        for row in found if file.suffix == ".json" and isinstance(found, list) else [found]:
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number}: expected an object, found {type(row).__name__}")
            rows.append(row)
    if not rows:
        raise UserError(f"{file}: has no row")
    return rows
