"""One writer at a time in a folder: who comes second is turned away and told by whom."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import telechat_twins.core.cli
import telechat_twins.core.commands.mup.search
import telechat_twins.core.data.blend
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import process_mark
from telechat_twins.core.launch import launcher as launching
from telechat_twins.core.launch import run_lock
from telechat_twins.core.launch.run_lock import hold_folder, hold_place, require_free
from telechat_twins.core.train import loop, records
from tests.house import ROOT
from tests.support.data_support import tiny_tokenizer_path
from tests.support.growing import TINY
from tests.support.numpy_stepper import MemoryBlend, NumpyStepper, run_config

HOLDER = """
import sys, time
from telechat_twins.core.launch.run_lock import hold_folder, hold_place
with (hold_place if sys.argv[2] == "place" else hold_folder)(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(path: Path, kind: str = "folder") -> subprocess.Popen[str]:
    """Another process that has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), kind], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder that another process holds, and what a message says of that one."""
    folder = tmp_path_factory.mktemp("held") / "run"
    process = holder(folder)
    since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    yield folder, rf"process {process.pid} on host {socket.gethostname()} \({since}\) writes there"
    process.kill()
    process.communicate()


def test_the_second_is_told_of_the_first(held: tuple[Path, str]) -> None:
    folder, says = held
    for again in (hold_folder(folder, "--out x"), hold_folder(folder, "--out x", patience=0.2)):
        with pytest.raises(UserError, match=f"^--out x: {says}; wait for it, end it, or give another folder$"), again:
            pytest.fail("two had it")
    with pytest.raises(UserError, match=says):
        require_free(folder)
    with hold_folder(folder, name=".lock-node1"):  # another machine's part of the same folder
        pass
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_nothing_is_left_and_the_next_may_come(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError), hold_folder(tmp_path / "a" / "b"):
            note = json.loads((tmp_path / "a" / "b" / ".lock").read_text())
            assert (note["host"], note["pid"]) == (socket.gethostname(), os.getpid())
            assert abs(note["since"] - time.time()) < 60
            raise RuntimeError
        require_free(tmp_path / "a" / "b")
        assert list((tmp_path / "a" / "b").iterdir()) == []
    require_free(tmp_path / "never made")
    assert not (tmp_path / "never made").exists()


def test_a_killed_holder_holds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = holder(tmp_path)
    process.kill()
    process.communicate()
    assert (tmp_path / ".lock").exists()
    with hold_folder(tmp_path, patience=run_lock.RELEASE_WAIT_S):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


def test_the_mark_of_another_machine_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = {"host": "elsewhere", "pid": 7, "mark": "7.1", "since": 0.0, "command": "tele"}
    (tmp_path / ".lock").write_text(json.dumps(note))
    with hold_folder(tmp_path, "--out x"):
        said = capsys.readouterr().err
    assert (
        said.startswith("tele: note: --out x: process 7 on host elsewhere (since 19")
        and "only one may write here" in said
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', '{"host": "h", "pid": "x", "mark": 1, "since": 1e400}'])
def test_a_note_that_says_nothing_is_no_hindrance(text: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(text)
    with hold_folder(tmp_path):
        handle = os.open(tmp_path / ".lock", os.O_RDWR)
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)
        os.close(handle)
        with pytest.raises(UserError, match="writes there"), hold_folder(tmp_path):
            pass


def test_without_locks_the_note_is_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with hold_folder(tmp_path, "--out x"):
        assert "tele: note: --out x: this file system has no locks (No locks available)" in capsys.readouterr().err
        with pytest.raises(UserError, match=f"process {os.getpid()} on host .* writes there"), hold_folder(tmp_path):
            pass
    dead = {"host": socket.gethostname(), "pid": os.getpid(), "mark": f"{os.getpid()}.1", "since": 1.0, "command": ""}
    (tmp_path / ".lock").write_text(json.dumps(dead))
    with hold_folder(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["mark"] == process_mark()


def test_a_second_training_is_refused_before_anything_is_touched(
    held: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever means it was started: each rank 0 comes through here."""
    monkeypatch.setattr(loop, "RELEASE_WAIT_S", 0.1)
    monkeypatch.setattr(loop, "open_blend", lambda data, seed, vocab_size, pad_token_id: MemoryBlend(seed))
    monkeypatch.setattr(records, "plot_losses", lambda runs, path, title, marks: path)
    with pytest.raises(UserError, match=f"^--out {held[0]}: {held[1]}"):
        loop.train(NumpyStepper, run_config(), held[0], "auto")
    assert [path.name for path in held[0].iterdir()] == [".lock"]
    loop.train(NumpyStepper, run_config(), tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_a_second_launch_leaves_the_logs_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launching.FRAMEWORK, "pt", "json")  # need not be installed to be refused
    with hold_folder(tmp_path / "logs"):
        (tmp_path / "logs" / "worker_0.log").write_text("of the first")
        with pytest.raises(UserError, match=f"process {os.getpid()} on host"):
            launching.launch("pt", [], log_dir=tmp_path / "logs")
        assert (tmp_path / "logs" / "worker_0.log").read_text() == "of the first"


def test_train_names_the_run_before_it_launches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the folder holds a run already, which would be refused in other words; other nodes have their own logs."""
    from tests.support.packed import write_packed

    monkeypatch.setattr(launching, "launch", lambda *words, **more: 0)
    monkeypatch.setattr(run_lock, "RELEASE_WAIT_S", 0.1)
    write_packed(tmp_path / "packed", 2048, 32)
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {preset: telechat2-tiny}\ndata: {sources: [{path: packed}], seq_len: 32}\n"
        "train: {steps: 20, global_batch: 4, micro_batch: 2}\noptim: {lr: 1e-3}\n"
    )
    out = tmp_path / "out"
    words = ["train", "--backend", "pt", "--config", str(config), "--out", str(out)]
    out.mkdir()
    (out / "latest").write_text("step-00000001\n")
    for folder in (out / "logs", out):
        process = holder(folder)
        assert telechat_twins.core.cli.main(words) == 2
        assert f"tele: --out {out}: process {process.pid} on host" in capsys.readouterr().err
        nodes = ["--nnodes", "2", "--node-rank", "1", "--master", "h:1", "--set", "parallel.dp=2", "--resume", "auto"]
        assert telechat_twins.core.cli.main([*words, *nodes]) == 0, "node 0 speaks for the run"
        process.kill()
        process.communicate()


def verbs(tmp_path: Path) -> dict[str, tuple[list[str], Path, str]]:
    """Words of each command that writes into a folder, that folder, and how it is held."""
    from tests.unit.convert.test_grow_files import write

    text, golden = tmp_path / "t.txt", ROOT / "tests" / "goldens" / "telechat2_gqa"
    text.write_text("some text\n")
    out = tmp_path / "out"
    small = write(tmp_path / "small", TINY)
    config = ROOT / "configs" / "train" / "telechat2-tiny.yaml"
    growth = ROOT / "configs" / "growth" / "flm-replica.yaml"
    search = ROOT / "configs" / "mup" / "teleflm-tiny.yaml"
    train = ["--backend", "pt", "--config", str(config), "--growth", str(growth)]
    return {
        "data": (["data", str(text), "--out", str(out), "--tokenizer", str(tiny_tokenizer_path())], out, "place"),
        "convert": (["convert", "--from", "hf", "--to", "canonical", str(golden), str(out)], out, "place"),
        "grow": (["grow", str(small), str(out), "--set", "num_layers=8"], out, "place"),
        "demo": (["demo", "--out", str(out)], out, "folder"),
        "parity": (["parity", "--config", str(config), "--out", str(out)], out, "folder"),
        "mup": (["mup", "search", "--backend", "pt", str(search), "--out", str(out)], out, "folder"),
        "parity growth": (["parity", *train[2:], "--out", str(out)], out, "folder"),
        "train growth": (["train", *train, "--out", str(out)], out, "folder"),
    }


@pytest.mark.parametrize("verb", ["data", "convert", "grow", "demo", "parity", "parity growth", "train growth", "mup"])
def test_other_commands_that_write_a_folder(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (telechat_twins.core.data.blend, telechat_twins.core.commands.mup.search):
        monkeypatch.setattr(place, "open_blend", lambda *words: None)
    words, out, kind = verbs(tmp_path)[verb]
    process = holder(out, kind)
    try:
        assert telechat_twins.core.cli.main(words) == 2
        said = capsys.readouterr().err
        assert f"process {process.pid} on host" in said and len(said.splitlines()) == 1, said
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    if kind == "place":
        assert telechat_twins.core.cli.main(words) == 0, capsys.readouterr().err
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_lock_of_a_place_puts_in_order_what_a_kill_left(tmp_path: Path) -> None:
    (tmp_path / ".old-tele-f").mkdir()
    (tmp_path / ".gone-tele-x").mkdir()
    with hold_place(tmp_path / "f"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock-tele-f", "f"]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_folder_that_cannot_be_locked_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    def refused(handle: int, how: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(OSError, match="Input/output error"), hold_folder(tmp_path):
        pass
