"""`tele train` refuses what it can before a launcher starts, and hands the rest on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import core.data.blend
import core.launch
from core import cli


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been launched."""
    calls: list[tuple[Any, ...]] = []

    def launch(*args: Any) -> int:
        calls.append(args)
        return 0

    monkeypatch.setattr(core.launch, "launch", launch)
    return calls


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(core.data.blend, "open_blend", lambda *args: None)
    tree = {
        "model": "telechat2-tiny",
        "data": {"sources": [{"path": "packed"}], "seq_len": 64},
        "train": {"steps": 10, "global_batch": 4, "micro_batch": 2},
        "optim": {"lr": 1e-3},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_everything_is_passed_on(config: Path, launched: list[Any], tmp_path: Path) -> None:
    words = ["train", "--backend", "pt", "--config", str(config), "--out", str(tmp_path / "out"), "--resume", "auto"]
    assert cli.main([*words, "--set", "train.steps=20", "optim.lr=2e-3", "--set", "train.seed=7"]) == 0
    passed = ["--config", str(config), "--out", str(tmp_path / "out")]
    passed += ["--set", "train.steps=20", "--set", "optim.lr=2e-3", "--set", "train.seed=7", "--resume", "auto"]
    assert launched == [("pt", passed, 1, tmp_path / "out" / "logs")]


def test_default_folder_is_named_after_config_and_backend(config: Path, launched: list[Any]) -> None:
    assert cli.main(["train", "--backend", "ms", "--config", str(config)]) == 0
    assert launched[0][3] == Path("runs/run-ms/logs")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--set", "train.stesp=3"], "train: unknown key 'stesp'; did you mean 'steps'?"),
        (["--set", "train.global_batch=3"], "train.micro_batch: 2 does not divide global_batch 3"),
        (["--nproc", "2"], "--nproc: training runs in one process in this version, found 2; use --nproc 1"),
        (["--resume", "nowhere"], "--resume: no folder nowhere"),
    ],
)
def test_mistakes_stop_before_the_launch(
    extra: list[str], says: str, config: Path, launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--backend", "ms", "--config", str(config), *extra]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert launched == []


def test_missing_data_stops_before_the_launch(
    config: Path, launched: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    assert cli.main(["train", "--backend", "ms", "--config", str(config), "--out", str(config.parent / "out")]) == 2
    err = capsys.readouterr().err
    assert "packed" in err and err.count("\n") == 1
    assert not (config.parent / "out").exists()


def test_out_that_is_a_file(config: Path, launched: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--backend", "ms", "--config", str(config), "--out", str(config)]) == 2
    assert "is a file" in capsys.readouterr().err


def test_an_earlier_run_keeps_its_logs(config: Path, launched: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    out = config.parent / "out"
    (out / "step-00000003").mkdir(parents=True)
    (out / "metrics.jsonl").write_text('{"step": 3}\n')
    other = config.parent / "other"
    other.mkdir()
    words = ["train", "--backend", "pt", "--config", str(config), "--out", str(out)]
    for extra in ([], ["--resume", str(other)]):
        assert cli.main([*words, *extra]) == 2
        assert "already holds a run (step 3)" in capsys.readouterr().err
    assert launched == []
    for resume in ("auto", str(out), str(out / "step-00000003")):
        assert cli.main([*words, "--resume", resume]) == 0
    assert len(launched) == 3
