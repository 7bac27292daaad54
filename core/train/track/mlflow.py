"""MLflow (track: [mlflow]): a database RUN/mlflow.db, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from telechat_twins.core.train.metrics import Row
from telechat_twins.core.train.track.protocol import PROJECT, TrackedRun
from telechat_twins.core.train.track.tags import points

BATCH = 500  # metrics a request: the server takes 1,000
_PARAMS, _LONGEST = 100, 500  # of one request, and characters of a value


class MLflow:
    """core.train.track.protocol.Tracker of MLflow."""

    def __init__(self, run: TrackedRun) -> None:
        local = f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or local)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=run.name).info.run_id
        params = [Param(key, text[:_LONGEST]) for key, text in _leaves(run.config)]
        for first in range(0, len(params), _PARAMS):
            self._client.log_batch(self._run, params=params[first : first + _PARAMS])
        self._held: list[Metric] = []
        self._sent = time.monotonic()

    def step(self, row: Row) -> None:
        """Hold the numbers of a step; they are sent in batches, at least every five seconds."""
        now = int(time.time() * 1000)
        self._held += [Metric(tag, value, now, int(row["step"])) for tag, value in points(row).items()]
        if len(self._held) >= BATCH or time.monotonic() - self._sent > 5.0:
            self._send()

    def close(self) -> None:
        self._send()
        self._client.set_terminated(self._run)

    def _send(self) -> None:
        for first in range(0, len(self._held), BATCH):
            self._client.log_batch(self._run, metrics=self._held[first : first + BATCH])
        self._held, self._sent = [], time.monotonic()


def _leaves(tree: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of a configuration."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, str(tree)
