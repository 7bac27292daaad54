"""Escaping of untrusted text and values for display: one line, no control characters, bounded length.

Names of tensors, keys, files and vocabulary pieces come from untrusted files. Printed unchanged, an escape sequence
would be executed by the terminal, a line break would forge a log line, and a mark of the writing direction would
reorder the text around it.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import reprlib
import sys

LONGEST = 2_000  # characters of one message
_HEAD, _TAIL = 0.7, 0.25  # share kept of a longer one: its start says where and what, its end what to do
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # without tab and line feed
_DIGITS = 40  # of a whole number that is written out; 2**128 has 39


def printable(text: str, longest: int | None = LONGEST) -> str:
    """``text`` with all characters escaped that a terminal does not show as themselves, and cut in the middle if longer
    than ``longest``.

    Escaped, as in Python's ``repr``, are control characters, line breaks, marks of direction, unpaired surrogates and
    invisible spaces. Applying it twice has no further effect.
    """
    if longest is not None and len(text) > longest:
        head, tail = int(longest * _HEAD), int(longest * _TAIL)
        left_out = len(text) - head - tail
        return f"{printable(text[:head])} ... ({left_out} characters) ... {printable(text[-tail:])}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def from_here(text: str) -> str:
    """A message with every path inside the working folder named from there, as one types it.

    Runs keep whole paths (their folder may be used from elsewhere), and messages would quote these. ``text`` itself
    where the working folder is "/" or was removed.
    """
    try:
        folder = os.getcwd()
    except OSError:
        return text
    if folder == os.sep or folder not in text:
        return text
    return re.sub(rf"(?<![\w./~-]){re.escape(folder)}/(?=[^\s/])", "", text)


def message_line(text: object) -> str:
    """What a message says, as one printable line of bounded length with short paths (``from_here``)."""
    return printable(from_here(str(text)))


def escape_unencodable() -> None:
    """Make stdout write a character that its encoding lacks as JSON escapes it, where printing it would be an error: a
    terminal in GBK has neither Korean nor emoji, and bytes of a file's name may be no text."""
    codecs.register_error("json_escape", _escaped)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="json_escape")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def controls_shown(text: str) -> str:
    """A text of several lines for a terminal, with only its control characters escaped."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def shown(value: object) -> str:
    """``repr`` of bounded length and cost.

    A tree of YAML aliases can be far larger when written out than in memory, and Python refuses to write whole numbers
    of very many digits.
    """
    return _REPR.repr(value)


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 8
        self.maxstring = self.maxother = 200

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() * 0.30103 < _DIGITS:
            return repr(x)
        return f"{'-' if x < 0 else ''}(a whole number of about {int(x.bit_length() * 0.30103) + 1} digits)"


_REPR = _Repr()
