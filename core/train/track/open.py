"""Opening of the trackers that ``track:`` names."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from telechat_twins.core.backends import install_command
from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.train.run.hooks import Note
from telechat_twins.core.train.track.background import Background
from telechat_twins.core.train.track.protocol import TrackedRun, Tracker
from telechat_twins.core.train.track.tensorboard import TensorBoard

EXTERNAL = ("swanlab", "wandb", "mlflow")  # packages of these names, each an extra of the same name


def require_trackers(names: Sequence[str]) -> None:
    """UserError for a tracker whose package is not installed."""
    for name in names:
        if name in EXTERNAL and importlib.util.find_spec(name) is None:
            raise UserError(f"track: {name} is not installed; run: {install_command(name)}, or leave it out")


def open_trackers(config: RunConfig, out: Path, done: int, note: Note) -> list[Tracker]:
    """The trackers of a run in the folder ``out``, of which ``done`` steps are made. Packages of others run in the
    background (core.train.track.background), so that no step waits for them."""
    require_trackers(config.track)
    run = TrackedRun(out.resolve().name, out, config.to_dict(), done)
    opened: list[Tracker] = []
    for name in config.track:
        if name == "tensorboard":
            opened.append(TensorBoard(out / "tensorboard", done))
        else:
            opened.append(Background(name, functools.partial(_open, name, run), note))
    return opened


def _open(name: str, run: TrackedRun) -> Tracker:
    """Imported here, in the background: after the framework, and only where it is used."""
    if name == "swanlab":
        from telechat_twins.core.train.track.swanlab import SwanLab

        return SwanLab(run)
    if name == "wandb":
        from telechat_twins.core.train.track.wandb import WeightsAndBiases

        return WeightsAndBiases(run)
    from telechat_twins.core.train.track.mlflow import MLflow

    return MLflow(run)
