"""Weights & Biases (track: [wandb]): local files under RUN/wandb, or its server with WANDB_MODE=online."""

from __future__ import annotations

import os

import wandb

from telechat_twins.core.train.metrics import Row
from telechat_twins.core.train.track.protocol import PROJECT, TrackedRun
from telechat_twins.core.train.track.tags import points


class WeightsAndBiases:
    """core.train.track.protocol.Tracker of Weights & Biases."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            config=run.config,
            dir=str(run.folder),
            mode="online" if os.environ.get("WANDB_MODE") == "online" else "offline",
            # The console is the launcher's, and code and packages of the machine are in environment.json.
            settings=wandb.Settings(console="off", save_code=False, silent=True),
        )

    def step(self, row: Row) -> None:
        self._run.log(points(row), step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()
