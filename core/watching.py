"""Configuration of what watches a run without changing it: trackers, profiles, the peak that the MFU is a share of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from telechat_twins.core.errors import UserError
from telechat_twins.core.schema import option

TRACKERS = ("tensorboard", "swanlab", "wandb", "mlflow")
# Options of a run that only observe it: with others it is the same run.
OBSERVING = ("track", "train.profile", "train.peak_tflops", "train.machine", "train.record_")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Steps that the framework's profiler records (core.train.watch.profile)."""

    from_: int = option(help="first step that is recorded", min=1)
    steps: int = option(2, help="how many steps are recorded; a trace has megabytes a step", min=1, max=100)


def check_watching(track: Sequence[str], peak_tflops: float | None, machine: str | None) -> None:
    """UserError for a tracker named twice, and for two peaks."""
    if len(set(track)) < len(track):
        raise UserError(f"track: names a tracker twice: {', '.join(track)}; name each once")
    if peak_tflops is not None and machine is not None:
        raise UserError("train.machine, train.peak_tflops: both give the peak of a device; leave one out")
