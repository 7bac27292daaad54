"""Console progress of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TextIO

from telechat_twins.core.files.progress import bar_width
from telechat_twins.core.shown import from_here
from telechat_twins.core.train.metrics import Row


class Console:
    """Live progress on ``stream``: a tqdm bar on a terminal, otherwise (a log file, a pipe) plain lines.

    Plain lines come at growing intervals (a thirtieth of the time passed, between 1 and 60 seconds), so that a short
    run is seen to move and a week's log stays readable.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._total, self._done = total, done
        self._seconds: deque[float] = deque(maxlen=50)
        self._started = self._printed = time.monotonic()
        self._first = True
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="step", file=self._stream, **bar_width(self._stream))

    def note(self, text: str) -> None:
        """A line that stays: above the bar on a terminal. Paths inside the working folder are named from there."""
        text = from_here(text)
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def measure(self, row: Row) -> None:
        """Count one finished step in the estimate of the time left."""
        self._done = row["step"]
        self._seconds.append(row["step_ms"] / 1000)

    def step(self, row: Row) -> None:
        """Show one finished step, which has been measured."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {_number(row['loss'], '.4f')}, grad {_number(row['grad_norm'], '.3g')}, "
                f"{row['tokens_per_s']:,.0f} tok/s" + "".join(f", {part}" for part in usage(row)),
                refresh=False,
            )
            self._bar.update(1)
            return
        now = time.monotonic()
        if self._first or self._done == self._total or now - self._printed >= self._interval(now):
            self._first, self._printed = False, now
            self.note(format_row(row, self._total, self.seconds_left()))

    def seconds_left(self) -> float:
        """Estimated from the mean of the last 50 steps."""
        return (self._total - self._done) * sum(self._seconds) / max(1, len(self._seconds))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _interval(self, now: float) -> float:
        return min(60.0, max(1.0, (now - self._started) / 30))


def format_row(row: Row, total: int, seconds_left: float) -> str:
    """One step as a line of text, e.g. ``step  20/300  loss 5.1234  grad 0.83  lr 3.0e-03  14,532 tok/s  eta 0:12``."""
    parts = [
        f"step {row['step']:>{len(str(total))}}/{total}",
        f"loss {_number(row['loss'], '.4f')}",
        f"grad {_number(row['grad_norm'], '.3g')}",
        f"lr {row['lr']:.2e}",
        f"{row['tokens_per_s']:,.0f} tok/s",
        f"eta {clock(seconds_left)}",
        *usage(row),
    ]
    return "  ".join(parts)


def usage(row: Row) -> list[str]:
    """How the machine is used, as far as a run measures it: MFU, device memory, communication; data only where a step
    waits for it noticeably."""
    parts = [f"mfu {row['mfu']:.1%}"] if "mfu" in row else []
    if "device_peak_gib" in row:
        parts.append(f"mem {row['device_peak_gib']:.1f} GiB")
    if "comm_share" in row:
        parts.append(f"comm {row['comm_share']:.0%}")
    if row.get("data_share", 0.0) >= 0.25 and row["step_ms"] >= 20:
        parts.append(f"data {row['data_share']:.0%}")
    return parts


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
