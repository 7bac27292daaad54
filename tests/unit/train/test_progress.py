"""Progress of a run on a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from telechat_twins.core.train.progress import Console


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_bar_of_a_rank_fits_the_launchers_terminal(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank writes to a log that the launcher copies: a longer line would wrap, and each refresh leave one behind."""
    monkeypatch.setenv("COLUMNS", str(columns))  # as the launcher sets it
    row = {"step": 1, "step_ms": 9.0, "loss": 7.6446, "grad_norm": 3.02, "tokens_per_s": 868.0, "comm_share": 0.63}
    with (tmp_path / "log").open("w+") as stream:
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        console = Console(10_000, stream=stream)
        for step in range(1, 4):
            console.measure(row | {"step": step})
            console.step(row | {"step": step, "mfu": 0.4, "device_peak_gib": 50.0})
        console.close()
        stream.seek(0)
        lines = stream.read().replace("\r", "\n").split("\n")
    assert columns - 5 <= max(len(line.rstrip()) for line in lines) < columns
