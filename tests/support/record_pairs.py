"""Records of one training step as two backends and a float64 run would leave them, with faults planted by key."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from telechat_twins.core.config import load_run_config
from telechat_twins.core.parity.record.format import Header, Quantity, Record, write_record
from tests.support.records import sketched, synthetic_record, tensors

Fault = Callable[[np.ndarray], np.ndarray]
UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp64": 0.0}
LR = 1e-3


def step_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """float64 tensors of one step by key; weights after it have moved by AdamW's first update, lr * sign(gradient)."""
    held = tensors(load_run_config("telechat2-tiny", []), 2, 16, seed=seed)
    for key in [key for key in held if key.startswith("weight_after:")]:
        name = key.partition(":")[2]
        gradient, before = held[f"gradient:{name}"], held[f"weight_before:{name}"]
        before *= 0.02
        held[key] = before - LR * np.sign(gradient)
        held[f"moment1:{name}"] = 0.1 * gradient
        held[f"moment2:{name}"] = 0.05 * gradient**2
    held["activation:loss@1"], held["activation:grad_norm@1"] = np.array(7.5), np.array(2.5)
    return held


def rounded(exact: Mapping[str, np.ndarray], precision: str, seed: int, size: float = 4.0) -> dict[str, np.ndarray]:
    """The tensors as a run of ``precision`` computes them: every element off by about ``size`` units of roundoff of
    itself and of its tensor's root mean square; the weights before the step exactly as they are."""
    random, made = np.random.default_rng([7, seed]), {}

    def noisy(x: np.ndarray, factor: float = 1.0) -> np.ndarray:
        scale = size * factor * UNIT[precision] / np.sqrt(2)
        rms = np.sqrt(np.mean(np.square(x)))
        return x + scale * (x * random.standard_normal(x.shape) + rms * random.standard_normal(x.shape))

    for key, x in exact.items():
        kind, _, name = key.partition(":")
        if kind not in ("weight_before", "weight_after", "moment1", "moment2"):
            made[key] = noisy(x, 0.5 if x.ndim == 0 else 1.0)
        elif kind == "weight_before":
            made[key] = x
    for key in exact:
        kind, _, name = key.partition(":")
        if kind == "weight_after":
            gradient = made[f"gradient:{name}"]
            # Masters are stored in float32 whatever the precision of the arithmetic.
            moved = made[f"weight_before:{name}"] - LR * np.sign(gradient)
            made[key] = moved if precision == "fp64" else moved * (1 + 2.0**-25 * random.standard_normal(moved.shape))
        elif kind == "moment1":
            made[key] = 0.1 * made[f"gradient:{name}"]
        elif kind == "moment2":
            made[key] = 0.05 * made[f"gradient:{name}"] ** 2
    return {key: made[key] for key in exact}


@cache
def _header() -> tuple[Header, list[dict[str, Any]]]:
    """A header and a trace of three steps."""
    with tempfile.TemporaryDirectory() as folder:
        base = synthetic_record(Path(folder) / "record", rows=2, seq_len=16, steps=3)
    return base.header, [row | {"tokens": 64 * row["step"]} for row in base.trace]


def record(held: Mapping[str, np.ndarray], **header: Any) -> Record:
    """A record of whole tensors, in memory. ``header``: fields in place of the usual."""
    base, trace = _header()
    made = dataclasses.replace(base, **header)
    return Record(made, trace, {key: _quantity(key, x, made) for key, x in held.items()})


def _quantity(key: str, x: np.ndarray, header: Header) -> Quantity:
    found = sketched(key, x, header.buckets)
    stored = key.startswith("weight_") and header.precision != "fp64"
    return dataclasses.replace(found, dtype="float32") if stored else found


def altered(
    base: Record,
    held: Mapping[str, np.ndarray],
    faults: Mapping[str, Fault] | None = None,
    drop: tuple[str, ...] = (),
    digests: Mapping[str, str] | None = None,
    trace_noise: float = 0.0,
) -> Record:
    """``base``, a record of ``held``, with faults by key, without some quantities, with other digests."""
    wrong = {key: _quantity(key, fault(held[key].copy()), base.header) for key, fault in (faults or {}).items()}
    quantities = {key: wrong.get(key, q) for key, q in base.quantities.items() if key not in drop}
    header = dataclasses.replace(base.header, digests=base.header.digests | dict(digests or {}))
    trace = [row | {"loss": row["loss"] * (1 + trace_noise)} for row in base.trace]
    return Record(header, trace, quantities)


def write(path: Path, made: Record) -> str:
    """Write a record; returns its path."""
    write_record(path, made.header, made.trace, made.quantities.values())
    return str(path)
