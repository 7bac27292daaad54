"""The quantities that records have in common, by kind and step, as columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from telechat_twins.core.parity.compare.blocks import BlockSums, block_sums
from telechat_twins.core.parity.compare.measures import Side, side
from telechat_twins.core.parity.compare.updates import Updates, updates
from telechat_twins.core.parity.record.format import KINDS, Record, quantity_key

# Unit roundoff of the types that tensors are stored in.
STORED = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Part:
    """Quantities of one kind and step. ``counts`` int64 [n]: elements. ``sides``: by "a", "b" and "reference".
    ``stored``: by side, unit roundoff of the type of each tensor [n]. ``updates``: the columns are changes of weights
    since the first recorded step, whose norms ``size`` are those of the weights, by side. ``blocks``: of gradients, by
    number."""

    kind: str
    step: int
    keys: list[str]
    counts: np.ndarray
    sides: dict[str, Side]
    stored: dict[str, np.ndarray]
    updates: Updates | None = None
    size: dict[str, np.ndarray] | None = None
    blocks: dict[int, BlockSums] = field(default_factory=dict)


def parts(common: Sequence[str], records: Mapping[str, Record]) -> Iterator[Part]:
    """The quantities ``common`` to all records, of equal shapes.

    Weights after the first step's beginning are given as changes since then, in which an update shows that is small
    beside the weight; where a record lacks the weights before the first step, as they are.
    """
    some = next(iter(records.values()))
    groups: dict[tuple[str, int, bool], list[str]] = {}
    first = min(some.quantities[key].step for key in common)
    held = set(common)
    for key in common:
        quantity = some.quantities[key]
        later = quantity.kind == "weight_after" or quantity.kind == "weight_before" and quantity.step > first
        change = later and quantity_key("weight_before", quantity.name, first) in held
        groups.setdefault((quantity.kind, quantity.step, change), []).append(key)
    for (kind, step, change), keys in sorted(groups.items(), key=lambda g: (g[0][1], KINDS.index(g[0][0]), g[0][2])):
        yield _part(kind, step, keys, records, first if change else None)


def _part(kind: str, step: int, keys: list[str], records: Mapping[str, Record], base: int | None) -> Part:
    """``base``: the step before which the weights are subtracted from."""
    some = next(iter(records.values())).quantities
    buckets = min(record.header.buckets for record in records.values())
    counts = np.array([some[key].count for key in keys], np.int64)
    columns = {name: side(record, keys, buckets) for name, record in records.items()}
    stored = {name: np.array([STORED[r.quantities[key].dtype] for key in keys]) for name, r in records.items()}
    if base is None:
        blocks = block_sums(keys, records) if kind == "gradient" else {}
        return Part(kind, step, keys, counts, columns, stored, blocks=blocks)
    bases = [quantity_key("weight_before", some[key].name, base) for key in keys]
    made = updates(keys, bases, records, buckets)
    changed = {n: _change(columns[n], made.start[n]) for n in records}
    size = {n: column.norm for n, column in columns.items()}
    return Part(kind, step, keys, counts, changed, stored, made, size)


def _change(after: Side, before: Side) -> Side:
    """Sketches subtract; norms of a difference are estimated from them, and extremes say nothing about it."""
    apart, unknown = after.sketch - before.sketch, np.zeros(len(after.norm))
    return Side(apart, np.linalg.norm(apart, axis=1), unknown, unknown, after.nonfinite)
