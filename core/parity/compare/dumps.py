"""Comparison of two outputs of `tele forward`: logits, loss and gradients by the checkpoint's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import SafetensorsFile
from telechat_twins.core.parity.bounds import (
    BatchReport,
    BatchResult,
    Bound,
    Judged,
    compare_tensors,
    judge_batch,
    tolerances,
)
from telechat_twins.core.parity.document.model import Cell, Document, Section, Table
from telechat_twins.core.parity.document.versions import own_versions
from telechat_twins.core.shown import shown

PREFIX = "grad."
_FLOATS, _LONGEST_NAME = ("F64", "F32", "BF16", "F16"), 500


def read_dump(path: str) -> dict[str, np.ndarray]:
    """The arrays of an output of `tele forward`; UserError when it is none."""
    file = SafetensorsFile(path)
    names = list(file.tensors)
    if "logits" not in names or any(n not in ("logits", "loss") and not n.startswith(PREFIX) for n in names):
        raise UserError(f"{path}: must hold logits, loss and grad.<name>, as `tele forward` writes; found {names[:5]}")
    for name in names:
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise UserError(f"{path}: a tensor's name must be a parameter's, found {shown(name)}")
        if file.info(name).code not in _FLOATS:
            raise UserError(f"{path}: {name} must be of {', '.join(_FLOATS)}, found {file.info(name).code}")
    if len(file.info("logits").shape) < 2 or 0 in file.info("logits").shape:
        raise UserError(
            f"{path}: logits must be [..., positions, vocabulary], found shape {list(file.info('logits').shape)}"
        )
    if "loss" in names and file.info("loss").shape not in ((), (1,)):
        raise UserError(f"{path}: loss must be one number, found shape {list(file.info('loss').shape)}")
    return {name: file.read(name) for name in names}


def judge_dumps(dumps: Mapping[str, dict[str, np.ndarray]], precision: str) -> tuple[BatchReport, list[Section]]:
    """The comparison of dumps "a" and "b", against "reference" if given, by the rule of one batch; without it, of
    their distance, which must be below both ceilings."""
    layers = 1 + max(
        (int(m[1]) for n in dumps["a"] if (m := re.search(r"\.(?:layers|h|blocks)\.(\d{1,6})\.", n))), default=3
    )
    if "reference" in dumps:
        exact = _result(dumps["reference"])
        report = judge_batch({name: _result(dumps[name]) for name in ("a", "b")}, exact, precision, layers)
        return report, [Section("one batch", report.bounds())]
    return _apart(dumps["a"], dumps["b"], precision, layers)


def _result(dump: Mapping[str, np.ndarray]) -> BatchResult:
    grads = {name.removeprefix(PREFIX): array for name, array in dump.items() if name.startswith(PREFIX)}
    return {"logits": dump["logits"], "loss": float(dump.get("loss", np.array(0.0)).reshape(())), "grads": grads}


def _apart(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], precision: str, layers: int
) -> tuple[BatchReport, list[Section]]:
    rules = tolerances(precision, layers)
    compared = compare_tensors(a, b)
    judged = []
    for row in compared.rows:
        rule = rules[row.name if row.name in ("logits", "loss") else "gradient"]
        limit = 2 * rule.ceiling
        source = f"without a reference: at most both ceilings, {limit:.3g} ({precision})"
        judged.append(
            Judged(row.name, {"apart": row.relative}, {"apart": limit}, row.relative, {"apart": row.max_abs}, source)
        )
    names = [f"A lacks {name}" for name in compared.missing] + [f"B lacks {name}" for name in compared.unexpected]
    quantities = [row for row in judged if not row.name.startswith(PREFIX)]
    gradients = [row for row in judged if row.name.startswith(PREFIX)]
    bounds = [Bound("names that differ", float(len(names)), 0.0, "; ".join(names[:5]) or "both must have all")]
    bounds += [
        Bound(f"{row.name}, A to B", row.errors["apart"], row.limits["apart"], row.source)
        for row in quantities + gradients
    ]
    return BatchReport(quantities, gradients, names), [Section("one batch", bounds)]


def dump_document(facts: dict[str, str], report: BatchReport, sections: list[Section]) -> Document:
    """The report of two outputs of `tele forward`."""
    rows: list[list[Cell]] = [
        [row.name, *row.errors.values(), *row.limits.values(), row.margin]
        for row in report.quantities + report.gradients
    ]
    sides = list(report.quantities[0].errors)
    labels = {"a": "A", "b": "B", "apart": "A to B"}
    head = ["tensor", *(f"{labels[s]}, error" for s in sides), *(f"{labels[s]}, limit" for s in sides), "of its limit"]
    table = Table("Tensors", head, rows, "Relative Frobenius errors.")
    return Document("forward", "Parity of forward results", facts, own_versions(), sections, [table], [], report.names)
