"""Quantities of one rank while a step runs, their exchange between ranks, and the checksums of weights and batch.

A rank adds the boxes that it holds. Of a quantity every element is added exactly once over all ranks: what several
ranks hold alike, one of them adds. Rank 0 then joins the ranks' shares in the order of ranks, and a quantity whose
elements do not add up to its shape is a defect of the layout's description (RuntimeError).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from telechat_twins.core.files.safetensors import SafetensorsFile
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.parity.record.format import COLUMNS, Quantity, quantity, quantity_key
from telechat_twins.core.parity.record.sketch import Statistics, matrix_shape
from telechat_twins.core.parity.record.window import Addend, Rows, Window, Windows, numbers_of

_TOGETHER = 1 << 24  # elements that are added in one call, if it has more than one tensor
_OPTIONAL = ("doc_ids", "weights", "reference")


@dataclass(frozen=True)
class Part:
    """Elements of a full tensor: ``array`` [n, m] at rows ``rows`` [n] of its matrix, from column ``column`` on."""

    array: np.ndarray
    rows: np.ndarray
    column: int


@dataclass
class Summands:
    """Elements of a quantity of which several ranks have one summand each; their statistics are those of the sum."""

    shape: tuple[int, ...]
    dtype: str
    parts: list[Part] = field(default_factory=list)


class _Box(NamedTuple):
    """Elements ``array`` [n, m] of the quantity ``key``, of the tensor ``name``, that are to be added."""

    key: str
    name: str
    dtype: str
    window: Window
    array: np.ndarray


@dataclass
class _Entry:
    shape: tuple[int, ...]
    dtype: str
    statistics: Statistics
    blocks: np.ndarray | None = None


@dataclass
class Tally:
    """What one rank recorded of one step. ``full``: glob patterns of the quantities whose tensors are kept whole, on
    their names (``layers.3.*``) or keys (``gradient:*``)."""

    step: int
    windows: Windows = field(default_factory=Windows)
    full: Sequence[str] = ()
    entries: dict[str, _Entry] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    summands: dict[str, Summands] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)  # of the weights, by name
    rows: dict[int, str] = field(default_factory=dict)  # digest of each row of the batch, by its number

    def add(
        self, kind: str, name: str, shape: Sequence[int], dtype: str, array: np.ndarray, rows: Rows, column: int
    ) -> None:
        """Add ``array`` [n, m]: rows ``rows`` of the matrix of a tensor of ``shape``, from column ``column`` on. Of
        weights before a step the checksums too."""
        self._add([self._box(kind, name, shape, dtype, array, rows, column)])

    def _box(
        self, kind: str, name: str, shape: Sequence[int], dtype: str, array: np.ndarray, rows: Rows, column: int
    ) -> _Box:
        key = quantity_key(kind, name, self.step)
        window = self.windows.of(kind, name, shape, rows, column, array.shape[1])
        if self.full and any(fnmatch.fnmatchcase(text, pattern) for pattern in self.full for text in (name, key)):
            self.parts.setdefault(key, []).append(Part(np.array(array), np.array(numbers_of(rows)), column))
        return _Box(key, name, dtype, window, array)

    def _add(self, boxes: Sequence[_Box]) -> None:
        """Add boxes of different quantities."""
        addends = [Addend(box.window, box.array, self._blocks(box)) for box in boxes]
        for box, addend, (found, check) in zip(boxes, addends, self.windows.add(addends), strict=True):
            if (entry := self.entries.get(box.key)) is None:
                self.entries[box.key] = _Entry(box.window.projection.shape, box.dtype, found, addend.blocks)
            else:
                entry.statistics.merge(found)
            if box.window.checked:
                self.checksums[box.name] = (self.checksums.get(box.name, 0) + check) % (1 << 64)

    def _blocks(self, box: _Box) -> np.ndarray | None:
        """What the block sums of a box are added to."""
        window, entry = box.window, self.entries.get(box.key)
        if window.grid is None:
            return None
        if entry is None:
            return window.new_blocks(box.array)
        if entry.blocks is not None and entry.blocks.dtype != window.sums_dtype:
            entry.blocks = entry.blocks.astype(np.float64, copy=False)
        return entry.blocks

    def add_summand(
        self, kind: str, name: str, shape: Sequence[int], dtype: str, array: np.ndarray, rows: Rows, column: int
    ) -> None:
        """As ``add``, of elements that are the sum of what several ranks add: kept until all have."""
        held = self.summands.setdefault(quantity_key(kind, name, self.step), Summands(tuple(shape), dtype))
        held.parts.append(Part(np.array(array), np.array(numbers_of(rows)), column))

    def forget(self, *kinds: str) -> None:
        """Drop what was added of these kinds."""
        for held in (self.entries, self.parts, self.summands):
            for key in [key for key in held if key.partition(":")[0] in kinds]:
                del held[key]

    def add_box(
        self, kind: str, name: str, shape: Sequence[int], array: np.ndarray, offset: Sequence[int], dtype: str = ""
    ) -> None:
        """Add the box of a parameter-like tensor that begins at ``offset``."""
        self.add_boxes([(kind, name, shape, array, offset, dtype)])

    def add_boxes(self, boxes: Iterable[tuple[str, str, Sequence[int], np.ndarray, Sequence[int], str]]) -> None:
        """As ``add_box`` of each, with few at a time in memory."""
        waiting, elements = dict[str, _Box](), 0
        for kind, name, shape, array, offset, dtype in boxes:
            columns, rows = array.shape[-1] if array.ndim else 1, _rows(shape, array.shape, offset)
            values, column = array.reshape(len(rows), columns), offset[-1] if offset else 0
            box = self._box(kind, name, shape, dtype or _dtype_name(array.dtype), values, rows, column)
            if box.key in waiting or elements + array.size > _TOGETHER:
                self._add(list(waiting.values()))
                waiting, elements = {}, 0
            waiting[box.key], elements = box, elements + array.size
        self._add(list(waiting.values()))

    def add_scalar(self, name: str, value: float) -> None:
        """Add the loss or the gradient norm, a float64."""
        self.add_box("activation", name, (), np.array(value, np.float64), ())

    def add_batch(self, batch: Batch, first: int) -> None:
        """Add the digests of a batch's rows, the first of which is number ``first`` of the global batch."""
        for number in range(len(batch.input_ids)):
            digest = hashlib.sha256()
            for name in ("input_ids", "targets", "positions", *_OPTIONAL):
                values = getattr(batch, name)
                if values is not None:
                    digest.update(name.encode() + np.ascontiguousarray(values[number]).tobytes())
            self.rows[first + number] = digest.hexdigest()


def _rows(whole: Sequence[int], shape: Sequence[int], offset: Sequence[int]) -> Rows:
    """Rows of the matrix of a tensor of shape ``whole`` that a box of ``shape`` at ``offset`` has."""
    rows: Rows = range(1)
    for start, n, size in zip(offset[:-1], shape[:-1], whole[:-1], strict=True):
        if isinstance(rows, range) and (len(rows) == 1 or (start, n) == (0, size)):
            rows = range(rows.start * size + start, (rows.stop - 1) * size + start + n)
        else:
            rows = (numbers_of(rows)[:, None] * size + np.arange(start, start + n)).reshape(-1)
    return rows


@cache
def _dtype_name(dtype: np.dtype) -> str:
    return dtype.name


def write_share(path: Path, tally: Tally) -> None:
    """A rank's part of a step's record in one file, for ``join_shares``."""
    from safetensors.numpy import save_file

    entries = list(tally.entries.items())
    kinds = {"I64": np.int64, "F64": np.float64}
    tensors = {
        name: np.array([getattr(entry.statistics, name) for _, entry in entries], kinds[code])
        for name, code in COLUMNS.items()
    }
    tensors["sketch"] = np.array([e.statistics.sketch for _, e in entries], np.float64).reshape(
        -1, tally.windows.buckets
    )
    for key, entry in entries:
        if entry.blocks is not None:
            tensors[f"blocks/{key}"] = entry.blocks
    for key, parts in tally.parts.items():
        for number, part in enumerate(parts):
            tensors[f"part/{number}/{key}"] = np.ascontiguousarray(part.array)
            tensors[f"rows/{number}/{key}"] = np.append(part.rows.astype(np.int64), part.column)
    for key, summands in tally.summands.items():
        for number, part in enumerate(summands.parts):
            tensors[f"summand/{number}/{key}"] = np.ascontiguousarray(part.array)
            tensors[f"places/{number}/{key}"] = np.append(part.rows.astype(np.int64), part.column)
    table = {
        "full": list(tally.full),
        "summands": {key: [list(s.shape), s.dtype, len(s.parts)] for key, s in tally.summands.items()},
        "entries": [[key, list(entry.shape), entry.dtype] for key, entry in entries],
        "parts": {key: len(parts) for key, parts in tally.parts.items()},
        "checksums": {name: str(value) for name, value in tally.checksums.items()},
        "rows": {str(number): digest for number, digest in tally.rows.items()},
    }
    beside = path.with_name(path.name + ".new")
    save_file(tensors, beside, {"table": json.dumps(table)})
    beside.replace(path)


def read_share(path: Path, step: int, buckets: int) -> Tally:
    """The tally that ``write_share`` kept."""
    file = SafetensorsFile(path)
    table = json.loads(file.metadata["table"])
    columns = {name: file.read(name) for name in (*COLUMNS, "sketch")}
    tally = Tally(step, Windows(buckets), full=table["full"])
    for number, (key, shape, dtype) in enumerate(table["entries"]):
        numbers = {name: columns[name][number].item() for name in COLUMNS}
        blocks = file.read(f"blocks/{key}") if f"blocks/{key}" in file.tensors else None
        tally.entries[key] = _Entry(tuple(shape), dtype, Statistics(columns["sketch"][number], **numbers), blocks)
    for key, count in table["parts"].items():
        held = [(file.read(f"part/{n}/{key}"), file.read(f"rows/{n}/{key}")) for n in range(count)]
        tally.parts[key] = [Part(array, rows[:-1], int(rows[-1])) for array, rows in held]
    for key, (shape, dtype, count) in table["summands"].items():
        held = [(file.read(f"summand/{n}/{key}"), file.read(f"places/{n}/{key}")) for n in range(count)]
        tally.summands[key] = Summands(tuple(shape), dtype, [Part(a, rows[:-1], int(rows[-1])) for a, rows in held])
    tally.checksums = {name: int(value) for name, value in table["checksums"].items()}
    tally.rows = {int(number): digest for number, digest in table["rows"].items()}
    return tally


def join_tallies(tallies: Sequence[Tally]) -> Tally:
    """All ranks' tallies of a step as one, added in the order of ranks."""
    if len(tallies) == 1 and not tallies[0].summands:
        return tallies[0]
    whole = Tally(tallies[0].step, tallies[0].windows, full=tallies[0].full)
    for tally in tallies:
        for key, entry in tally.entries.items():
            if (held := whole.entries.get(key)) is None:
                empty = Statistics(np.zeros(whole.windows.buckets))
                held = whole.entries[key] = _Entry(entry.shape, entry.dtype, empty)
            if (held.shape, held.dtype) != (entry.shape, entry.dtype):
                raise RuntimeError(
                    f"{key}: {held.shape} {held.dtype} on one rank, {entry.shape} {entry.dtype} on another"
                )
            held.statistics.merge(entry.statistics)
            if entry.blocks is not None:
                held.blocks = entry.blocks if held.blocks is None else held.blocks + entry.blocks
        for key, parts in tally.parts.items():
            whole.parts.setdefault(key, []).extend(parts)
        for name, value in tally.checksums.items():
            whole.checksums[name] = (whole.checksums.get(name, 0) + value) % (1 << 64)
        whole.rows |= tally.rows
    _add_sums(whole, tallies)
    return whole


def _add_sums(whole: Tally, tallies: Sequence[Tally]) -> None:
    """Add the sums, in the order of ranks, of what several ranks have summands of."""
    for key in dict.fromkeys(key for tally in tallies for key in tally.summands):
        held = [tally.summands[key] for tally in tallies if key in tally.summands]
        sums = dict[tuple[bytes, int, int], Part]()
        for part in (part for summands in held for part in summands.parts):
            place = (part.rows.tobytes(), part.column, part.array.shape[1])
            if place in sums:
                np.add(sums[place].array, part.array, out=sums[place].array)
            else:
                sums[place] = Part(part.array.astype(np.float64), part.rows, part.column)
        kind, _, rest = key.partition(":")
        for part in sums.values():
            name = rest.rpartition("@")[0]
            whole.add(kind, name, held[0].shape, held[0].dtype, part.array, part.rows, part.column)


def quantities(tally: Tally, order: Sequence[tuple[str, str]]) -> list[Quantity]:
    """The quantities of a joined tally, in the order of ``order`` (kinds and names); RuntimeError where elements are
    missing or counted twice, or a quantity is not in ``order``."""
    places = {quantity_key(kind, name, tally.step): (kind, name) for kind, name in order}
    if unknown := tally.entries.keys() - places.keys():
        raise RuntimeError(f"quantities without a place: {sorted(unknown)[:3]}")
    found = []
    for key, (kind, name) in places.items():
        if (entry := tally.entries.get(key)) is None:
            continue
        if entry.statistics.count != math.prod(entry.shape):
            raise RuntimeError(
                f"{key}: the ranks recorded {entry.statistics.count} elements of a tensor of shape {list(entry.shape)}"
            )
        found.append(quantity(kind, name, tally.step, entry.shape, entry.dtype, entry.statistics, entry.blocks))
    return found


def full_tensors(tally: Tally) -> dict[str, np.ndarray]:
    """The tensors that were kept whole, put together; by key."""
    found = {}
    for key, parts in tally.parts.items():
        shape = tally.entries[key].shape
        whole = np.zeros(matrix_shape(shape), parts[0].array.dtype)
        for part in parts:
            whole[part.rows[:, None], np.arange(part.column, part.column + part.array.shape[1])] = part.array
        found[key] = whole.reshape(shape)
    return found
