"""Protocol of what takes part in a run besides its steps: evaluation at checkpoints, profiles, counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from telechat_twins.core.config import RunConfig
from telechat_twins.core.train.metrics import Row
from telechat_twins.core.train.stepper import Stepper

Note = Callable[[str], object]  # writes a line that stays on rank 0's console


class Hook:
    """Participant of a run. All ranks call the same methods at the same steps, so a hook may use collectives.

    The methods here do nothing: a hook overrides those that it needs. A UserError must be raised on all ranks
    (core.train.agreement.run_on_all).
    """

    def before_step(self, step: int) -> None:
        """Step ``step``, from 1, is about to begin."""

    def after_step(self, row: Row, saves: bool, note: Note) -> None:
        """A step has ended; ``row`` is recorded afterwards, so columns may be added to it. ``saves``: a checkpoint of
        the present weights follows, because one is due or the run ends."""

    def at_checkpoint(self, step: int, folder: Path, note: Note) -> None:
        """The checkpoint of ``step`` in ``folder`` has been written, or is being written in the background
        (``checkpoint.asynchronous``); the weights are still those in it."""

    def close(self) -> None:
        """The run has ended, in whatever way."""


class OpenHooks(Protocol):
    """Opens the hooks of a run in the folder ``out``; called once on every rank, when the model has been built."""

    def __call__(self, config: RunConfig, out: Path, stepper: Stepper) -> Sequence[Hook]: ...
