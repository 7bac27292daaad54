"""A sample of the mutation score (`make mutation` plants the whole catalogue), and that the catalogue is what it says.

Of faults of several processes a sample is planted here, and fifteen others in tests/parity/test_layouts.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from telechat_twins.core.parity.bounds import Bound
from tests.mutation.__main__ import Score, family, record, score, summary
from tests.mutation.catalogue import FAULTS, KINDS
from tests.mutation.checks import Verdict
from tests.support.frameworks import BACKENDS

LEAST = 60
SAMPLE = (
    "output bias missed",
    "keys and values swapped",
    "ignored targets counted",
    "eps before the bias correction",
    "warm up from zero",
    "moments not resumed",
    "new heads appended",
    "slope without beta",
    "statistics in bfloat16",
)

LAYOUT_SAMPLE = {
    "tp2": ("softmax over own columns", "partial products averaged"),
    "pp2": ("labels of the first micro batch", "gradient of the stream stale"),
    "dp2": ("gradients not summed over replicas", "other ranks weights stale"),
    "ring2": ("key gradients one hop short", "delta left out"),
}


def test_the_catalogue() -> None:
    """Enough faults of every kind, each with a text of its own; few that nothing sees, and these with a reason."""
    kinds = Counter(fault.kind for fault in FAULTS.values())
    assert len(FAULTS) >= LEAST and set(kinds) == set(KINDS)
    assert all(fault.text and fault.bound for fault in FAULTS.values())
    assert sum(bool(fault.survives) for fault in FAULTS.values()) <= 0.03 * len(FAULTS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_is_killed(backend: str, tmp_path: Path) -> None:
    """By the bound that the catalogue names, and the checks hold without a fault."""
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    faults = [fault for name, fault in FAULTS.items() if any(word in name for word in SAMPLE)]
    assert len(faults) >= len(SAMPLE)
    made = score(faults, [backend], tmp_path, show=False)
    assert made.problems() == []
    assert made.killed == len(faults)
    report = record(made)
    assert report["score"] == 1.0 and all(row["bound"] for row in report["faults"])
    assert f"{len(faults)} of {len(faults)} killed" in summary(made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_of_layouts_is_killed(backend: str, tmp_path: Path) -> None:
    """Two faults of each layout of two processes, all in one launch; their layouts without a fault hold."""
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    faults = [FAULTS[name] for names in LAYOUT_SAMPLE.values() for name in names]
    assert {fault.check: 0 for fault in faults} == {f"layout {layout}": 0 for layout in LAYOUT_SAMPLE}
    made = score(faults, [backend], tmp_path, show=False)
    assert made.problems() == []
    assert made.killed == len(faults) == len(made.verdicts)


def test_only_the_named_bounds_kill() -> None:
    """A launch that failed, or a bound that the entry does not name, is a survivor and a problem."""
    name = "rotation reversed"
    for what, killed in (("the launch did not reach this task", 0), ("loss against float64", 1)):
        made = Score({("pt", name): Verdict([Bound(what, 2.0, 1.0, "")])})
        assert made.killed == killed and len(made.problems()) == 1 - killed
        assert record(made)["faults"][0]["killed"] is bool(killed)
    assert Score({("pt", name): Verdict([])}).survivors == [("pt", FAULTS[name])]


def test_a_bound_is_named_without_its_tensor() -> None:
    assert family("gradient (layers.0.attn.q.weight) against float64") == "gradient against float64"
    assert family("refused (ValueError: a\nb)") == "refused by the product"
