"""Policy on non-finite losses or gradients and on gradient-norm spikes.

A pure state machine: numbers in, a verdict out. Its window is saved with the checkpoint, so that a resumed run judges
step N exactly as the uninterrupted one does.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from telechat_twins.core.config import HealthConfig
from telechat_twins.core.types import JsonObject


class TrainingStopped(Exception):
    """Training ended itself on purpose: not a defect and not a typing mistake. The message says why and what is saved.

    Exit code 1. The weights were not touched by the step that failed.
    """


@dataclass(frozen=True)
class Verdict:
    """``action``: "go" (update), "warn" (update, but say so), "skip" (drop this step's gradients) or "stop"."""

    action: str
    reason: str = ""


class Health:
    """Judges each step by its loss and global gradient norm (before clipping)."""

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._norms: deque[float] = deque(maxlen=config.window)

    @property
    def observations_needed(self) -> int:
        """Norms to see before a spike can be called: a median of two or three numbers is not reliable."""
        return max(2, self._config.window // 5)

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """The verdict on one step; the norm then joins the window.

        A spike joins too. Were it left out, a lasting change of level (a new data source, say) would be called a spike
        for ever and policy "skip" would never train again; the median is robust to the odd one.
        """
        if not math.isfinite(loss):
            return Verdict("stop", f"the loss is {loss}")
        if not math.isfinite(grad_norm):
            return Verdict("stop", f"the gradient norm is {grad_norm} (the loss is {loss:.6g})")
        verdict = Verdict("go")
        if len(self._norms) >= self.observations_needed:
            usual = statistics.median(self._norms)
            if grad_norm > self._config.spike_factor * usual:
                verdict = Verdict(
                    self._config.spike_policy,
                    f"the gradient norm {grad_norm:.4g} is above {self._config.spike_factor:g} times "
                    f"the median {usual:.4g} of the last {len(self._norms)} steps",
                )
        self._norms.append(grad_norm)
        return verdict

    def to_dict(self) -> JsonObject:
        """The window as JSON; Python writes doubles so that they read back bit for bit."""
        return {"grad_norms": list(self._norms)}

    def load(self, state: JsonObject) -> None:
        """Continue from ``to_dict``'s state. A changed ``health.window`` keeps the newest norms that fit."""
        self._norms = deque((float(n) for n in state["grad_norms"]), maxlen=self._config.window)
