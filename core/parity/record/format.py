"""The record: what one run of training steps computed, as a small folder that another site can judge.

    record.json           header: versions, config, digests, and size and SHA-256 of every other file
    trace.jsonl           a row of metrics for each step
    quantities.json       the table of quantities: kind, name, step, shape, dtype
    sketches.safetensors  statistics and sketches of the quantities, one row each, in the table's order
    full.safetensors      whole tensors, of those that were asked for

A quantity is a tensor of one kind and logical name at one step. Its shape is that of the whole tensor, so that records
of different layouts, backends and precisions hold the same quantities. docs/records.md is the page of this format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import new_folder, show_bytes
from telechat_twins.core.parity.record.sketch import BUCKETS, LEAST_BUCKETS, Statistics
from telechat_twins.core.parity.record.write import Parts, write_bytes, write_tensors
from telechat_twins.core.types import JsonObject

FORMAT, VERSION, READABLE = "tele-record", 3, (1, 2, 3)
MAX_BYTES = 32_000_000  # of a record without its full tensors
FILLED = 30_000_000  # to which sketches and block sums are made to fit
KINDS = (
    "activation",
    "activation_grad",
    "gradient",
    "weight_before",
    "weight_after",
    "moment1",
    "moment2",
)
DTYPES = ("float64", "float32", "bfloat16", "float16")
HEADER, TRACE, TABLE, SKETCHES, FULL = (
    "record.json",
    "trace.jsonl",
    "quantities.json",
    "sketches.safetensors",
    "full.safetensors",
)
BLOCKS = ("block_rows", "block_columns")  # I64 columns: of the block sums of each tensor, 0 without
COLUMNS = {"count": "I64", "nonfinite": "I64", "norm2": "F64", "sum": "F64", "min": "F64", "max": "F64"}
_ROW_BYTES, _ENTRY_BYTES, _REST = (
    8 * (len(COLUMNS) + len(BLOCKS)),
    200,
    1_000_000,
)  # a row without its sketch; upper bounds of the rest


@dataclass(frozen=True)
class Quantity:
    """One tensor of one step. ``shape``: of the whole tensor, [] for a scalar. ``dtype``: of what was recorded, before
    it was added up in float64. ``count``: elements, ``nonfinite`` of them not finite (or above sketch.LARGEST), which
    the other numbers leave out: ``norm2`` (sum of squares), ``sum``, ``min``, ``max`` (0 without any) and ``sketch``
    float64 [K], as core.parity.record.sketch defines it; of large gradients also ``blocks``
    float32, their block sums."""

    kind: str
    name: str
    step: int
    shape: tuple[int, ...]
    dtype: str
    count: int
    nonfinite: int
    norm2: float
    sum: float
    min: float
    max: float
    sketch: np.ndarray = field(repr=False, compare=False)
    blocks: np.ndarray | None = field(default=None, repr=False, compare=False)

    @cached_property
    def key(self) -> str:
        """``kind:name@step``."""
        return quantity_key(self.kind, self.name, self.step)

    @property
    def norm(self) -> float:
        """Frobenius norm of the finite elements."""
        return float(np.sqrt(self.norm2))


def quantity_key(kind: str, name: str, step: int) -> str:
    """The key of a quantity in a record: ``gradient:layers.3.attn.q.weight@1``."""
    return f"{kind}:{name}@{step}"


def quantity(
    kind: str,
    name: str,
    step: int,
    shape: Sequence[int],
    dtype: str,
    statistics: Statistics,
    blocks: np.ndarray | None = None,
) -> Quantity:
    """A quantity from the statistics of the whole tensor, and its block sums."""
    empty = statistics.nonfinite == statistics.count
    return Quantity(
        kind=kind,
        name=name,
        step=step,
        shape=tuple(shape),
        dtype=dtype,
        count=statistics.count,
        nonfinite=statistics.nonfinite,
        norm2=statistics.norm2,
        sum=statistics.sum,
        min=0.0 if empty else statistics.min,
        max=0.0 if empty else statistics.max,
        sketch=statistics.sketch,
        blocks=None if blocks is None else blocks.astype(np.float32, copy=False),
    )


@dataclass(frozen=True, kw_only=True)
class Header:
    """What was run, and where.

    ``backend``: ms or pt. ``device``: name of the device. ``layout``: as in a run (``tp2.pp2``). ``precision``: of
    train.precision. ``versions``: of this program, Python, numpy and the framework. ``config``: the whole run, as
    RunConfig.to_dict gives it. ``digests``: ``weights`` before the first recorded step, ``batch`` of the recorded steps
    and ``config`` (of what decides the numbers: neither layout nor precision), each in hexadecimal and independent of
    layout and backend. ``steps``: those whose quantities are recorded; the trace has all. ``rows`` and ``seq_len``: B
    and S of the recorded activations, which are those of the first rows of the global batch.
    ``buckets`` and ``seed``: K and the seed of the sketches. ``loss``, ``grad_norm``: of the first recorded step.
    ``notes``: what a reader should know.
    """

    backend: str
    device: str
    layout: str
    precision: str
    versions: dict[str, str]
    config: JsonObject
    digests: dict[str, str]
    steps: list[int]
    rows: int
    seq_len: int
    buckets: int = BUCKETS
    seed: int = 0
    loss: float | None = None
    grad_norm: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """A record in memory. ``trace``: metrics rows in order of step. ``quantities``: by key, in execution order within
    each step. ``path``: the folder that it was read from or written to."""

    header: Header
    trace: list[JsonObject]
    quantities: dict[str, Quantity]
    path: Path | None = None
    full: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of the full tensors by key


def fitting_buckets(rows: int, trace_rows: int = 1) -> int:
    """The largest K with which a record of ``rows`` quantities stays below FILLED.

    Raises UserError where none does.
    """
    buckets = BUCKETS
    while estimated_bytes(rows, buckets, trace_rows) > FILLED:
        buckets //= 2
        if buckets < LEAST_BUCKETS:
            raise UserError(
                f"a record must have at most {show_bytes(MAX_BYTES)}, and {rows} quantities would not fit even with "
                f"{LEAST_BUCKETS} numbers each; record fewer steps (--at)"
            )
    return buckets


def estimated_bytes(rows: int, buckets: int, trace_rows: int = 1) -> int:
    """Upper bound on the bytes of a record of ``rows`` quantities and ``trace_rows`` steps."""
    return rows * (_ROW_BYTES + 8 * buckets + _ENTRY_BYTES) + 400 * trace_rows + _REST


def blocks_room(rows: int, buckets: int, trace_rows: int = 1) -> int:
    """Bytes that a record of ``rows`` quantities leaves for the block sums of gradients."""
    return FILLED - estimated_bytes(rows, buckets, trace_rows)


def write_record(
    path: Path,
    header: Header,
    trace: Iterable[JsonObject],
    quantities: Iterable[Quantity],
    full: Mapping[str, np.ndarray] | None = None,
) -> Record:
    """Write a record: beside ``path`` first, then renamed to it.

    Raises UserError for a full disk, a path that cannot be written, and a record above MAX_BYTES; ValueError for
    quantities that do not fit the header (sketches of another K, a step that is not listed, one key twice).
    """
    rows, held = list(trace), list(quantities)
    table = {quantity_key(row.kind, row.name, row.step): row for row in held}
    if len(table) != len(held):
        raise ValueError(f"{len(held) - len(table)} quantities have the key of another")
    for row in held:
        if row.sketch.shape != (header.buckets,) or row.step not in header.steps or row.kind not in KINDS:
            raise ValueError(f"{row.key} does not fit the header: sketch {row.sketch.shape}, steps {header.steps}")
    with new_folder(path) as folder:
        text = "".join(json.dumps(_clean(row), allow_nan=False) + "\n" for row in rows)
        entries = [{"kind": q.kind, "name": q.name, "step": q.step, "shape": q.shape, "dtype": q.dtype} for q in held]
        listed = json.dumps({"quantities": entries}, separators=(",", ":"))
        files = {
            TRACE: write_bytes(folder / TRACE, [text.encode()]),
            TABLE: write_bytes(folder / TABLE, [listed.encode()]),
            SKETCHES: write_tensors(folder / SKETCHES, _columns(held, header.buckets)),
        }
        if full:
            files[FULL] = write_tensors(folder / FULL, full)
        tree = {"format": FORMAT, "version": VERSION, **vars(header), "files": files}
        (folder / HEADER).write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        total = sum((folder / n).stat().st_size for n in (HEADER, TRACE, TABLE, SKETCHES))
        if total > MAX_BYTES:
            raise UserError(
                f"{path}: a record must have at most {show_bytes(MAX_BYTES)}, this one has {show_bytes(total)}"
            )
    return Record(header, rows, table, path, {key: array.shape for key, array in (full or {}).items()})


def digest_of(value: object) -> str:
    """SHA-256, in hexadecimal, of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _columns(held: Sequence[Quantity], buckets: int) -> dict[str, np.ndarray | Parts]:
    kinds = {"I64": np.int64, "F64": np.float64}
    values = zip(*map(attrgetter(*COLUMNS), held), strict=True) if held else ((),) * len(COLUMNS)
    columns = {name: np.array(v, kinds[COLUMNS[name]]) for name, v in zip(COLUMNS, values, strict=True)}
    shapes = np.array([(0, 0) if q.blocks is None else q.blocks.shape for q in held], np.int64).reshape(-1, 2)
    blocks = [q.blocks for q in held if q.blocks is not None]
    return {
        **columns,
        "sketch": np.array([q.sketch for q in held], np.float64).reshape(len(held), buckets),
        **{name: np.ascontiguousarray(shapes[:, axis]) for axis, name in enumerate(BLOCKS)},
        "blocks": Parts(np.dtype(np.float32), (sum(b.size for b in blocks),), blocks),
    }


def _clean(row: JsonObject) -> JsonObject:
    """A row of metrics without numbers that JSON does not have."""
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
