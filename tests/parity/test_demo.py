"""The whole way in small: `tele demo` on someone's own dialogues, then what it left behind."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from telechat_twins.convert.source import open_model
from telechat_twins.core.cli import main
from telechat_twins.core.data.demo_text import write_demo_text
from telechat_twins.core.train.metrics import read_metrics
from tests.support.launching import one_rank_here
from tests.support.parity_samples import breaks_schema

QUESTIONS = ("What is a rotary position?", "为什么要归一化？", "How is a key shared?", "什么是梯度？")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps on 240 rows of dialogue with their own small tokenizer."""
    folder = tmp_path_factory.mktemp("demo")
    rows = [
        {
            "system": "You answer briefly.",
            "dialog": [
                {"role": "user", "content": f"{QUESTIONS[i % 4]} ({i})"},
                {"role": "bot", "content": f"Answer number {i}: it turns by {i * 7 % 97} steps. 第{i}步。"},
            ],
            "multiturn": False,
            "tool": False,
        }
        for i in range(240)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    sample, tokenizer = folder / "sample.txt", folder / "tokenizer.model"
    texts = [turn["content"] for row in rows for turn in row["dialog"]]
    sample.write_text("".join(f"You answer briefly. {text}\n" for text in texts), encoding="utf-8")
    assert main(["tokenize", "train", str(sample), "--out", str(tokenizer), "--vocab-size", "400"]) == 0
    words = ["--data", data.name, "--tokenizer", tokenizer.name, "--steps", "12", "--out", "out"]
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        pytest.MonkeyPatch.context() as patch,
    ):
        one_rank_here(patch, real=("ms", "pt"))
        patch.chdir(folder)
        code = main(["demo", *words])
    print(printed.getvalue())  # pytest shows it after a failure
    assert code == 0
    (folder / "out" / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")
    return folder / "out"


def test_every_part_is_there(demo: Path) -> None:
    result = json.loads((demo / "demo.json").read_text())
    assert result["state"] == "done" and not result["broken"]
    for name in ("parity/report.md", "parity/report.json", "loss.png", "hf/config.json", "hf/model.safetensors"):
        assert (demo / name).stat().st_size > 0, name
    assert len(read_metrics(demo / "ms")) == len(read_metrics(demo / "pt")) == 12


def test_every_message_names_paths_from_the_working_folder(demo: Path) -> None:
    printed = (demo / "printed.txt").read_text(encoding="utf-8")
    assert str(demo.parent) not in printed
    for shown in ("out/packed/data: 100% of the samples", "of out/hf (fingerprint", "checkpoint out/ms/step-00000012"):
        assert shown in printed, shown


def test_the_verdict_counts_the_bounds_that_are_listed_and_in_the_report(demo: Path) -> None:
    """Those of the stages after training too: the hand-over, the export, the merged model."""
    result = (demo / "printed.txt").read_text(encoding="utf-8").split("== result")[1]
    listed = re.findall(r"^  (?:ok    |BROKEN)  (.*?)  +\S+  limit ", result, re.MULTILINE)
    data = json.loads((demo / "parity" / "report.json").read_text())
    assert f"EQUAL: all {len(listed)} bounds hold" in result and len(listed) == len(data["bounds"])
    sections = {bound["section"] for bound in data["bounds"]}
    assert {"one batch", "training", "after the hand-over", "export"} <= sections
    assert "after the hand-over: loss, steps 1 to 2" in listed and "export: greedy tokens that differ" in listed
    page = (demo / "parity" / "report.html").read_text(encoding="utf-8")
    assert page.count("<tr data-key") == len(listed) and breaks_schema(demo / "parity" / "report.json") == []


def test_pytorch_went_on_where_mindspore_stopped(demo: Path) -> None:
    rows = read_metrics(demo / "crossed")
    assert [row["step"] for row in rows[-2:]] == [13, 14]


def test_the_export_is_a_released_folder(demo: Path) -> None:
    source = open_model(demo / "hf")
    assert source.config.vocab_size == 400
    assert source.tokenizer_path is not None


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "must be empty, new or an earlier demo's folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "x"


def test_python_brings_enough_text(tmp_path: Path) -> None:
    files = write_demo_text(tmp_path / "text")
    sizes = {name: file.stat().st_size for name, file in files.items()}
    assert sizes["english"] > 300_000 and sizes["code"] > 300_000 and sizes["chinese"] > 5_000, sizes
    rows = [json.loads(line) for line in files["chinese"].read_text(encoding="utf-8").splitlines()]
    assert any("\u4e00" <= c <= "\u9fff" for row in rows for c in row["text"])
