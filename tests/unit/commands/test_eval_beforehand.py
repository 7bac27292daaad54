"""What a run cannot evaluate at its checkpoints is refused before it is launched, with file, line and key."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import telechat_twins.core.launch.launcher
from telechat_twins.core import cli
from telechat_twins.core.config import load_run_config
from telechat_twins.core.eval import beforehand
from telechat_twins.core.train.heldout.sources import trained_on
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer
from tests.support.packed import write_packed


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    monkeypatch.setattr(telechat_twins.core.launch.launcher, "launch", lambda *args, **_: calls.append(args) or 0)
    return calls


def run_with(folder: Path, section: str) -> Path:
    write_packed(folder / "packed", VOCAB_SIZE, 16, 8, tokenizer=tiny_tokenizer())
    file = folder / "run.yaml"
    file.write_text(
        f"model: {{preset: telechat2-tiny, vocab_size: {VOCAB_SIZE}, training_seqlen: 32}}\n"
        "data: {sources: [{path: packed}], seq_len: 16}\n"
        "train: {steps: 2, global_batch: 2, micro_batch: 1}\noptim: {lr: 1e-3}\n"
        f"eval:\n  {section}\n"
    )
    return file


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("samples: [a, ' word word word word word word word word word word word word word word word word']", None),
        (f"samples: [a, '{'word ' * 64}']", "eval.samples[1]: must have 1 to 31 tokens, since the model reads"),
        ("samples: ['']", "eval.samples[0]: must have 1 to 31 tokens"),
        ("{tasks: [arc_easy], task_layout: tpx}", "eval.task_layout: layout 'tpx': unknown part 'tpx'"),
        ("{tasks: [arc_easy], task_layout: dp2}", "eval.task_layout: generation has the axes tp, pp and ring only"),
    ],
)
def test_what_no_checkpoint_could_answer(
    launched: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, section: str, says: str | None
) -> None:
    monkeypatch.setattr(beforehand.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(telechat_twins.core.launch.launcher.importlib.util, "find_spec", lambda name: name)
    file = run_with(tmp_path, section)
    code = cli.main(["train", "--backend", "pt", "--config", str(file), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert (code, len(launched)) == ((0, 1) if says is None else (2, 0)), said
    if says is not None:
        assert said.startswith(f"tele: {file}:6: ") and says in said and said.count("\n") == 1


@pytest.mark.parametrize(("code", "refused"), [(2, True), (1, False), (0, False)])
def test_tasks_are_looked_up_in_a_process_of_their_own(
    launched: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, code: int, refused: bool
) -> None:
    asked: list[Any] = []

    def run(words: list[str], **_: Any) -> SimpleNamespace:
        asked.append(json.loads(words[-1]))
        return SimpleNamespace(returncode=code, stderr="a note\n--tasks: unknown task 'arx'; did you mean 'arc'?\n")

    monkeypatch.setattr(beforehand.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "mine").mkdir()
    file = run_with(tmp_path, "{tasks: [arx], task_include: [mine]}")
    end = cli.main(["train", "--backend", "pt", "--config", str(file), "--out", str(tmp_path / "out")])
    assert asked == [[["arx"], [str(tmp_path / "mine")]]]
    assert (end, len(launched)) == ((2, 0) if refused else (0, 1))
    assert ("eval.tasks: unknown task 'arx'; did you mean 'arc'?" in capsys.readouterr().err) == refused


def test_a_misspelt_task_is_refused_by_the_harness_itself(tmp_path: Path, capsys: Any, launched: list[Any]) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is in the extra eval")
    file = run_with(tmp_path, "tasks: [arc_chalenge]")
    assert cli.main(["train", "--backend", "pt", "--config", str(file), "--out", str(tmp_path / "out")]) == 2
    said = f"tele: {file}:6: eval.tasks: unknown task 'arc_chalenge'; did you mean 'arc_challenge'?\n"
    assert capsys.readouterr().err == said and launched == []


def test_held_out_text_that_is_trained_on_is_said(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("packed")
    config = load_run_config(run_with(tmp_path, "sources: [{path: other}, {path: link}]"))
    said = f"warning: eval.sources[1]: {tmp_path / 'link'} is trained on, too; its loss says nothing of other text"
    assert trained_on(config) == [said]
