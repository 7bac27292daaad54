"""Meter of a run: utilisation, throughput a device, shares of data and communication, and peak memory, per step.

Nothing here takes part in the arithmetic, and nothing waits: memory is agreed upon in an exchange that the loop makes
anyway, so its figures are those of all ranks up to the step before, and of rank 0 up to this one.
"""

from __future__ import annotations

from typing import Protocol

from telechat_twins.core.config import RunConfig
from telechat_twins.core.launch.heartbeat import open_heartbeat
from telechat_twins.core.launch.memory import largest_resident
from telechat_twins.core.launch.restarts import restarts_before
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.train.metrics import Row
from telechat_twins.core.train.stages import Stage
from telechat_twins.core.train.watch.peak import peak_flops

GIB = float(1 << 30)


class Measured(Protocol):
    """The part of core.train.stepper.Stepper that is measured."""

    @property
    def world(self) -> int: ...
    def device_peak(self) -> int: ...


class Meter:
    """Columns of a step's row that describe how well the machine is used (core.train.metrics.MEASURED)."""

    def __init__(self, config: RunConfig, stepper: Measured) -> None:
        self._config, self._stepper = config, stepper
        self._peak = peak_flops(config)
        self._heartbeat = open_heartbeat() if stepper.world > 1 else None
        self._restarts = restarts_before()
        self._waited = 0.0
        self._flops: dict[int, float] = {}  # row length -> FLOPs a token
        self.memory = self._read_memory()  # of this rank, as of its last step
        self.largest = [0.0, 0.0]  # ``memory`` of all ranks, as last agreed upon

    def begin(self) -> None:
        """A step begins."""
        self._waited = 0.0 if self._heartbeat is None else self._heartbeat.waited_s

    def columns(self, stage: Stage, seconds: float, loaded: float) -> Row:
        """Columns of a step that took ``seconds``, ``loaded`` of which rank 0 waited for its rows of the batch."""
        world = self._stepper.world
        tokens_per_s = stage.tokens / seconds
        row: Row = {}
        if world > 1:
            row["tokens_per_s_device"] = tokens_per_s / world
        if self._peak is not None:
            row["mfu"] = tokens_per_s * self._flops_per_token(stage.data.seq_len) / self._peak
        if self._restarts:
            row["restarts"] = self._restarts
        row["data_share"] = loaded / seconds
        if self._heartbeat is not None:
            row["comm_share"] = (self._heartbeat.waited_s - self._waited) / seconds
        self.memory = self._read_memory()
        host, device = (max(pair) / GIB for pair in zip(self.memory, self.largest, strict=True))
        row["host_peak_gib"] = host
        if device:
            row["device_peak_gib"] = device
        return row

    def _read_memory(self) -> list[float]:
        """Bytes: the largest resident set of this process so far, and Stepper.device_peak."""
        return [float(largest_resident()), float(self._stepper.device_peak())]

    def _flops_per_token(self, seq_len: int) -> float:
        if seq_len not in self._flops:
            self._flops[seq_len] = flops_per_token(self._config.model, seq_len)
        return self._flops[seq_len]
