"""Progress of reading and writing files, on a terminal."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, TextIO


def bar_width(stream: TextIO) -> dict[str, Any]:
    """What keeps a tqdm bar on one line: the terminal's width at each refresh; for a rank's log, which the launcher
    copies to its terminal, COLUMNS, which it sets. tqdm itself does not read that."""
    try:
        terminal = os.isatty(stream.fileno())
    except (OSError, ValueError):
        terminal = False
    return {"dynamic_ncols": True} if terminal else {"ncols": max(shutil.get_terminal_size().columns - 1, 20)}


class Progress:
    """Progress bar over bytes with rate and time left; shown on a terminal only, so that logs stay readable."""

    def __init__(self, title: str, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            desc=title,
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            disable=None,
            **bar_width(sys.stderr),
        )

    def update(self, count: int) -> None:
        self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
