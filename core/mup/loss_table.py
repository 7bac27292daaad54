"""Loss tables: losses over model size in CSV or YAML, with one row or entry for each model."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MIB, read_text
from telechat_twins.core.schema import load_yaml
from telechat_twins.core.shown import printable, shown

SIZES = ("parameters", "width")  # the first one present is the size in the law
COLUMNS = (*SIZES, "loss", "step")
NOTES = ("title", "source")  # further keys of a YAML table
MAX_TABLE_BYTES = MIB
SMALLEST, LARGEST = 1e-9, 1e13  # of a size; includes a trillion parameters that are not given in millions


@dataclass(frozen=True)
class LossTable:
    """Models in order of size. A loss of None asks for a forecast at that size."""

    measure: str  # meaning of ``sizes``: "parameters" (in millions) or "width"
    sizes: tuple[float, ...]
    losses: tuple[float | None, ...]
    widths: tuple[float, ...] | None = None
    step: int | None = None
    title: str = ""

    @property
    def measured(self) -> list[tuple[float, float]]:
        """(size, loss) of the models with a loss."""
        return [(size, loss) for size, loss in zip(self.sizes, self.losses, strict=True) if loss is not None]


def read_loss_table(path: str | Path) -> LossTable:
    """Read a table: .csv with a header line, or .yaml/.yml with a list for each column.

    Columns: ``parameters`` (in millions) or ``width``, or both; ``loss``; ``step``, the same for all rows. Lines of a
    CSV that begin with # are comments. UserError, naming file and line, for anything else.
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".yaml": _read_yaml, ".yml": _read_yaml}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: a table must be .csv or .yaml, found '{path.suffix or path.name}'")
    columns, places, title = readers[path.suffix.lower()](path)
    measure = next((name for name in SIZES if name in columns), None)
    if measure is None or "loss" not in columns:
        missing = "loss" if measure else "parameters (in millions) or width"
        raise UserError(f"{path}: must have a column {missing}; found {', '.join(columns) or 'none'}")
    sizes = {}
    for name in SIZES:
        if name in columns:
            values = zip(columns[name], places, strict=True)
            sizes[name] = [_size(value, f"{path}{place}: {name}") for value, place in values]
    losses = [_loss(v, f"{path}{p}: loss") for v, p in zip(columns["loss"], places, strict=True)]
    order = sorted(range(len(losses)), key=lambda i: sizes[measure][i])
    for one, two in zip(order, order[1:], strict=False):
        if sizes[measure][one] == sizes[measure][two]:
            value = f"{measure} {sizes[measure][one]:g}"
            raise UserError(f"{path}: {value} appears twice; give one loss for each size, at one step")
    widths = sizes.get("width") if measure != "width" else None
    return LossTable(
        measure=measure,
        sizes=tuple(sizes[measure][i] for i in order),
        losses=tuple(losses[i] for i in order),
        widths=tuple(widths[i] for i in order) if widths else None,
        step=_step(columns.get("step", []), path),
        title=title or path.stem,
    )


Columns = tuple[Mapping[str, Sequence[object]], list[str], str]  # values by column, place of each row, title


def _read_csv(path: Path) -> Columns:
    text = read_text(path, MAX_TABLE_BYTES)
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if len(lines) < 2:
        raise UserError(
            f"{path}: must have rows below a first line that names the columns, e.g. parameters,loss; found none"
        )
    try:
        # Line by line, so that an unclosed quote does not swallow the lines after it.
        rows = [next(csv.reader([line])) for _, line in lines]
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV ({error})") from None
    header = [name.strip() for name in rows[0]]
    _known(header, COLUMNS, path)
    for (number, _), row in zip(lines, rows, strict=True):
        if len(row) != len(header):
            raise UserError(f"{path}:{number}: must have {len(header)} values, one for each column, found {len(row)}")
    columns = {name: [row[i].strip() for row in rows[1:]] for i, name in enumerate(header)}
    return columns, [f":{number}" for number, _ in lines[1:]], ""


def _read_yaml(path: Path) -> Columns:
    tree = load_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected 'parameters' or 'width' and 'loss', each with a list")
    _known(list(tree), (*COLUMNS, *NOTES), path)
    columns = {name: tree[name] for name in COLUMNS if name in tree}
    if "step" in columns and not isinstance(columns["step"], list):
        columns["step"] = [columns["step"]]
    for name, values in columns.items():
        if not isinstance(values, list):
            raise UserError(f"{path}: {name}: expected a list, found {values!r}")
    lengths = {name: len(values) for name, values in columns.items() if name != "step"}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"{path}: all lists must have the same length, found {shown}")
    rows = max(lengths.values(), default=0)
    return columns, [f": entry {n + 1}" for n in range(rows)], printable(str(tree.get("title", "")))


def _known(names: Sequence[object], legal: tuple[str, ...], path: Path) -> None:
    for position, name in enumerate(names):
        if name not in legal:
            raise UserError(f"{path}: unknown column '{name}'; legal: {', '.join(legal)}")
        if name in names[:position]:
            raise UserError(f"{path}: column '{name}' appears twice")


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UserError(f"{where}: expected a number, found {shown(value)}")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise UserError(f"{where}: expected a number, found {shown(value)}") from None
    if not math.isfinite(number):
        raise UserError(
            f"{where}: must be a finite number, found {value}; leave the row out, or its loss empty to forecast it"
        )
    return number


def _size(value: object, where: str) -> float:
    number = _number(value, where)
    if number <= 0:
        raise UserError(f"{where}: must be positive, found {value}")
    if not SMALLEST <= number <= LARGEST:
        raise UserError(f"{where}: must be {SMALLEST:g} to {LARGEST:g}, found {value}; parameters are in millions")
    return number


def _loss(value: object, where: str) -> float | None:
    if value is None or value == "":
        return None
    number = _number(value, where)
    if not 0 < number < 1e6:
        raise UserError(f"{where}: expected a loss between 0 and 1e6, found {value}")
    return number


def _step(values: Sequence[object], path: Path) -> int | None:
    found = {_number(value, f"{path}: step") for value in values}
    if len(found) > 1:
        shown = ", ".join(f"{step:g}" for step in sorted(found))
        raise UserError(f"{path}: all losses must be of one step, found steps {shown}; give a table for each step")
    if any(step != int(step) or step < 0 for step in found):
        raise UserError(f"{path}: step: expected a whole number, found {found.pop():g}")
    return int(found.pop()) if found else None
