"""tele bench memory and save, and the suite of all tables, on the smallest work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from telechat_twins.core.bench import memory, save, suite
from telechat_twins.core.bench import step as bench_step
from telechat_twins.core.cli import main


class FakeWorker:
    """A contestant that uses 40 MB above imports of 200."""

    def __init__(self, name: str, options: object) -> None:
        self.implementation = {"backend": f"{name} 1.0", "device": "CPU"}

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def steps(self, count: int) -> dict[str, object]:
        return {"seconds": [0.1] * count}

    def ask(self, order: object) -> dict[str, int]:
        assert order == {"memory": True}
        return {"imports": 200_000_000, "peak": 40_000_000, "device": 0}


def test_memory_stands_beside_the_estimate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "Worker", FakeWorker)
    out = tmp_path / "memory.json"
    assert main(["bench", "memory", "--seq-len", "32", "--backends", "pt", "--out", str(out)]) == 0
    row = json.loads(out.read_text())["contestants"]["pt"]
    assert row["estimate"] > 10e6 and row["peak"] == 40_000_000
    assert f"| pt 1.0 | 200 MB | 40 MB | - | {row['estimate'] / 1e6:.0f} MB |" in capsys.readouterr().out


def test_saving_is_measured_against_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(save, "TENSOR", (16, 16))
    result = save.measure_saving(6 * 1024, 1)
    assert result["bytes"] == 6 * 1024 and set(result["seconds"]) == set(save.TITLES)
    assert list(tmp_path.iterdir()) == []  # nothing is left
    assert "| checkpoint, hashed and synced |" in save.saving_to_markdown(result)


def test_one_file_holds_all_tables_and_names_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode = 0

    def ran(command: list[str], **_: object) -> Done:
        if "decode" not in command:
            Path(command[-1]).write_text('{"a": 1}')
        return Done()

    monkeypatch.setattr(suite.subprocess, "run", ran)
    out = tmp_path / "bench.json"
    assert suite.main(["--out", str(out), "--only", "save", "decode"]) == 1
    found = json.loads(out.read_text())
    assert found["tables"] == {"save": {"a": 1}} and found["failed"] == ["decode tiny", "decode mini"]
    assert found["machine"]["processor"] == bench_step.processor()
