"""Generation on a ring of two ranks, in both backends, beside one process: tokens, logits, memory, planted faults.

One launch a backend makes all the checks (ring_generation_checks.py). A ring sums over the keys of each rank and then
over the ranks: where one process is a float32 rounding away from the float64 run (2e-6 of the logits,
tests/parity/test_engine_parity.py), so is a ring, and the two are apart by no more than twice that; in float64 by
rounding of that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.launch.launcher import launch
from telechat_twins.core.parity.bounds import relative_frobenius
from tests.multiproc.ring_generation_checks import CHECKS, LENGTH, WORLD, uncached
from tests.parity.test_engine_parity import LOGITS

SCRIPT = Path(__file__).with_name("ring_generation_checks.py")
LIMITS = {
    "engine_by_request": 2 * LOGITS,
    "engine_by_step_short_of_pages": 2 * LOGITS,
    "one_token": 2 * LOGITS,
    "in_float64": 1e-13,
}
Results = tuple[str, int, list[dict[str, Any]], Path]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["pt", "ms"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Backend, exit code of the launch, what each rank found, and the folder of its files."""
    backend = request.param
    pytest.importorskip("torch" if backend == "pt" else "mindspore")
    folder = tmp_path_factory.mktemp(f"ring_{backend}")
    arguments = [backend, str(folder), str(LENGTH)]
    code = launch(backend, arguments, WORLD, folder / "logs", timeout=400, script=SCRIPT)
    files = [folder / f"results_{rank}.json" for rank in range(WORLD)]
    return backend, code, [json.loads(file.read_text()) if file.exists() else {} for file in files], folder


def test_the_launch_ended_well(results: Results) -> None:
    _, code, found, _ = results
    assert code == 0
    assert [sorted(rank) for rank in found] == [sorted(CHECKS)] * WORLD


@pytest.mark.parametrize("name", LIMITS)
def test_a_ring_says_what_one_process_says(results: Results, name: str) -> None:
    for rank in results[2]:
        found = rank[name]
        assert "error" not in found, found["error"]
        assert found["same"]
        assert found["apart"] <= LIMITS[name] and found["rows"] >= 3


def test_in_bfloat16_a_ring_is_as_near_to_float64_as_one_process(results: Results) -> None:
    for rank in results[2]:
        found = rank["in_bfloat16"]
        assert found["ring"] <= 1.1 * found["plain"] and found["rows"] >= 8


def test_a_rank_keeps_its_part_of_the_cache(results: Results) -> None:
    for rank in results[2]:
        found = rank["cache_of_a_rank"]
        assert set(found["pages"]) == {found["expected"]}
        assert found["expected"] == (found["whole"] - 1) // WORLD + 1


@pytest.mark.parametrize("name", [name for name in CHECKS if name.startswith("planted")])
def test_a_planted_fault_is_seen(results: Results, name: str) -> None:
    for rank in results[2]:
        assert rank[name]["apart"] > 1000 * LOGITS, rank[name]


def test_a_long_prompt_in_pieces_is_one_uncached_pass(results: Results) -> None:
    """32 times the trained length; the limit is that of two float32 passes, as in tests/parity/test_long_context.py."""
    backend, _, found, folder = results
    assert found[0]["long_prompt"]["places"] < 0.51 * LENGTH + 64
    rows = [np.load(folder / f"rows_{rank}.npy", allow_pickle=False) for rank in range(WORLD)]
    np.testing.assert_array_equal(*rows)
    plain = uncached(backend, LENGTH)
    assert relative_frobenius(rows[0], plain) <= 2 * LOGITS
    assert (rows[0].argmax(-1) == plain.argmax(-1)).all()
