"""Help follows the width of the terminal that shows it."""

from __future__ import annotations

import argparse
import fcntl
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

from telechat_twins.core import cli
from telechat_twins.core.wrapped import _COMMAND, wrapped
from tests.house import ROOT

TABLE = """\
tpN    tensor parallel: matrices and heads   dpN    samples of the batch
cpN    context: every sequence, over a ring
       of processes
"""


def texts() -> Iterator[str]:
    """The overview, and what every verb and action says of itself."""

    def walk(parser: cli.Parser) -> Iterator[str]:
        yield from (text.replace("``", "`") for text in (parser.description, parser.epilog) if text)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    yield from walk(inner)

    yield cli.overview()
    for verb, summary in cli.VERBS.items():
        command = cli.command_module(verb)
        parser = cli.Parser(prog=f"tele {verb}", description=command.__doc__ or summary)
        command.add_arguments(parser)
        yield from walk(parser)


@pytest.mark.parametrize("width", [60, 79, 100])
def test_texts_keep_their_words_within_the_width(width: int) -> None:
    for text in texts():
        laid = wrapped(text, width)
        assert laid.split() == text.split()
        before = ""
        for line in laid.splitlines():
            copied = _COMMAND.match(line) or before.endswith("\\")
            assert len(line) <= width or copied or len(line.split()) == 1, line
            before = line


def test_tables_keep_their_columns() -> None:
    assert wrapped(TABLE, 40).splitlines() == [
        "tpN    tensor parallel: matrices and",
        "       heads",
        "dpN    samples of the batch",
        "cpN    context: every sequence, over a",
        "       ring of processes",
    ]


def test_help_is_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def help_at(columns: str, *words: str) -> list[str]:
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.main([*words, "--help"]) == 0
        return capsys.readouterr().out.splitlines()

    assert max(map(len, help_at("70", "merge"))) <= 70 < max(map(len, help_at("120", "merge")))
    assert help_at("120", "merge") == help_at("300", "merge")  # lines of 300 characters cannot be read
    assert help_at("60", "merge") == help_at("20", "merge")
    assert help_at("120") == cli.overview().splitlines() != help_at("70")
    assert max(len(line) for line in help_at("70", "parity", "locate") if not _COMMAND.match(line)) <= 70
    assert not any("``" in line for line in help_at("120", "serve"))  # as the pages have it


def test_help_follows_the_terminal_of_a_pager() -> None:
    """`tele merge --help | less`: stdout is a pipe, stderr the terminal."""
    master, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 72, 0, 0))
    command = [sys.executable, "-m", "telechat_twins.core.cli", "merge", "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=terminal, check=True)
    os.close(terminal)
    os.close(master)
    assert 60 < max(map(len, done.stdout.decode().splitlines())) <= 72
