"""Tracker in a thread of its own: no step waits for a server or a disk, and no failure of a tracker ends a training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from telechat_twins.core.shown import printable
from telechat_twins.core.train.metrics import Row
from telechat_twins.core.train.run.hooks import Note
from telechat_twins.core.train.track.protocol import Tracker

CLOSE_S = 60.0  # for what is still held when the run ends
HELD = 10_000  # rows that wait; what comes beyond them is left out


class Background:
    """core.train.track.protocol.Tracker that hands the rows on, in order, to one that ``open_tracker`` opens."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], note: Note) -> None:
        self._name, self._open, self._note = name, open_tracker, note
        self._rows: queue.Queue[Row | None] = queue.Queue(HELD)
        self.failed: BaseException | None = None
        self._left_out = 0
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def step(self, row: Row) -> None:
        if self.failed is None:
            try:
                self._rows.put_nowait(dict(row))
            except queue.Full:
                self._left_out += 1

    def close(self) -> None:
        """Wait for what is held, at most CLOSE_S; say what is missing."""
        if self.failed is None:
            try:
                self._rows.put(None, timeout=CLOSE_S)
            except queue.Full:
                self._left_out += self._rows.qsize()
            self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._note(f"warning: {self._name} has not finished after {CLOSE_S:.0f} s; metrics.jsonl has every step")
        elif self._left_out:
            self._note(f"warning: {self._name} was too slow for {self._left_out} steps; metrics.jsonl has them")

    def _work(self) -> None:
        try:
            tracker = self._open()
            while (row := self._rows.get()) is not None:
                tracker.step(row)
            tracker.close()
        except BaseException as error:  # SystemExit too: some libraries exit where they cannot log in
            self.failed = error
            reason = printable(f"{type(error).__name__}: {error}".splitlines()[0])
            self._note(f"warning: {self._name} has stopped ({reason}); training goes on, metrics.jsonl has every step")
