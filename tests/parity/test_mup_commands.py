"""The commands of docs/mup.md, in the order of the page: the shipped searches with fewer, shorter trials."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from telechat_twins.core.schema import without
from tests import docs
from tests.house import ROOT
from tests.support.docs_workspace import add_checkout, add_demo, add_packed, add_text
from tests.support.launching import one_rank_here

SHORT = ["train.steps=12", "optim.warmup_steps=2", "train.global_batch=2", "train.micro_batch=2", "data.seq_len=32"]
SMALL = ("--steps", "2", "--widths", "64", "128", "192", "--set", "model.num_layers=1")
TRIALS = 2  # of a grid


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mindspore").runtime.launch_blocking()
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("mup")
    add_text(folder)
    add_demo(folder)
    add_packed(folder)
    add_checkout(folder)
    for path in (folder / "configs" / "mup").glob("*.yaml"):
        tree = yaml.safe_load(path.read_text())
        tree |= {"set": [*without(tree.get("set", []), SHORT), *SHORT], "window": 3, "trials": [], "seeds": []}
        if "grid" in tree:
            tree["grid"] = {name: values[: TRIALS if name == "lr" else 1] for name, values in tree["grid"].items()}
        path.write_text(yaml.safe_dump(tree))
    return folder


def test_the_commands_of_the_page_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    one_rank_here(monkeypatch, real=("pt",))
    shown = docs.commands(ROOT, "docs/mup.md")
    assert {command.words[2] for command in shown if command.words[:2] == ("tele", "mup")} == {
        "transfer", "check", "search", "predict",
    }  # fmt: skip
    for command in shown:
        if command.words[2] == "check":
            command = dataclasses.replace(command, words=(*command.words, *SMALL))
        code = docs.run(command, monkeypatch)
        # Two updates at these widths say nothing of muP: what counts is that the check runs to its verdict.
        assert code == 0 or (code == 1 and command.words[2] == "check"), f"{command.text}\n{capfd.readouterr()}"
        assert capfd.readouterr().out, f"{command.where}: printed nothing"
    forecast = json.loads((workspace / "runs" / "widths" / "prediction.json").read_text())
    assert [row["measured"] is None for row in forecast["forecasts"]] == [False, False]
