"""Small parity reports with rounding of a chosen size, for tests of their formats."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator

from telechat_twins.core.parity.bounds import BatchResult, Bound, compare_traces, judge_batch
from telechat_twins.core.parity.document.model import Section
from telechat_twins.core.parity.report import ParityReport
from tests.house import ROOT

HOSTILE = "<img src=x onerror=alert(1)></script>&\x00\x1b[31m\u202e\ud800"


def trace(steps: int = 60, noise: float = 0.0, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of metrics; every third loss is without noise."""
    random = np.random.default_rng(seed)
    rows = []
    for step in range(1, steps + 1):
        loss, norm = (5 + 3 / step) * (1 + noise * random.standard_normal() * (step % 3 > 0)), 1 + 1 / step
        rows.append({"step": step, "loss": loss, "grad_norm": norm, "lr": 1e-3 / step, "tokens": 64 * step})
    return rows


def batch_result(noise: float, seed: int) -> BatchResult:
    """Logits, loss and gradients whose rounding errors are about ``noise``, relative."""
    random, base = np.random.default_rng([99, seed]), np.random.default_rng(1)

    def rounded(shape: tuple[int, ...]) -> np.ndarray:
        return base.standard_normal(shape) * (1 + noise * random.standard_normal(shape))

    grads = {f"layers.{i}.attn.{n}.weight": rounded((6, 5)) for i in range(2) for n in "qkvo"}
    return {"logits": rounded((2, 3, 7)), "loss": 5.0 * (1 + noise), "grads": grads}


def report(noise: float = 3e-7, seed: int = 1, further: str = "greedy tokens that differ") -> ParityReport:
    """Two backends over one batch and 60 steps; MindSpore's rounding errors are about ``noise``."""
    runs = {"ms": batch_result(noise, seed), "pt": batch_result(3e-7, 2)}
    batch = judge_batch(runs, batch_result(0.0, 0), "fp32", 4)
    bounds = [Bound(further, 0.0, 0.0, "same weights")]
    return ParityReport(
        {"model": "tiny"}, batch, compare_traces(trace(noise=1e-6), trace()), [], [Section("export", bounds)]
    )


@cache
def schema() -> dict[str, Any]:
    """The schema that the documentation shows."""
    text = (ROOT / "docs" / "parity-report.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return json.loads(block)


def complaints(data: Any) -> list[str]:
    """What of a report the documented schema does not allow; SchemaError where that is not a schema itself."""
    Draft202012Validator.check_schema(schema())
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema()).iter_errors(data)]


def breaks_schema(path: Path) -> list[str]:
    """What of a report.json the documented schema does not allow, duplicate keys of bounds among it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    found = complaints(data)
    keys = [bound["key"] for bound in data.get("bounds", [])]
    return found + [f"key {key} twice" for key in sorted(set(keys)) if keys.count(key) > 1]
