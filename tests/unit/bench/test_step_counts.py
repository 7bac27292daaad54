"""A step's operators and bytes stay as committed, so that a slow-down is seen without timing."""

from __future__ import annotations

import json

import pytest

from tests.support.step_counts import FILE, Counts, counts, versions

RENEW = "if the change is meant, run `python -m tests.support.step_counts` and commit step_counts.json"


def differences(expected: Counts, found: Counts) -> list[str]:
    """Lines "operator: committed -> found" of every number that differs."""
    keys = sorted({(part, name) for one in (expected, found) for part in one for name in one[part]})
    pairs = [(name, expected[part].get(name, 0), found[part].get(name, 0)) for part, name in keys]
    return [f"{name}: {before:,} -> {after:,}" for name, before, after in pairs if before != after]


@pytest.mark.parametrize("backend", ["ms", "pt"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_has_the_committed_operators(backend: str, precision: str) -> None:
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    if stored["versions"][backend] != versions()[backend]:
        pytest.skip(f"counts are of {backend} {stored['versions'][backend]}")
    changed = differences(stored["counts"][f"{backend} {precision}"], counts(backend, precision))
    assert not changed, f"a step of {backend} in {precision} changed: {'; '.join(changed)}; {RENEW}"


def test_a_further_call_and_a_further_byte_are_seen() -> None:
    one: Counts = {"calls": {"matmul": 2}, "bytes": {"results": 8}}
    assert differences(one, {"calls": {"matmul": 2, "cast": 1}, "bytes": {"results": 9}}) == [
        "results: 8 -> 9",
        "cast: 0 -> 1",
    ]
