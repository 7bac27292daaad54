"""Foreign text and foreign values as they may be shown: on one line, without control characters, of bounded length.

Names of tensors, keys, files and pieces of a vocabulary come from files that anybody may have written. Printed as they
are, an escape sequence in one would be obeyed by the terminal, a line break would forge a line of a log, and a mark
of the writing direction would reorder what stands beside it.
"""

from __future__ import annotations

import re
import reprlib

LONGEST = 2_000  # characters of one message
_HEAD, _TAIL = 1_400, 500  # what is kept of a longer one: where and what, and the way out
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # without tab and line feed
_DIGITS = 40  # of a whole number that is written out; 2**128 has 39


def printable(text: str, longest: int | None = LONGEST) -> str:
    """``text`` with every character escaped that a terminal would not show as itself, cut in the middle if longer.

    Escaped are control characters, line breaks, marks of direction, unpaired surrogates and invisible spaces, as
    Python's own ``repr`` would write them. Applying it twice changes nothing.
    """
    if longest is not None and len(text) > longest:
        left_out = len(text) - _HEAD - _TAIL
        return f"{printable(text[:_HEAD])} ... ({left_out} characters) ... {printable(text[-_TAIL:])}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def controls_shown(text: str) -> str:
    """A text of several lines for a terminal: everything stays but control characters, which are escaped."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def shown(value: object) -> str:
    """Like ``repr``, but of bounded length and cost, whatever the value.

    A tree of YAML aliases can be far larger written out than in memory, and a whole number may have more digits than
    Python agrees to write.
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
