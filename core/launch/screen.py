"""What a launch shows: rank 0's output as it comes, and the end of a log where that explains a failure."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path


def last_lines(path: Path, lines: int = 10) -> str:
    """The end of a log, less MindSpore's warnings, under a heading that names the file; "" when there is nothing.

    A progress bar writes its line anew hundreds of times, with carriage returns between: its last state counts.
    """
    if not path.exists():
        return ""
    text = path.read_bytes()[-50_000:].replace(b"\r\n", b"\n")
    states = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in text.split(b"\n")]
    kept = [line for line in states if line.strip() and not _NOISE.match(line)][-lines:]
    if not kept:
        return ""
    return f"the last lines of {path}:\n" + b"\n".join(kept).decode("utf-8", errors="replace")


# MindSpore's own log lines, e.g. "[WARNING] ME(6411:1397,MainProcess):2026-...": kept in the files, not on the screen.
_NOISE = re.compile(rb"\[(DEBUG|INFO|WARNING)\] [A-Z_]+\(\d+[,:]")


class Screen:
    """Rank 0's log on our terminal, byte for byte (carriage returns too), less MindSpore's warnings.

    ``instead`` is called in place of every showing, for a caller that has something better to show.
    """

    def __init__(self, log: Path, instead: Callable[[], None] | None = None) -> None:
        self.log, self.instead = log, instead
        self.offset = 0
        self.held = b""
        self.shown = b""  # the last bytes shown, to know whether a traceback has been seen

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
        """Write what may be shown: a line that starts with "[" waits for its end, since it may be noise."""
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
