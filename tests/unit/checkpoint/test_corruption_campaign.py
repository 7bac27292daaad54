"""A sample of the corruption campaign, and that it finds what it is there to find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from telechat_twins.convert.hf import folder as hf
from telechat_twins.core.checkpoint.read import Checkpoint
from tests.campaigns import corruption
from tests.campaigns.corrupting import KINDS, corrupt
from tests.campaigns.corruption_formats import FORMATS, Format

SAMPLE = {
    "canonical checkpoint": 60,
    "release with sums": 60,
    "release": 60,
    "MindFormers safetensors": 40,
    "packed text": 30,
    "packed dialogues": 30,
}
SEED = 100_000  # not a trial of the campaign itself


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp("campaign") for name in SAMPLE}
    for name, folder in found.items():
        corruption.prepare(name, folder)
    return found


@pytest.mark.parametrize("name", SAMPLE)
def test_nothing_breaks_and_no_hashed_file_changes_in_silence(name: str, folders: dict[str, Path]) -> None:
    found = [corruption.run_trial(name, folders[name], SEED + n) for n in range(SAMPLE[name])]
    assert not [trial for trial in found if trial.breaks], corruption.summary(found)
    assert sum(trial.outcome == "refused" for trial in found) > SAMPLE[name] // 4
    if name == "release":  # has no hashes, so that damage to weights shows nowhere: the campaign sees it
        assert any(trial.outcome == "silent" for trial in found)


def test_a_reader_that_does_not_verify_is_found(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "check_sums", lambda *_: None)
    monkeypatch.setattr(Checkpoint, "verify", lambda *_: None)
    for name in ("release with sums", "canonical checkpoint"):
        found = [corruption.run_trial(name, folders[name], SEED + n) for n in range(40)]
        assert any(trial.breaks and trial.outcome == "silent" for trial in found)
        assert "silent: " + name in corruption.summary(found)


def test_an_exception_is_found_and_the_command_returns_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(folder: Path, seed: int) -> None:
        folder.mkdir()
        (folder / "x.json").write_text(json.dumps({"a": seed, "b": 1}))

    monkeypatch.setitem(
        FORMATS, "x", Format(make, lambda folder: str(json.loads((folder / "x.json").read_text())["a"]))
    )
    monkeypatch.setattr(
        corruption,
        "run_format",
        lambda name, trials, seed: [corruption.run_trial(name, tmp_path, n) for n in range(20)],
    )
    corruption.prepare("x", tmp_path)
    assert corruption.main(["--formats", "x", "--out", str(tmp_path / "out.json")]) == 1
    assert "broken: x, trial " in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())) == 20


def test_damage_follows_from_its_seed(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    work, seen = folders["release"], set()
    for seed in range(60):
        found = []
        for again in ("a", "b"):
            shutil.copytree(work / "intact", tmp_path / again)
            damage = corrupt(tmp_path / again, work / "other", seed)
            content = {str(p.relative_to(tmp_path / again)): p.read_bytes() for p in (tmp_path / again).iterdir()}
            found.append((damage, content))
            shutil.rmtree(tmp_path / again)
        assert found[0] == found[1]
        assert found[0][1] != {p.name: p.read_bytes() for p in (work / "intact").iterdir()}
        seen.add(found[0][0].kind)
    assert seen == set(KINDS)
