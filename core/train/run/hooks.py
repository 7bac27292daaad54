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

    ``judges``: ``judge`` evaluates checkpoints, which takes long: each is finished on the disk before it is called.
    """

    judges = False

    def before_step(self, step: int) -> None:
        """Step ``step``, from 1, is about to begin."""

    def after_step(self, row: Row, saves: bool, note: Note) -> None:
        """A step has ended; ``row`` is recorded afterwards, so columns may be added to it. ``saves``: a checkpoint of
        the present weights follows, because one is due or the run ends."""

    def at_checkpoint(self, step: int, folder: Path, note: Note) -> None:
        """The checkpoint of ``step`` in ``folder`` has been written, or is being written in the background
        (``checkpoint.asynchronous``); the weights are still those in it."""

    def judge(self, step: int, checkpoint: Path, note: Note, stopped: Callable[[], bool]) -> Row:
        """The figures of the checkpoint of ``step``, which are recorded as a further row of that step. ``stopped``:
        whether a signal came meanwhile; a collective, as all ranks call it. ``judged`` follows when they are kept."""
        return {}

    def judged(self, step: int) -> None:
        """The figures of ``judge`` have been recorded."""

    def unfinished(self, step: int, due: bool) -> bool:
        """Whether an interrupted run was to judge the checkpoint of ``step`` and did not finish. ``due``: it was saved
        where a run without interruption saves one, too. True on one rank counts for all."""
        return False

    def close(self) -> None:
        """The run has ended, in whatever way."""


class OpenHooks(Protocol):
    """Opens the hooks of a run in the folder ``out``; called once on every rank, when the model has been built."""

    def __call__(self, config: RunConfig, out: Path, stepper: Stepper) -> Sequence[Hook]: ...
