"""Rows of Arrow tables: .parquet files, and folders that ``save_to_disk`` of Hugging Face datasets wrote.

What such columns do to a row, and what is made of it here:

- Members that are absent in one row are null there, because a column has one type; so null members of nested objects
  are left out. A null that a tool call's argument really had cannot be told from them.
- Columns of mixed types hold JSON text (extension type ``arrow.json``), also deep inside of others; it is parsed. There
  datasets stores the text "12" as 12: a number or a truth value that is a message's text is given back as written.
- A map is an object; datasets and other tools store them where keys differ from row to row.
- Columns of dates hold timestamps; these stay objects that no reader takes for text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from telechat_twins.core.data.forms.formats import STATE
from telechat_twins.core.data.forms.streams import OnBytes, RowAt, damage_of, missing, require_fetched
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import load_json, parse_value
from telechat_twins.core.shown import printable
from telechat_twins.core.types import JsonObject

_TEXTS = ("content", "value", "text")
_ROWS = 16  # that become Python objects at a time
_BUFFER = 1 << 20
_DAMAGED = (OSError, KeyError, ValueError, OverflowError)  # what else the library raises where bytes were altered


def parquet_rows(path: Path, on_bytes: OnBytes | None = None) -> Iterator[RowAt]:
    """("file: row n", row) of a .parquet file, n from 1. Memory does not grow with it."""
    arrow, _, parquet = _arrow(path)
    require_fetched(path)
    number, reported, size = 0, 0, path.stat().st_size
    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            total = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in _rows(batch, arrow, f"{path}: row {number + 1} or below"):
                    number += 1
                    yield f"{path}: row {number}", row
                if on_bytes:
                    on_bytes(size * number // total - reported)
                    reported = size * number // total
    except (arrow.ArrowException, *_DAMAGED) as error:
        raise UserError(f"{path}: damaged, or not a Parquet file ({damage_of(error)})") from None


def dataset_rows(folder: Path, on_bytes: OnBytes | None = None) -> Iterator[RowAt]:
    """("file: row n", row) of the files that a saved dataset's state.json names, n from 1 in each."""
    arrow, ipc, _ = _arrow(folder)
    files, columns = _state(folder)
    for path in files:
        require_fetched(path)
        number = 0
        try:
            with arrow.memory_map(str(path)) as mapped, _opened(ipc, mapped) as batches:
                for batch in batches:
                    kept = batch.select(columns) if columns is not None else batch
                    for begin in range(0, kept.num_rows, _ROWS):
                        part = kept.slice(begin, _ROWS)
                        for row in _rows(part, arrow, f"{path}: row {number + 1} or below"):
                            number += 1
                            yield f"{path}: row {number}", row
        except (arrow.ArrowException, *_DAMAGED) as error:
            raise UserError(f"{path}: damaged, or not of this dataset ({damage_of(error)})") from None
        if on_bytes:
            on_bytes(path.stat().st_size)


def dataset_files(folder: Path) -> list[Path]:
    """The files that hold a saved dataset's rows, by its state.json: files of an earlier save may lie beside them."""
    return _state(folder)[0]


def _arrow(path: Path) -> tuple[Any, Any, Any]:
    """pyarrow, its streams, its Parquet reader; UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise missing("pyarrow", path, error) from None
    return pyarrow, pyarrow.ipc, pyarrow.parquet


def _state(folder: Path) -> tuple[list[Path], list[str] | None]:
    """(files, the columns it was saved to show, or None for all)."""
    state: JsonObject = load_json(folder / STATE, "a saved dataset's state")
    again = "save the dataset again with save_to_disk"
    entries = state.get("_data_files")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{folder / STATE}: names no files ('_data_files'); {again}")
    for key in ("_indices_data_files", "_indices_files"):
        if state.get(key):
            raise UserError(f"{folder / STATE}: rows are chosen by '{key}'; call flatten_indices() and {again}")
    files = []
    for entry in entries:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{folder / STATE}: '_data_files' does not name files of this folder; {again}")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file, though {STATE} names it; {again}")
        files.append(folder / name)
    columns = state.get("_format_columns")
    return files, columns if isinstance(columns, list) and not state.get("_output_all_columns") else None


def _opened(ipc: Any, mapped: Any) -> Any:
    """Batches of a stream, which datasets writes, or of Arrow's file form."""
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    if not is_file:
        return ipc.open_stream(mapped)
    return _Batches(ipc.open_file(mapped))


class _Batches:
    """The batches of Arrow's file form, one after another like those of a stream."""

    def __init__(self, file: Any):
        self._file = file

    def __enter__(self) -> Iterator[Any]:
        return (self._file.get_batch(n) for n in range(self._file.num_record_batches))

    def __exit__(self, *_: object) -> None:
        return None


def _rows(batch: Any, arrow: Any, where: str) -> list[JsonObject]:
    fields = [(field.name, field.type, _holds_json(field.type, arrow)) for field in batch.schema]
    if twice := [name for name in batch.schema.names if batch.schema.names.count(name) > 1]:
        raise UserError(f"{where}: two columns are named '{printable(twice[0], 80)}'; rename one")
    batch.validate(full=True)  # offsets and text of altered files, on which the library would otherwise rely
    rows: list[JsonObject] = batch.to_pylist(maps_as_pydicts="strict")
    for row in rows:
        for name, kind, mixed in fields:
            row[name] = _plain(row[name], name, kind if mixed else None, where)
    return rows


def _holds_json(kind: Any, arrow: Any) -> bool:
    if isinstance(kind, arrow.JsonType):
        return True
    return any(_holds_json(kind.field(n).type, arrow) for n in range(kind.num_fields))


def _plain(value: object, key: str, kind: Any, where: str) -> object:
    """A value of Arrow's as JSON would have it; ``kind`` is its type where JSON text is somewhere in it."""
    if value is None:
        return None
    if isinstance(value, dict):
        members = {}
        for name, member in value.items():
            if member is not None:
                members[name] = _plain(member, name, _member_type(kind, name), where)
        return members
    if isinstance(value, list):
        inner = kind.value_type if kind is not None else None
        return [_plain(member, key, inner, where) for member in value]
    if kind is not None and getattr(kind, "extension_name", "") == "arrow.json":
        parsed = _parsed(str(value), where)
        return value if key in _TEXTS and isinstance(parsed, int | float) else parsed
    return value


def _member_type(kind: Any, name: str) -> Any:
    """The type of a member of a struct, or of a map, whose members all have one."""
    if kind is None:
        return None
    return kind.item_type if hasattr(kind, "item_type") else kind.field(name).type


def _parsed(value: str, where: str) -> object:
    try:
        return parse_value(value.encode())
    except json.JSONDecodeError:
        return value  # a text that datasets found no JSON in, stored as it is
    except ValueError as error:
        raise UserError(f"{where}: a column of JSON holds what is not JSON ({error})") from None
