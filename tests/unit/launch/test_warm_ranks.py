"""What the ranks that tests share answer: a failure of one of them is a failure of the command, and ends them."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import pytest

from telechat_twins.core.launch.worker import write_status
from tests.support.warm_ranks import MOST, Pool, WarmRanks


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WarmRanks:
    """Two ranks, of which the test writes the statuses."""

    def start(self: WarmRanks) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "launch.log").touch()
        self.process = subprocess.Popen(["sleep", "60"])

    monkeypatch.setattr(WarmRanks, "_start", start)
    return WarmRanks("pt", 2, tmp_path / "pt-2")


def answer(ranks: WarmRanks, number: int, logs: Path, codes: dict[int, int]) -> threading.Thread:
    def write() -> None:
        while not (ranks.folder / f"{number}.json").exists():
            time.sleep(0.005)
        for rank, code in codes.items():
            write_status(logs, rank, code, "no such file" if code else "", trace="Traceback" if code else "")

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_a_failed_rank_is_a_failed_launch(ranks: WarmRanks, tmp_path: Path) -> None:
    thread = answer(ranks, 0, tmp_path, {0: 0, 1: 0})
    assert ranks.run("script.py", [], tmp_path, 30.0) == (0, {})
    thread.join()
    process = ranks.process
    assert process is not None and process.poll() is None
    # Statuses of the script before are not taken for those of this one; rank 0 never answers.
    thread = answer(ranks, 1, tmp_path, {1: 2})
    assert ranks.run("script.py", [], tmp_path, 30.0) == (2, {"message": "no such file", "trace": "Traceback"})
    thread.join()
    assert ranks.process is None and process.poll() is not None


def test_ranks_that_ended_or_take_too_long_are_no_success(ranks: WarmRanks, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not done in time"):
        ranks.run("script.py", [], tmp_path, -120.0)
    ranks._start()
    assert ranks.process is not None
    ranks.process.kill()
    ranks.process.wait()
    with pytest.raises(AssertionError, match="the ranks ended"):
        ranks.run("script.py", [], tmp_path, 30.0)


def test_a_pool_keeps_no_more_than_most_ranks(ranks: WarmRanks, tmp_path: Path) -> None:
    with Pool(tmp_path) as pool:
        for backend in ("ms", "pt"):
            pool.of(backend, MOST // 2)._start()
        assert pool.of("ms", MOST // 2).process is not None
        last = pool.ranks["pt", MOST // 2].process
        assert last is not None
        last.kill()
        pool.of("ms", 2)
        assert pool.ranks["pt", MOST // 2].process is None
        kept = pool.ranks["ms", MOST // 2].process
        assert kept is not None
        kept.kill()
