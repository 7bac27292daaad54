"""Protocol of a tracker: a program that shows the metrics of runs, besides metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from telechat_twins.core.train.metrics import Row
from telechat_twins.core.types import JsonObject

PROJECT = "telechat-twins"  # unless the tracker's own environment variable names another


class Tracker(Protocol):
    """Receiver of the rows of one run. Only rank 0 has trackers."""

    def step(self, row: Row) -> None:
        """A finished step; core.train.track.tags.points has its numbers."""
        ...

    def close(self) -> None:
        """The run has ended: write what is still held."""
        ...


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is opened with: the run's name, folder, configuration, and the steps done before this start."""

    name: str
    folder: Path
    config: JsonObject
    done: int
