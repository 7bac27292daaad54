"""Profile of chosen steps (``train.profile``): a trace of each rank in RUN/profile, for Perfetto or chrome://tracing.

The traces are in the Trace Event Format (JSON): ``{"traceEvents": [{"ph": "X", "name", "ts", "dur", "pid", "tid"}]}``
with times in microseconds. PyTorch writes it so; what MindSpore writes, a bare list whose times are text, is brought
into this form.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from telechat_twins.core.config import ProfileConfig, RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.train.metrics import Row
from telechat_twins.core.train.run.hooks import Hook, Note
from telechat_twins.core.train.stepper import Stepper
from telechat_twins.core.types import JsonObject

FOLDER = "profile"
_NUMBERS = ("ts", "dur")


def check_profile(config: RunConfig) -> None:
    """UserError for a first step of ``train.profile`` that never comes."""
    given = config.train.profile
    if given is not None and given.from_ > config.train.steps:
        raise UserError(
            f"train.profile.from: {given.from_} is after the last step, {config.train.steps}; give an earlier one"
        )


def passed_note(config: RunConfig, done: int) -> list[str]:
    """A line for a run that goes on after ``done`` steps, past the first one of ``train.profile``."""
    given = config.train.profile
    if given is None or given.from_ > done:
        return []
    return [f"note: train.profile.from: step {given.from_} was made before this start, so nothing is profiled"]


def open_profile(config: RunConfig, out: Path, stepper: Stepper) -> list[Hook]:
    """The hook of ``train.profile``; none where it is not set."""
    given = config.train.profile
    return [] if given is None else [Profile(given, out / FOLDER, stepper)]


class Profile(Hook):
    """Records the steps ``given.from_`` and on by the backend's profiler."""

    def __init__(self, given: ProfileConfig, folder: Path, stepper: Stepper) -> None:
        self._given, self._stepper = given, stepper
        self._folder = folder / f"step-{given.from_:08d}"
        self._active = ExitStack()
        self._step_ended: Callable[[], object] | None = None
        self._left = given.steps

    def before_step(self, step: int) -> None:
        if step == self._given.from_:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._step_ended = self._active.enter_context(self._stepper.profiled(self._folder, self._given.steps))

    def after_step(self, row: Row, saves: bool, note: Note) -> None:
        if self._step_ended is None:
            return
        self._step_ended()
        self._left -= 1
        if not self._left:
            began = time.perf_counter()
            self.close()
            first, last = self._given.from_, row["step"]
            note(
                f"profiled steps {first} to {last}: {self._folder}/rank-*.json ({time.perf_counter() - began:.1f} s to "
                "write); open in https://ui.perfetto.dev"
            )

    def close(self) -> None:
        """End the recording, also of a run that ended before all its steps."""
        self._step_ended = None
        self._active.close()


def convert_trace(raw: Path, target: Path) -> None:
    """Write the trace that MindSpore's profiler left somewhere below ``raw`` as ``target``, in the standard form.

    FileNotFoundError when there is none.
    """
    found = sorted(raw.rglob("trace_view.json"))
    if not found:
        raise FileNotFoundError(f"{raw}: the profiler has written no trace_view.json")
    tree = json.loads(found[-1].read_text(encoding="utf-8"))
    events: list[JsonObject] = tree if isinstance(tree, list) else tree["traceEvents"]
    for event in events:
        event |= {key: float(event[key]) for key in _NUMBERS if key in event}
    target.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
