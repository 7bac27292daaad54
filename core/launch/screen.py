"""Terminal output of a launch: rank 0's log as it grows, and the last lines of a log that explains a failure."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from telechat_twins.core.shown import from_here


def last_lines(path: Path, lines: int = 10) -> str:
    """The last lines of a log without MindSpore's warnings, below a heading that names the file; "" for an empty log.

    A progress bar rewrites its line hundreds of times, separated by carriage returns; only its last state is kept.
    """
    if not path.exists():
        return ""
    text = path.read_bytes()[-50_000:].replace(b"\r\n", b"\n")
    states = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in text.split(b"\n")]
    kept = [line for line in states if line.strip() and not _NOISE.match(line)][-lines:]
    if not kept:
        return ""
    return f"the last lines of {from_here(str(path))}:\n" + b"\n".join(kept).decode("utf-8", errors="replace")


# MindSpore's own log lines, e.g. "[WARNING] ME(6411:1397,MainProcess):2026-...": kept in the files, not on the screen.
_NOISE = re.compile(rb"\[(DEBUG|INFO|WARNING)\] [A-Z_]+\(\d+[,:]")


class Screen:
    """Copies rank 0's log to this process's stdout, byte for byte (carriage returns too), without MindSpore's warnings.

    ``instead`` is called in place of every write, by callers that show progress of their own.
    """

    def __init__(self, log: Path, instead: Callable[[], None] | None = None) -> None:
        self.log, self.instead = log, instead
        self.offset = 0
        self.held = b""
        self.shown = b""  # the last bytes written, to know whether a traceback is among them

    def read(self) -> bytes:
        """New bytes of the log since the last call."""
        if not self.log.exists():
            return b""
        with open(self.log, "rb") as source:
            source.seek(self.offset)
            news = source.read()
        self.offset += len(news)
        return news

    def show(self, news: bytes, last: bool = False) -> None:
        """Write ``news``; a line that begins with "[" is held back until it is complete, since it may be a warning."""
        if self.instead is not None:
            self.instead()
            return
        text, self.held = self.held + news, b""
        out = []
        for piece in re.split(rb"(?<=[\r\n])", text):
            if piece[:1] == b"[" and piece[-1:] not in (b"\r", b"\n") and not last:
                self.held = piece
            elif not _NOISE.match(piece):
                out.append(piece)
        shown = b"".join(out)
        if not shown:
            return
        self.shown = (self.shown + shown)[-100_000:]
        target = getattr(sys.stdout, "buffer", None)
        if target is not None:
            sys.stdout.flush()
            target.write(shown)
        else:
            sys.stdout.write(shown.decode("utf-8", errors="replace"))
        sys.stdout.flush()
