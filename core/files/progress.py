"""Progress of reading and writing files, on a terminal."""

from __future__ import annotations

import sys


class Progress:
    """Progress bar over bytes with rate and time left; shown on a terminal only, so that logs stay readable."""

    def __init__(self, title: str, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, desc=title, unit="B", unit_scale=True, file=sys.stderr, disable=None, dynamic_ncols=True
        )

    def update(self, count: int) -> None:
        self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
