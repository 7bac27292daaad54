"""Every collective of both backends, in groups of 2, 3 and 4 of four real processes, against numpy.

One launch a backend does all the checks (collective_checks.py), which leave their results by name; each is a test here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.launch import launch
from tests.multiproc.collective_checks import CHECKS, WORLD

SCRIPT = Path(__file__).with_name("collective_checks.py")
Results = tuple[int, list[dict[str, str]]]


@pytest.fixture(scope="module", params=["pt", "ms"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """(exit code of the launch, what each rank found)."""
    pytest.importorskip("torch" if request.param == "pt" else "mindspore")
    folder = tmp_path_factory.mktemp(f"collectives_{request.param}")
    code = launch(request.param, [request.param, str(folder)], WORLD, folder / "logs", timeout=240, script=SCRIPT)
    files = [folder / f"results_{rank}.json" for rank in range(WORLD)]
    return code, [json.loads(file.read_text()) if file.exists() else {} for file in files]


@pytest.mark.parametrize("name", [name for name in CHECKS if not name.startswith("planted")])
def test_check(results: Results, name: str) -> None:
    found = [rank.get(name, "no result: the rank did not come that far") for rank in results[1]]
    for rank, result in enumerate(found):
        assert result in ("ok", "no part"), f"rank {rank}: {result}"
    if not name.startswith("native"):
        assert "ok" in found, "no rank ran this check"


def test_the_launch_ended_well(results: Results) -> None:
    code, found = results
    assert code == 0
    assert [sorted(rank) for rank in found] == [sorted(CHECKS)] * WORLD


def test_a_missing_sum_is_seen(results: Results) -> None:
    """The check of copy_to's gradient, run once more without the sum over ranks: it must fail on every rank."""
    for rank in results[1]:
        assert "beyond its bound" in rank["planted_missing_sum"]
