"""What ends a command ends it cleanly, and what is ignored stays so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from telechat_twins.core import cli
from telechat_twins.core.commands import doctor
from telechat_twins.core.launch.signals import name_of, signals_as_interrupt
from tests.support.data_support import tiny_tokenizer_path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_ending_signal_is_an_interrupt(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught, signals_as_interrupt():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert signal.getsignal(number) is before and name_of(caught.value) == number.name
    assert name_of(KeyboardInterrupt()) == "SIGINT"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_says_which_signal_ended_it(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> int:
        os.kill(os.getpid(), number)
        time.sleep(1)
        return 0

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == ("" if number == signal.SIGINT else f"tele: ended by {number.name}\n")


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup, or in a shell's background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_as_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("The quick brown fox.\n" * 1_000_000)
    words = [str(text), "--tokenizer", str(tiny_tokenizer_path()), "--out", str(tmp_path / "out"), "--quiet"]
    command = subprocess.Popen([sys.executable, "-m", "telechat_twins.core.cli", "data", *words, "--threads", "1"])
    deadline = time.monotonic() + 60
    while not any(path.name.startswith(".tmp-") for path in tmp_path.iterdir()):
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    command.send_signal(number)
    assert command.wait(60) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]
