"""Every collective of both backends, in groups of 2, 3 and 4 of four real processes, against numpy.

One launch for each backend runs all checks (collective_rank.py) and writes their results by name; each is a test here.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.launch.launcher import launch
from tests.multiproc.collective_rank import CHECKS, WORLD

SCRIPT = Path(__file__).with_name("collective_rank.py")
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


PACKAGES = {"pt": "telechat_twins.pt_reference", "ms": "telechat_twins.telechat_ms"}


@pytest.fixture(params=PACKAGES)
def alone(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """(mesh, collectives, a tensor) of a backend in a process without a launcher."""
    pytest.importorskip({"pt": "torch", "ms": "mindspore"}[request.param])
    importlib.import_module(PACKAGES[request.param])
    mesh, collectives = (importlib.import_module(f"{PACKAGES[request.param]}.{n}") for n in ("mesh", "collectives"))
    x = np.ones((2, 4), np.float32)
    framework = importlib.import_module({"pt": "torch", "ms": "mindspore"}[request.param])
    return mesh, collectives, framework.from_numpy(x) if request.param == "pt" else framework.Tensor(x)


def test_a_process_alone_makes_no_groups(alone: tuple[Any, Any, Any]) -> None:
    """One rank: no communicator, every collective gives back its very argument, and nothing is counted as sent."""
    from telechat_twins.core.parallel.layout import Layout

    mesh, c, x = alone
    assert mesh.join() == (0, 1)
    made = mesh.make_mesh(Layout(), 0, tied=True)
    for axis in ("tp", "cp", "ring", "ulysses", "dp", "replicas", "world", "tied", "kv"):
        group = getattr(made, axis)
        assert (group.size, group.ranks, group.handle) == (1, (0,), None)
    assert made.forward_in is made.forward_out is made.backward_in is made.backward_out is None
    c.TRAFFIC.reset()
    for result in (
        c.all_reduce(x, made.tp),
        c.all_gather(x, made.tp, 0),
        c.reduce_scatter(x, made.tp, 1),
        c.all_to_all(x, made.tp, 0, 1),
        c.broadcast(x, made.tp, 0),
        c.start_shift(x, made.tp).wait(),
        c.start_all_reduce(x, made.tp).wait(),
        c.start_reduce_scatter(x, made.tp, 0).wait(),
        c.gather_sequence(x, made.tp, 1),
        c.scatter_sum(x, made.tp, 1),
        c.copy_to(x, made.tp),
        c.reduce_from(x, made.tp),
        c.swap_heads(x, made.tp, 0, 1),
    ):
        assert result is x
    assert c.agree([1.5, -2.0], made.tp, "sum") == [1.5, -2.0]
    c.barrier(made.tp)
    assert dict(c.TRAFFIC) == {}


def test_fewer_devices_than_processes_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from telechat_twins.pt_reference import mesh, ops

    monkeypatch.setattr(ops, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="--nproc: 2 processes on this machine, which has 1 cuda devices"):
        mesh.join()
