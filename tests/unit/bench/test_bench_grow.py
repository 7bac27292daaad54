"""tele bench grow on a model of a few thousand parameters: what it measures is there and adds up."""

from __future__ import annotations

from pathlib import Path

import pytest

from telechat_twins.core.bench import grow as bench_grow
from telechat_twins.core.cli import main


def test_growing_is_held_against_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_grow, "SOURCE", {"preset": "telechat2-tiny", "num_layers": 1, "vocab_size": 64})
    monkeypatch.setattr(bench_grow, "TARGET", ("num_layers=2",))
    monkeypatch.setattr(bench_grow, "BLOCK", 1 << 12)
    monkeypatch.chdir(tmp_path)
    result = bench_grow.measure_growth(2)
    assert len(result["shares"]) == result["rounds"] == 2
    assert result["grown_bytes"] > result["source_bytes"] > 0
    assert result["share_of_disk"] > 0.0
    assert 30e6 < result["peak_bytes"] < 1e9
    assert list(tmp_path.iterdir()) == []  # nothing is left
    assert "Share of the disk's rate" in bench_grow.growth_to_markdown(result)
    monkeypatch.setattr("telechat_twins.core.commands.bench.measure_growth", lambda rounds: result)
    assert main(["bench", "grow", "--out", "bench.json"]) == 0
    assert "| tele grow |" in capsys.readouterr().out
    assert (tmp_path / "bench.json").is_file()
