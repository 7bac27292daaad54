"""Reading of records, which may come from anywhere: every size, name and number is checked before it is used."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import lines as read_lines
from telechat_twins.core.files.foreign import load_json, open_regular, parse_json, read_file
from telechat_twins.core.files.safetensors import SafetensorsFile, file_sha256
from telechat_twins.core.model.config import PRECISIONS
from telechat_twins.core.parity.record.blocks import grid_with
from telechat_twins.core.parity.record.format import (
    BLOCKS,
    COLUMNS,
    DTYPES,
    FORMAT,
    FULL,
    HEADER,
    KINDS,
    MAX_BYTES,
    READABLE,
    SKETCHES,
    TABLE,
    TRACE,
    Header,
    Quantity,
    Record,
)
from telechat_twins.core.parity.record.sketch import BUCKETS, LEAST_BUCKETS, matrix_shape
from telechat_twins.core.shown import shown
from telechat_twins.core.train.metrics import LONGEST_ROW
from telechat_twins.core.types import JsonObject

_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_LAYER = re.compile(r"layers\.\d{1,9}\.")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONGEST_NAME, _MOST_AXES, _MOST = 200, 8, 1 << 62
_ENTRY_KEYS = {"kind", "name", "step", "shape", "dtype"}
_AGAIN = "take the record again, or copy it again"


def is_record(path: str | Path) -> bool:
    """Whether a folder has a record's header."""
    return (Path(path) / HEADER).is_file()


def open_record(path: str | Path) -> Record:
    """The record in a folder; all of it but the full tensors is read and checked.

    Raises UserError, one line with the file's name, for anything that is missing, truncated, altered, of another
    version of the format, or not possible.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}; expected a record's folder, as `tele parity record` writes it")
    tree = load_json(folder / HEADER, "the header of a record")
    if tree.get("format") != FORMAT:
        raise UserError(
            f"{folder / HEADER}: format must be '{FORMAT}', found {shown(tree.get('format'))}; not a record"
        )
    if type(tree.get("version")) is not int or tree["version"] not in READABLE:
        wanted = " or ".join(map(str, READABLE))
        raise UserError(
            f"{folder / HEADER}: version must be {wanted}, found {shown(tree.get('version'))}; read it with the "
            "version of this program that wrote it, or take it again"
        )
    header = _header(tree, folder / HEADER)
    _check_files(folder, tree.get("files"))
    table = _table(folder / TABLE, header)
    quantities = _quantities(folder / SKETCHES, table, header, tree["version"])
    shapes = {}
    if (folder / FULL).exists():
        shapes = {key: info.shape for key, info in SafetensorsFile(folder / FULL).tensors.items()}
        for key, shape in shapes.items():
            if key not in quantities or quantities[key].shape != shape:
                raise UserError(
                    f"{folder / FULL}: {shown(key)} of shape {shape} is not a quantity of the record; {_AGAIN}"
                )
    return Record(header, _trace(folder / TRACE), quantities, folder, shapes)


def read_full(record: Record, key: str) -> np.ndarray:
    """A full tensor of a record, by its quantity's key; UserError where the record does not hold it, or altered."""
    if record.path is None or key not in record.full:
        raise UserError(f"{record.path}: does not hold '{key}' in full; record it with --full")
    try:
        state = os.stat(record.path / FULL)
    except OSError as error:
        raise UserError(f"{record.path / FULL}: cannot be read ({error.strerror}); {_AGAIN}") from None
    _check_full(record.path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return SafetensorsFile(record.path / FULL).read(key)


@functools.lru_cache(maxsize=16)
def _check_full(folder: Path, *state: int) -> None:
    """Check the file of full tensors once for each ``state``, which a change of the file changes: it may be large."""
    tree = load_json(folder / HEADER, "the header of a record")
    _check_size(folder / FULL, tree["files"][FULL])
    _check_hash(folder / FULL, tree["files"][FULL])


def _header(tree: JsonObject, where: Path) -> Header:
    """The fields of the header, each of its own type."""
    fields = {f.name: f for f in dataclasses.fields(Header)}
    for key in tree:
        if key not in fields and key not in ("format", "version", "files"):
            raise UserError(f"{where}: unknown key {shown(key)}; {_AGAIN}")
    hints = typing.get_type_hints(Header)
    values: JsonObject = {}
    for name in fields:
        if name not in tree:
            raise UserError(f"{where}: {name} is missing; {_AGAIN}")
        if not _is_of(tree[name], hints[name]):
            raise UserError(
                f"{where}: {name}: must be of type {_said(hints[name])}, found {shown(tree[name])}; {_AGAIN}"
            )
        values[name] = tree[name]
    header = Header(**values)
    buckets = header.buckets
    rules = {
        "backend": (header.backend in ("ms", "pt"), "ms or pt"),
        "precision": (header.precision in PRECISIONS, " or ".join(PRECISIONS)),
        "buckets": (
            LEAST_BUCKETS <= buckets <= BUCKETS and buckets & (buckets - 1) == 0,
            f"a power of two from {LEAST_BUCKETS} to {BUCKETS}",
        ),
        "seed": (0 <= header.seed < _MOST, "a natural number"),
        "rows": (0 < header.rows < _MOST, "a positive number"),
        "seq_len": (0 < header.seq_len < _MOST, "a positive number"),
        "steps": (_rising(header.steps), "whole numbers from 1, each above the last"),
        "digests": (
            all(_DIGEST.fullmatch(header.digests.get(key, "")) for key in ("weights", "batch", "config")),
            "64 hexadecimal digits for each of weights, batch and config",
        ),
    }
    for name, (holds, wanted) in rules.items():
        if not holds:
            raise UserError(f"{where}: {name}: must be {wanted}, found {shown(tree[name])}; {_AGAIN}")
    model = header.config.get("model")
    if not isinstance(model, dict) or type(model.get("num_layers")) is not int:
        raise UserError(f"{where}: config: must hold the model with its num_layers, found {shown(model)}; {_AGAIN}")
    return header


def _rising(steps: list[int]) -> bool:
    return bool(steps) and steps[0] > 0 and all(a < b for a, b in zip(steps, steps[1:], strict=False))


def _is_of(value: object, hint: object) -> bool:
    """Whether a parsed value is of a header field's type: str, int, float, None, dict and list of these."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and (inner[1] is typing.Any or all(_is_of(v, inner[1]) for v in value.values()))
    if inner:
        return any(_is_of(value, one) for one in inner)
    if hint is float:
        return type(value) in (int, float) and abs(typing.cast(float, value)) < math.inf
    return type(value) is hint


def _said(hint: object) -> str:
    return str(getattr(hint, "__name__", hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")


def _check_files(folder: Path, files: object) -> None:
    """Every listed file is there as it was written, and no other."""
    where = folder / HEADER
    names = {TRACE, TABLE, SKETCHES}
    if not isinstance(files, dict) or not names <= set(files) <= names | {FULL}:
        raise UserError(f"{where}: files: must list {', '.join(sorted(names))} and at most {FULL}; {_AGAIN}")
    for name, entry in files.items():
        if (
            not isinstance(entry, dict)
            or set(entry) != {"bytes", "sha256"}
            or type(entry["bytes"]) is not int
            or not isinstance(entry["sha256"], str)
            or not _DIGEST.fullmatch(entry["sha256"])
        ):
            raise UserError(f"{where}: files: {name}: must have bytes and sha256, found {shown(entry)}; {_AGAIN}")
        _check_size(folder / name, entry)
    # Before any is read, which takes as long as it is large.
    if (total := sum(files[name]["bytes"] for name in names)) > MAX_BYTES:
        raise UserError(f"{where}: files: must have at most {MAX_BYTES} bytes in all, found {total}; {_AGAIN}")
    for name in sorted(names):
        _check_hash(folder / name, files[name])
    if FULL not in files and (folder / FULL).exists():
        raise UserError(f"{folder / FULL}: is not listed in {HEADER}; {_AGAIN}")


def _check_size(path: Path, entry: JsonObject) -> None:
    with open_regular(path, f"no such file; {HEADER} lists it") as file:
        size = os.fstat(file.fileno()).st_size
    if size != entry["bytes"]:
        raise UserError(f"{path}: must have {entry['bytes']} bytes, found {size}: truncated or altered; {_AGAIN}")


def _check_hash(path: Path, entry: JsonObject) -> None:
    if file_sha256(path) != entry["sha256"]:
        raise UserError(f"{path}: does not have the SHA-256 of {HEADER}: altered after it was written; {_AGAIN}")


Entry = tuple[str, str, int, tuple[int, ...], str]  # kind, name, step, shape, dtype


def _table(path: Path, header: Header) -> list[Entry]:
    try:
        tree = parse_json(read_file(path, MAX_BYTES))
    except ValueError as error:
        raise UserError(f"{path}: damaged, not a table of quantities ({error}); {_AGAIN}") from None
    rows = tree.get("quantities")
    if set(tree) != {"quantities"} or not isinstance(rows, list):
        raise UserError(f"{path}: must hold the list 'quantities' and nothing else; {_AGAIN}")
    steps, table = set(header.steps), list[Entry]()
    for number, row in enumerate(rows):
        fault = _entry_fault(row, steps)
        if fault:
            raise UserError(f"{path}: quantities[{number}]: {fault}; {_AGAIN}")
        table.append((row["kind"], row["name"], row["step"], tuple(row["shape"]), row["dtype"]))
    _check_sizes(table, path.with_name(HEADER), header)
    return table


def _check_sizes(table: Sequence[Entry], where: Path, header: Header) -> None:
    """The sizes in the header are those of the first step's quantities; later steps may have other lengths."""
    first = [entry for entry in table if entry[2] == header.steps[0]]
    for kind, name, _, shape, _ in first:
        if kind.startswith("activation") and shape and shape[:2] != (header.rows, header.seq_len):
            raise UserError(
                f"{where}: rows and seq_len: must be those of {kind}:{name} {list(shape)}, found "
                f"{header.rows} and {header.seq_len}; {_AGAIN}"
            )
    layers = {int(name.split(".")[1]) for _, name, *_ in first if _LAYER.match(name)}
    wanted = max(layers, default=-1) + 1
    if layers and (found := header.config["model"]["num_layers"]) != wanted:
        raise UserError(
            f"{where}: config: model.num_layers: must be the quantities' {wanted}, found {shown(found)}; {_AGAIN}"
        )


@functools.lru_cache(maxsize=1 << 14)
def _is_name(name: str) -> bool:
    """Whether a text, of bounded length, is a logical name: each comes back for several kinds and records."""
    return _NAME.fullmatch(name) is not None


def _entry_fault(row: object, steps: set[int]) -> str | None:
    """What is wrong with one row of the table."""
    if not isinstance(row, dict) or row.keys() != _ENTRY_KEYS:
        return f"must have kind, name, step, shape and dtype, found {shown(row)}"
    kind, name, step, shape, dtype = row["kind"], row["name"], row["step"], row["shape"], row["dtype"]
    if kind not in KINDS:
        return f"kind: must be one of {', '.join(KINDS)}, found {shown(kind)}"
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not _is_name(name):
        return f"name: must be a logical name such as layers.0.attn.q, found {shown(name)}"
    if type(step) is not int or step not in steps:
        return f"step: must be one of the record's steps, found {shown(step)}"
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_AXES
        or not all(map(_is_size, shape))
        or math.prod(shape) >= _MOST
    ):
        return f"shape: must be at most {_MOST_AXES} positive numbers, found {shown(shape)}"
    if dtype not in DTYPES:
        return f"dtype: must be one of {', '.join(DTYPES)}, found {shown(dtype)}"
    return None


def _is_size(number: object) -> bool:
    return type(number) is int and 0 < number < _MOST


def _quantities(path: Path, table: list[Entry], header: Header, version: int) -> dict[str, Quantity]:
    file, count = SafetensorsFile(path), len(table)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {name: (code, (count,)) for name, code in COLUMNS.items()}
    wanted["sketch"] = ("F64", (count, header.buckets))
    if version > 1:
        number = file.tensors["blocks"].shape[:1] if "blocks" in file.tensors else ()
        wanted |= {**dict.fromkeys(BLOCKS, ("I64", (count,))), "blocks": ("F32", number)}
    if set(file.tensors) != set(wanted):
        raise UserError(f"{path}: must hold {', '.join(wanted)}, found {shown(sorted(file.tensors))}; {_AGAIN}")
    for name, (code, shape) in wanted.items():
        info = file.tensors[name]
        if (info.code, info.shape) != (code, shape):
            raise UserError(
                f"{path}: {name} must be {code} {list(shape)}, found {info.code} {list(info.shape)}; {_AGAIN}"
            )
    columns = {name: file.read(name) for name in wanted}
    for name, array in columns.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} must be finite everywhere; {_AGAIN}")
    blocks = _blocks(path, table, columns) if version > 1 else [None] * count
    quantities: dict[str, Quantity] = {}
    statistics = zip(*(columns[name].tolist() for name in COLUMNS), strict=True)  # in the order of Quantity's fields
    for entry, (size, nonfinite, norm2, total, least, largest), sketch, parts in zip(
        table, statistics, columns["sketch"], blocks, strict=True
    ):
        row = Quantity(*entry, size, nonfinite, norm2, total, least, largest, sketch, parts)
        if (
            row.count != math.prod(row.shape)
            or not 0 <= row.nonfinite <= row.count
            or row.norm2 < 0
            or row.min > row.max
        ):
            raise UserError(
                f"{path}: the statistics of {row.key} are not those of a tensor of {list(row.shape)}; {_AGAIN}"
            )
        if row.key in quantities:
            raise UserError(f"{path}: {row.key} stands twice in {TABLE}; {_AGAIN}")
        quantities[row.key] = row
    return quantities


def _blocks(path: Path, table: list[Entry], columns: dict[str, np.ndarray]) -> list[np.ndarray | None]:
    """The block sums of each tensor, None without."""
    found, first, sums = list[np.ndarray | None](), 0, columns["blocks"]
    for entry, *shape in zip(table, *(columns[name].tolist() for name in BLOCKS), strict=True):
        if shape == [0, 0]:
            found.append(None)
            continue
        last = first + max(0, shape[0]) * max(0, shape[1])
        if not first < last <= len(sums) or grid_with(matrix_shape(entry[3]), shape) is None:
            raise UserError(f"{path}: {entry[1]} of {list(entry[3])} cannot have {shape} blocks; {_AGAIN}")
        found.append(sums[first:last].reshape(shape))
        first = last
    if first != len(sums):
        raise UserError(f"{path}: must hold the sums of {first} blocks, found {len(sums)}; {_AGAIN}")
    return found


def _trace(path: Path) -> list[JsonObject]:
    rows, last = [], 0
    with open_regular(path) as file:
        for number, line in enumerate(read_lines(file, path, LONGEST_ROW), 1):
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not a row of metrics ({error}); {_AGAIN}") from None
            step = row.get("step")
            if type(step) is not int or step <= last:
                raise UserError(
                    f"{path}:{number}: step must be a whole number above {last}, found {shown(step)}; {_AGAIN}"
                )
            for key in ("loss", "grad_norm", "lr"):
                if not _is_of(row.get(key), float | None):
                    raise UserError(
                        f"{path}:{number}: {key} must be a number or null, found {shown(row[key])}; {_AGAIN}"
                    )
            last = step
            rows.append(row)
    return rows
