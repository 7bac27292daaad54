"""`tele train --growth` and `tele parity --growth` as they are called, with ranks of both backends.

The interrupted run has launches of its own; all other layouts share their ranks (tests.support.warm_ranks).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import telechat_twins.convert.growth.weights
from telechat_twins.convert.growth.schedule import cost, load_schedule
from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.cli import main
from telechat_twins.core.commands.parity.growth import growth_sections
from telechat_twins.core.errors import UserError
from telechat_twins.core.train.metrics import read_metrics
from tests import docs
from tests.house import ROOT
from tests.support.docs_workspace import add_checkout, add_demo, add_packed, add_text
from tests.support.frameworks import BACKENDS
from tests.support.launching import one_rank_here
from tests.support.packed import write_packed
from tests.support.parity_samples import breaks_schema
from tests.support.warm_ranks import Pool

VOCAB, SEQ_LEN = 211, 32
SMALL = {"preset": "telechat2-tiny", "vocab_size": VOCAB, "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2}
WIDE = {"hidden_size": 96, "num_heads": 8, "num_kv_heads": 2, "head_dim": 16, "ffn_hidden_size": 128}
STAGES: list[dict[str, Any]] = [
    {"name": "small", "steps": 8, "model": SMALL},
    {
        "name": "wide",
        "steps": 6,
        "model": {**SMALL, **WIDE},
        "grow": {"anneal_steps": 4, "seed": 1},
        "parallel": {"tp": 2},
        "optim": {"rewarmup_steps": 2},
    },
    {
        "name": "deep",
        "steps": 4,
        "model": {**SMALL, **WIDE, "num_layers": 4, "vocab_size": 216},
        "grow": {"method": "zero", "depth": "stack"},
        "parallel": {"pp": 2},
        "optim": {"rewarmup_steps": 2},
    },
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run, schedule)"""
    folder = tmp_path_factory.mktemp("growth")
    write_packed(folder / "packed", VOCAB, SEQ_LEN, sequences=100)
    run = {
        "model": SMALL,
        "data": {"sources": [{"path": "packed"}], "seq_len": SEQ_LEN},
        "train": {"steps": 20, "global_batch": 4, "micro_batch": 2},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "growth.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    return folder / "run.yaml", folder / "growth.yaml"


def arguments(backend: str, files: tuple[Path, Path], out: Path) -> list[str]:
    return ["train", "--backend", backend, "--config", str(files[0]), "--growth", str(files[1]), "--out", str(out)]


@pytest.fixture(scope="module")
def grown(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> dict[str, Path]:
    """The whole schedule in both backends; PyTorch's was interrupted in the second stage and gone on with."""
    runs = {name: tmp_path_factory.mktemp(name) / "out" for name in BACKENDS}
    with pytest.MonkeyPatch.context() as patch:
        one_rank_here(patch, pool=pool)
        assert main(arguments("ms", files, runs["ms"])) == 0
    command = [sys.executable, "-m", "telechat_twins.core.cli", *arguments("pt", files, runs["pt"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step  9/14"):
                os.kill(process.pid, signal.SIGINT)
                break
        process.stdout.read()
    assert process.wait() == 130
    begun = len(read_metrics(runs["pt"] / "2-wide"))
    assert 1 <= begun < 6
    assert not (runs["pt"] / "3-deep").exists()
    with pytest.MonkeyPatch.context() as patch:
        one_rank_here(patch, pool=pool)
        assert main([*arguments("pt", files, runs["pt"]), "--resume", "auto"]) == 0
    return runs


def test_one_curve_through_all_stages(grown: dict[str, Path]) -> None:
    rows = {name: read_metrics(out) for name, out in grown.items()}
    for name, out in grown.items():
        assert [row["step"] for row in rows[name]] == list(range(1, 19))
        assert [row.get("mask") for row in rows[name]] == [None] * 8 + [0.0, 0.25, 0.5, 0.75] + [None] * 6
        assert (out / "loss.png").stat().st_size > 10_000
    apart = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(rows["ms"], rows["pt"], strict=True)]
    assert max(apart) <= 1e-4
    assert [row["lr"] for row in rows["ms"]] == [row["lr"] for row in rows["pt"]]


def test_what_the_run_leaves(grown: dict[str, Path], files: tuple[Path, Path]) -> None:
    for out in grown.values():
        report = json.loads((out / "report.json").read_text())
        assert [stage["layout"] for stage in report["stages"]] == ["single", "tp2", "pp2"]
        assert [stage["steps"] for stage in report["stages"]] == [[0, 8], [8, 14], [14, 18]]
        total = cost(load_schedule(files[1], files[0]))
        assert report["flops"] == total.by_parameters
        assert 0.0 < report["flops_saved"] < 1.0
        assert "| wide |" in (out / "report.md").read_text()
        last = open_checkpoint(out / "3-deep")
        assert [growth["method"] for growth in last.model["grown"]] == ["masked", "zero"]
        assert last.model["config"]["vocab_tokens"] == VOCAB
        assert last.model["config"]["growth"] is None


def test_a_finished_run_has_nothing_left_to_do(grown: dict[str, Path], files: tuple[Path, Path]) -> None:
    before = (grown["pt"] / "3-deep" / "metrics.jsonl").stat().st_mtime_ns
    assert main([*arguments("pt", files, grown["pt"]), "--resume", "auto"]) == 0
    assert (grown["pt"] / "3-deep" / "metrics.jsonl").stat().st_mtime_ns == before


def test_parity_around_a_growth(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_rank_here(monkeypatch)
    schedule = tmp_path / "growth.yaml"
    stages = [STAGES[0], {key: value for key, value in STAGES[1].items() if key != "parallel"}]
    schedule.write_text(yaml.safe_dump({"stages": stages}))
    options = ["--config", str(files[0]), "--growth", str(schedule), "--steps", "6", "--out", str(tmp_path / "parity")]
    assert main(["parity", *options]) == 0
    told = capsys.readouterr().out
    assert "EQUAL: all" in told
    for title in ("before", "at c = 0", "at c = 0.4", "at c = 1", "6 steps after growth"):
        assert f"small to wide: {title}" in told
    data = json.loads((tmp_path / "parity" / "report.json").read_text())
    assert len({bound["section"] for bound in data["bounds"]}) == 5 and data["kind"] == "growth"
    assert breaks_schema(tmp_path / "parity" / "report.json") == []
    assert "**EQUAL" in (tmp_path / "parity" / "report.md").read_text()


def test_parity_sees_a_growth_gone_wrong(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """New rows of the stream that are not masked, and a neuron of the old model lost."""
    stages = load_schedule(files[1], files[0])

    def broken(number: int) -> list[str]:
        sections = growth_sections(stages[number], stages[number + 1], ["pt"])
        return [bound.what for section in sections for bound in section.bounds if not bound.holds]

    assert broken(0) == broken(1) == []
    real = telechat_twins.convert.growth.weights._place_old

    def lost(rule: Any, rows: slice, old: Any, out: Any) -> None:
        real(rule, rows, old, out)
        if rule.source == "layers.0.ffn.down.weight":
            out[:, 5] = 0.0

    monkeypatch.setattr(telechat_twins.convert.growth.weights, "_place_old", lost)
    assert "float64: logits unchanged" in broken(0)
    monkeypatch.setattr(telechat_twins.convert.growth.weights, "_place_old", real)
    rule = telechat_twins.convert.growth.weights._rule

    def random_writers(plan: Any, name: str) -> Any:
        found = rule(plan, name)
        return found if not name.endswith("ffn.down.weight") else type(found)(
            found.shape, found.source, found.index, tuple(part & False for part in found.zero)
        )  # fmt: skip

    monkeypatch.setattr(telechat_twins.convert.growth.weights, "_rule", random_writers)
    assert "float64: logits unchanged" in broken(1)


def change(number: int, **changes: Any) -> list[dict[str, Any]]:
    stages = [dict(stage) for stage in STAGES]
    stages[number] |= changes
    return [{key: value for key, value in stage.items() if value is not None} for stage in stages]


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([], "expected `stages:` and a list of them"),
        (change(1, steps=0), r"stages\[1\].steps: must be a whole number of at least 1, found 0"),
        (change(1, name="a/b"), r"stages\[1\].name: give a short name"),
        (change(1, name="small"), "two stages are named 'small'"),
        (change(1, step=3), r"stages\[1\]: unknown key 'step'"),
        (change(1, grow={"method": "net2net"}), r"stages\[1\] \(wide\).grow.method: 'net2net' is not one of"),
        (change(0, grow={}), r"stages\[0\] \(small\).grow: the first stage grows from nothing"),
        (change(1, grow={"anneal_steps": 7}), "the masks of stage 'wide' need 7 steps and it has 6"),
        (change(1, model={**SMALL, "hidden_size": 32}), r"\(wide\): target.hidden_size: 32 is smaller"),
        (change(1, train={"steps": 4}), r"stages\[1\].train.steps: is the same in all stages"),
        (change(1, parallel={"tp": 3}), "parallel.tp: 3 does not divide"),
        (change(1, optim={"lrr": 1.0}), r"\(wide\): optim: unknown key 'lrr'"),
        (change(1, model="nothing"), r"\(wide\).model.preset: no model preset 'nothing'"),
    ],
)
def test_mistakes_in_a_schedule(
    stages: Any, says: str, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = tmp_path / "growth.yaml"
    schedule.write_text(yaml.safe_dump({"stages": stages}))
    out = tmp_path / "out"
    assert main(arguments("pt", (files[0], schedule), out)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(UserError, match=says):
        raise UserError(error)
    assert not out.exists()


def test_options_that_do_not_go_with_growth(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra, says in (
        (["--layout", "tp2"], "--layout: cannot be combined with --growth"),
        (["--nproc", "2"], "--nproc: cannot be combined with --growth"),
        (["--resume", str(tmp_path)], "--resume: must be 'auto' with --growth"),
        (["--nnodes", "3"], "--master: required with --nnodes 3"),
        (["--nnodes", "3", "--master", "node0:29500"], "--nnodes: must divide the 1 ranks of stage 'small', found 3"),
    ):
        assert main([*arguments("pt", files, tmp_path / "out"), *extra]) == 2
        assert says in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("mine")
    assert main(arguments("pt", files, tmp_path / "out")) == 2
    assert "already has a run" in capsys.readouterr().err


def test_the_commands_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pool: Pool
) -> None:
    """docs/growth.md in its order, with fewer steps and, of the schedules, their first and last stage."""
    add_text(tmp_path)
    add_demo(tmp_path)
    add_packed(tmp_path)
    add_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    one_rank_here(monkeypatch, pool=pool)
    shorter = ["train.steps=2", "train.global_batch=2", "train.micro_batch=2", "optim.warmup_steps=0"]
    first = ["train", "--backend", "pt", "--config", "configs/train/telechat2-tiny.yaml", "--out", "runs/first"]
    assert main([*first, "--set", *shorter]) == 0
    for path in Path("configs/growth").glob("*-replica.yaml"):
        tree = yaml.safe_load(path.read_text())
        tree["stages"] = [tree["stages"][0], tree["stages"][-1]]
        for stage in tree["stages"]:
            stage["steps"] = 2
            stage.get("grow", {}).update(anneal_steps=1)
            stage.setdefault("optim", {}).update(warmup_steps=0, rewarmup_steps=1)
        path.write_text(yaml.safe_dump(tree))
    for command in docs.commands(ROOT, "docs/growth.md"):
        words = [*command.words]
        more: list[str] = []
        if "train" in command.words:
            more = [*shorter, *([] if "--growth" in command.words else ["train.steps=4", "optim.rewarmup_steps=1"])]
        elif "parity" in command.words:
            more = ["train.global_batch=2", "train.micro_batch=2", "data.seq_len=64"]
            words[words.index("--steps") + 1] = "2"
        shortened = replace(command, words=tuple(words))
        code = docs.run(shortened.setting(*more) if more else shortened, monkeypatch)
        assert code == 0, f"{command.where}: {command.text}\n{capsys.readouterr()}"
    assert read_metrics(Path("runs/large"))[0]["mask"] == 0.0
    assert len(read_metrics(Path("runs/flm"))) == 4
