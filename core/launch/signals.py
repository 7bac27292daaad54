"""Signals that end a command: the same clean end for all of them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A KeyboardInterrupt that knows the signal that it stands for."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def name_of(interrupt: KeyboardInterrupt) -> str:
    """The name of the signal behind an interrupt: SIGINT where nothing else is known."""
    return signal.Signals(interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT).name


def _interrupt(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM and SIGHUP as for Ctrl-C, so that whatever ends a command, its temporary
    files go with it.

    A signal that is ignored stays so: SIGHUP under nohup, Ctrl-C in a shell's background. Outside the main thread,
    which alone may set signal handlers, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in INTERRUPTING}
    changed = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in changed:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)
