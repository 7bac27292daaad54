"""Shown commands that need a framework: training under both launchers, resume across, generation from the result.

Each runs as shown, with fewer and smaller steps. What tests/docs.py calls light is run by
tests/unit/house/test_docs.py.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from telechat_twins.core.train.metrics import read_metrics
from tests import docs
from tests.house import ROOT
from tests.support.docs_workspace import add_checkout, add_demo, add_packed, add_release, add_text
from tests.support.launching import one_rank_here

SHORTER = ("train.steps=2", "optim.warmup_steps=0", "train.global_batch=2", "train.micro_batch=2")
RESUMED = ("train.steps=4",)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mindspore").runtime.launch_blocking()
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("docs")
    add_text(folder)
    add_release(folder)
    add_demo(folder)
    add_packed(folder)
    add_checkout(folder)
    return folder


def shorter(command: docs.Command) -> docs.Command:
    """The command with what makes it seconds long; a talk gets a question."""
    if "chat" in command.words:
        return dataclasses.replace(
            command, words=(*command.words, "--max-new-tokens", "4"), stdin_text="hello\n/exit\n"
        )
    if "train" in command.words or command.words[0] != "tele":
        more = (*SHORTER, *(RESUMED if "--resume" in command.words else ()))
        return command.setting(*more)
    return command


@contextmanager
def launched(command: docs.Command) -> Iterator[subprocess.Popen[bytes]]:
    """msrun or torchrun as a user starts it in the environment; what is left of it at the end is ended."""
    beside = Path(sys.executable).parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program, *words = command.words
    option = "--master_port" if program == "msrun" else "--master-port"
    env = {
        **os.environ,
        "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    process = subprocess.Popen([beside / program, f"{option}={port}", *words], env=env, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_commands_run(workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """In the order of the page; the raw launchers, on which nothing builds, beside the commands that follow them.

    The raw launchers start processes; a run of one rank takes place here.
    """
    monkeypatch.chdir(workspace)
    one_rank_here(monkeypatch)
    shown = docs.to_run("parity")
    # Pages whose lines need no earlier page.
    alone = {"docs/benchmarks.md", "docs/kernels.md", "docs/convert.md", "docs/records.md", "docs/evaluation.md"}
    together = {"README.md", "docs/tour.md"}
    assert {c.page for c in shown} - alone == together, "a page whose lines build on one another needs a folder"
    with ExitStack() as stack:
        beside = []
        for command in map(shorter, shown):
            if command.words[0] != "tele":
                beside.append((command, stack.enter_context(launched(command))))
                continue
            code = docs.run(command, monkeypatch)
            assert code == 0, f"{command.where}: {command.text}\n{capfd.readouterr()}"
        for command, process in beside:
            assert process.wait(120) == 0, f"{command.where}: {command.text}\n{capfd.readouterr()}"
    losses = {
        name: [row["loss"] for row in read_metrics(Path("runs") / name)]
        for name in ("first", "raw-ms", "raw-pt", "third")
    }
    assert losses["raw-ms"] == losses["first"], "msrun by hand is what tele does"
    # fp32, two steps from the same weights: rounding is 1e-7.
    assert losses["raw-pt"] == pytest.approx(losses["first"], rel=1e-5)
    assert [row["step"] for row in read_metrics(Path("runs/third"))] == [3, 4]
    assert Path("telechat2-tiny-hf/tokenizer.model").is_file()


LAUNCHES = [c for page in docs.PAGES for c in docs.commands(ROOT, page) if c.words[0] in ("msrun", "torchrun")]


@pytest.mark.parametrize("command", LAUNCHES, ids=lambda c: c.where)
def test_the_launchers_know_their_options(command: docs.Command, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = command.words
    assert parse_launch(program, words, monkeypatch).endswith("train.py")
    with pytest.raises(SystemExit):
        parse_launch(program, ["--no_such_option=1", *words], monkeypatch)


def parse_launch(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The script, as the launcher's own parser finds it; SystemExit on an option it does not know."""
    if program == "torchrun":
        pytest.importorskip("torch")
        from torch.distributed.run import parse_args

        return parse_args(words).training_script
    pytest.importorskip("mindspore")
    from mindspore.parallel.cluster.run import get_args

    monkeypatch.setattr(sys, "argv", [program, *words])
    return get_args().task_script
