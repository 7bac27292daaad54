"""SwanLab (track: [swanlab]): local files under RUN/swanlab, or its server where SWANLAB_MODE says so."""

from __future__ import annotations

import os

import swanlab

from telechat_twins.core.train.metrics import Row
from telechat_twins.core.train.track.protocol import PROJECT, TrackedRun
from telechat_twins.core.train.track.tags import points


class SwanLab:
    """core.train.track.protocol.Tracker of SwanLab."""

    def __init__(self, run: TrackedRun) -> None:
        folder = run.folder / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        self._run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJECT", PROJECT),
            name=run.name,
            config=run.config,
            log_dir=str(folder),
            mode=os.environ.get("SWANLAB_MODE", "offline"),
            # The console is the launcher's: rank 0's output is a file already, and a proxy would slow each line.
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),
        )

    def step(self, row: Row) -> None:
        self._run.log(points(row), step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()
