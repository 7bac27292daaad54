"""Help texts, which are written for 120 columns, laid out for the terminal that shows them."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap

WIDEST, NARROWEST = 120, 60
_COMMAND = re.compile(r' +(?:tele|msrun|torchrun|python|pip|eval(?= ")|--set) |.*\\$')  # copied, so never broken
_GAP = re.compile(r"(?<=\S) {2,}(?=\S)")  # between the columns of a table


def help_width() -> int:
    """Columns of help: COLUMNS, or those of the terminal behind stdout or, for a pager, behind stderr; the widest where
    there is neither."""
    columns = int(word) if (word := os.environ.get("COLUMNS", "")).isascii() and word.isdigit() else 0
    for stream in (sys.__stdout__, sys.__stderr__):
        try:
            columns = columns or (os.get_terminal_size(stream.fileno()).columns if stream else 0)
        except (OSError, ValueError):
            continue
    return min(max(columns or WIDEST, NARROWEST), WIDEST)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's own formatter at ``help_width``, which also holds for the descriptions it would leave as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=help_width())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(wrapped(text.replace("``", "`"), self._width), width, indent)


def wrapped(text: str, width: int) -> str:
    """A help text within ``width`` columns: paragraphs filled again, tables with what they say below itself, commands
    as they are. The text itself where it fits."""
    if max(map(len, text.splitlines()), default=0) <= width:
        return text
    made: list[str] = []
    lines = text.rstrip().splitlines()
    while lines:
        line = lines.pop(0)
        if not line.strip() or _COMMAND.match(line) or made and made[-1].endswith("\\"):
            made.append(line)
        elif not line.startswith(" ") and not _GAP.search(line):
            while lines and lines[0][:1].strip() and not _GAP.search(lines[0]):
                line += f" {lines.pop(0)}"
            made += _filled("", line, 0, width)
        else:
            made += _row(line, lines, width)
    return "\n".join(made)


def _row(line: str, lines: list[str], width: int) -> list[str]:
    """A row of a table, whose further ``lines`` are taken. Two rows side by side that do not fit come one below the
    other."""
    indent = len(line) - len(line.lstrip())
    cells = _GAP.split(line.strip())
    gap = _GAP.search(line, indent)
    hang = gap.end() if gap else indent
    if len(cells) == 4 and len(line) > width:
        second = " " * indent + cells[2] + " " * max(2, hang - indent - len(cells[2])) + cells[3]
        return _row(line[: line.rindex(cells[2])].rstrip(), [], width) + _row(second, [], width)
    rest = [line[hang:]] if gap else [line.strip()]
    deeper = re.compile(" " * (indent + 4) + " *[^ ]")
    while lines and gap and deeper.match(lines[0]):
        rest.append(lines.pop(0).strip())
    return _filled(line[:hang] if gap else " " * indent, " ".join(rest), hang, width)


def _filled(first: str, text: str, hang: int, width: int) -> list[str]:
    """``text`` behind ``first``, further lines below its begin."""
    space = " " * (hang if width - hang >= 20 else len(first) - len(first.lstrip()) + 4)
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )
