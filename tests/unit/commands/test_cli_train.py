"""`tele train` refuses what it can before a launcher starts, and hands the rest on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import telechat_twins.core.data.blend
import telechat_twins.core.launch.launcher
from telechat_twins.core import cli
from telechat_twins.core.checkpoint.read import whole
from telechat_twins.core.checkpoint.save import write_checkpoint
from telechat_twins.core.commands import train_growth
from telechat_twins.core.config import load_run_config
from telechat_twins.core.data.packed_files import FORMAT
from telechat_twins.core.launch import restarts
from telechat_twins.core.launch.worker import STOPPED
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.model.lora import AdapterBase, LoraConfig, adapter_record
from telechat_twins.core.parallel.layout import parse_layout


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been launched: the positional arguments, then the named ones."""
    calls: list[tuple[Any, ...]] = []

    def launch(*args: Any, **named: Any) -> int:
        calls.append((*args, named))
        return 0

    monkeypatch.setattr(telechat_twins.core.launch.launcher, "launch", launch)
    return calls


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(telechat_twins.core.data.blend, "open_blend", lambda *args: None)
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
    alone = {
        "nnodes": 1,
        "node_rank": 0,
        "master": None,
        "collective_timeout": telechat_twins.core.launch.launcher.COLLECTIVE_TIMEOUT_S,
        "stopped": STOPPED,
    }
    assert launched == [("pt", passed, 1, tmp_path / "out" / "logs", alone)]


def test_default_folder_is_named_after_config_and_backend(config: Path, launched: list[Any]) -> None:
    assert cli.main(["train", "--backend", "ms", "--config", str(config)]) == 0
    assert launched[0][3] == Path("runs/run-ms/logs")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--set", "train.stesp=3"], "train: unknown key 'stesp'; did you mean 'steps'?"),
        (["--set", "train.global_batch=3"], "train.micro_batch: 2 does not divide global_batch 3"),
        (
            ["--nproc", "2"],
            "parallel: layout single has 1 ranks but 2 processes were started; start 1, or set parallel",
        ),
        (["--nproc", "0"], "--nproc: must be at least 1, found 0"),
        (["--layout", "tp2", "--nproc", "4"], "layout tp2 has 2 ranks but 4 processes were started; start 2, or set"),
        (["--layout", "tp2.qp2"], "layout 'tp2.qp2': unknown part 'qp2'"),
        (["--layout", "tp3"], "parallel.tp: 3 does not divide model.num_heads 4; nearest tp that fits this model: 2"),
        (["--layout", "dp4"], "train.global_batch: 4 is not a multiple of dp 4 x micro_batch 2 = 8"),
        (["--set", "parallel.pp=40"], "parallel.pp: 40 stages are more than model.num_layers"),
        (
            ["--layout", "dp2", "--nnodes", "3"],
            "--nnodes: 3 machines cannot hold equal shares of the 2 ranks of layout",
        ),
        (
            ["--set", "parallel.dp=512", "train.global_batch=1024"],
            "--nnodes: the 512 ranks of layout dp512 need several machines, e.g. --nnodes 64 of 8 devices each",
        ),
        (["--layout", "dp2", "--nnodes", "2"], "--master: required with --nnodes 2; give HOST:PORT of node 0"),
        (["--layout", "dp2", "--nnodes", "2", "--master", "h"], "--master: expected HOST:PORT with a port from"),
        (["--master", "h:29500"], "--master: belongs to a job on several machines; give --nnodes too, or leave it out"),
        (["--growth", "flm-replica", "--nnodes", "0"], "--nnodes: must be at least 1, found 0"),
        (["--growth", "flm-replica", "--nnodes", "2"], "--master: required with --nnodes 2"),
        (["--init", "packed/meta.json"], "packed/meta.json: is a file; give the folder of a model or of a checkpoint"),
        (["--node-rank", "1"], "--node-rank: must be from 0 to 0 with --nnodes 1, found 1"),
        (["--nnodes", "0"], "--nnodes: must be at least 1, found 0"),
        (["--timeout", "-1"], "--timeout: must be 0 (never) or a number of seconds above it, found -1"),
        (["--timeout", "nan"], "--timeout: nan is out of range"),
        (["--timeout", "-1", "--growth", "flm-replica"], "--timeout: must be 0 (never) or a number of seconds above"),
        (["--resume", "nowhere"], "--resume: no folder nowhere"),
        (["--out", "packed"], "--out: packed holds packed data; give the run a folder of its own"),
    ],
)
def test_mistakes_stop_before_the_launch(
    extra: list[str],
    says: str,
    config: Path,
    launched: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(config.parent)
    Path("packed").mkdir()
    Path("packed/meta.json").write_text(json.dumps({"format": FORMAT}))
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


def sets(call: tuple[Any, ...]) -> list[str]:
    """The assignments that train.py is started with."""
    words = call[1]
    return [words[i + 1] for i, word in enumerate(words) if word == "--set"]


def test_a_layout_becomes_assignments_and_processes(config: Path, launched: list[Any]) -> None:
    words = ["train", "--backend", "pt", "--config", str(config)]
    assert cli.main([*words, "--layout", "tp2.pp2.gpipe.nozero", "--set", "train.steps=20"]) == 0
    wanted = ["parallel.pp=2", "parallel.tp=2", "parallel.schedule=gpipe", "parallel.zero1=false", "train.steps=20"]
    assert sets(launched[0]) == wanted, "the layout first, so that --set can refine it"
    assert launched[0][2] == 4
    assert load_run_config(config, sets(launched[0])).parallel == parse_layout("tp2.pp2.gpipe.nozero")
    assert cli.main([*words, "--layout", "single"]) == 0
    assert (sets(launched[1]), launched[1][2]) == ([], 1)
    assert cli.main([*words, "--layout", "tp2.pp2", "--set", "parallel.tp=1"]) == 0
    assert (sets(launched[2]), launched[2][2]) == (["parallel.pp=2", "parallel.tp=1"], 2), "none is set twice"


def test_a_layout_takes_the_place_of_the_configs(config: Path, launched: list[Any]) -> None:
    tree = yaml.safe_load(config.read_text())
    tree["parallel"] = {"pp": 2, "stage_layers": [1, 1], "zero1": False, "bucket_mb": 5.0}
    tree["model"] = {"preset": tree["model"], "num_layers": 2}
    config.write_text(yaml.safe_dump(tree))
    words = ["train", "--backend", "ms", "--config", str(config)]
    assert cli.main(words) == 0
    assert (sets(launched[0]), launched[0][2]) == ([], 2), "processes as the config's own layout needs"
    assert cli.main([*words, "--layout", "dp2.tp2"]) == 0
    assert launched[1][2] == 4
    passed = load_run_config(config, sets(launched[1])).parallel
    assert passed == dataclasses.replace(parse_layout("dp2.tp2"), bucket_mb=5.0), "a layout's text has no bucket size"


def test_nodes_share_the_layout(config: Path, launched: list[Any], tmp_path: Path) -> None:
    words = ["train", "--backend", "ms", "--config", str(config), "--out", str(tmp_path / "out"), "--layout", "dp2.tp2"]
    nodes = ["--nnodes", "2", "--node-rank", "1", "--master", "10.0.0.1:29500", "--timeout", "30"]
    assert cli.main([*words, *nodes]) == 0
    named = {"nnodes": 2, "node_rank": 1, "master": "10.0.0.1:29500", "collective_timeout": 30.0, "stopped": STOPPED}
    assert launched[0][2:] == (2, tmp_path / "out" / "logs", named)
    assert cli.main([*words, *nodes, "--nproc", "2"]) == 0


def test_the_help_names_the_default_timeout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"(default {telechat_twins.core.launch.launcher.COLLECTIVE_TIMEOUT_S:g}; 0: never)" in text
    examples = [word for word in re.findall(r"--layout (\S+)", text) if not word.startswith("TEXT")]
    assert [parse_layout(word).world for word in examples] == [4, 16, 16]


def test_a_death_is_followed_by_starts_from_the_latest_checkpoint(
    config: Path, launched: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two deaths, the second after a checkpoint; the third start ends the run. Each keeps its logs."""
    out, attempts = config.parent / "out", []
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.01)

    def launch(backend: str, words: list[str], nproc: int, logs: Path, **named: Any) -> int:
        attempts.append((words[4:], os.environ["TELE_ATTEMPT"]))
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "worker_0.log").write_text(str(len(attempts)))
        if len(attempts) == 2:
            (out / "latest").write_text("step-00000004\n")
        return 0 if len(attempts) == 3 else 1

    monkeypatch.setattr(telechat_twins.core.launch.launcher, "launch", launch)
    words = ["train", "--backend", "pt", "--config", str(config), "--out", str(out)]
    assert cli.main([*words, "--restarts", "2"]) == 0
    assert attempts == [([], "0"), (["--resume", "auto"], "1"), (["--resume", "auto"], "2")]
    assert [(out / "logs" / f"attempt-{n}" / "worker_0.log").read_text() for n in (0, 1)] == ["1", "2"]
    said = capsys.readouterr().err
    assert "restart 1 of 2 in 0 s, from the beginning, since there is no checkpoint" in said
    assert "restart 2 of 2 in 0 s, from the checkpoint of step 4 (the launch ended with code 1)" in said
    assert "TELE_ATTEMPT" not in os.environ


@pytest.mark.parametrize(("code", "ends"), [(2, 2), (130, 130), (STOPPED, 1)])
def test_what_another_start_would_not_change_is_final(
    code: int, ends: int, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [code, 0]
    monkeypatch.setattr(telechat_twins.core.launch.launcher, "launch", lambda *_, **__: codes.pop(0))
    words = ["train", "--backend", "pt", "--config", str(config), "--out", str(config.parent / "out")]
    assert cli.main([*words, "--restarts", "3"]) == ends
    assert codes == [0]


def test_a_finished_stage_of_growth_keeps_no_lock_of_a_killed_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage: Any = SimpleNamespace(name="small", end=4, plan=None)
    left = [tmp_path / "1-small" / ".lock", tmp_path / "1-small" / "logs" / ".lock"]
    for lock in left:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    monkeypatch.setattr(train_growth, "saved_step", lambda run: 4)
    assert train_growth._train([stage], 1, tmp_path, argparse.Namespace(node_rank=0)) == 0
    assert not any(lock.exists() for lock in left)


def test_an_adapter_is_resumed_beside_its_base(
    config: Path, launched: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint has no base in it, so that --init goes together with --resume, and knows where the base was."""
    monkeypatch.chdir(config.parent)
    shape = {"preset": "telechat2-tiny", "hidden_size": 8, "ffn_hidden_size": 8, "num_layers": 1, "vocab_size": 32}
    blend = SimpleNamespace(vocab_size=32, end_token=None)
    monkeypatch.setattr(telechat_twins.core.data.blend, "open_blend", lambda *args: blend)
    tree = yaml.safe_load(config.read_text()) | {"model": shape, "lora": {"rank": 2}}
    tree["train"]["init"] = "elsewhere"
    config.write_text(yaml.safe_dump(tree))
    model = load_model_config(shape)
    described = {"config": model.to_dict()}
    weights = [whole(name, array) for name, array in init_weights(model, 1).items()]
    state = {"trainer": {"step": 0}, "weights": weights}
    write_checkpoint(base := Path("base"), 0, model=described, **state)
    record = adapter_record(model, LoraConfig(rank=2), AdapterBase(path=str(base), fingerprint="0" * 64))
    write_checkpoint(Path("adapter"), 0, model=described | {"adapter": record.to_dict()}, **state)

    words = ["train", "--backend", "ms", "--config", str(config), "--out", "out", "--resume"]
    assert cli.main([*words, "adapter"]) == 2
    says = "train.init: elsewhere: no such folder; the adapter adapter was trained on base: give that model with --init"
    assert says in capsys.readouterr().err
    assert cli.main([*words, "base", "--init", "base"]) == 2
    assert "--init, --resume: both name what the run begins with" in capsys.readouterr().err
    assert launched == []
    assert cli.main([*words, "adapter", "--init", "base"]) == 0
    assert launched[0][1][-4:] == ["--set", f'train.init="{base.resolve()}"', "--resume", "adapter"]
