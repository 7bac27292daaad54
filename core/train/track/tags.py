"""Names under which trackers show the columns of metrics.jsonl."""

from __future__ import annotations

import math

from telechat_twins.core.train.metrics import HELD_OUT, TASKS, Row

TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/learning_rate",
    "matrix_lr": "train/matrix_learning_rate",
    "loss_scale": "train/loss_scale",
    "mask": "train/growth_mask",
    "reward_margin": "train/reward_margin",
    "reward_accuracy": "train/reward_accuracy",
    "tokens": "train/tokens",
    "tokens_per_s": "speed/tokens_per_s",
    "tokens_per_s_device": "speed/tokens_per_s_device",
    "step_ms": "speed/step_ms",
    "mfu": "speed/mfu",
    "data_share": "speed/data_share",
    "comm_share": "speed/comm_share",
    "eta_s": "speed/eta_s",
    "restarts": "speed/restarts",
    "host_peak_gib": "memory/host_peak_gib",
    "device_peak_gib": "memory/device_peak_gib",
}


def points(row: Row) -> dict[str, float]:
    """Tag -> value of one row's columns, those of held-out sources and of tasks (``eval/...``) under their own names;
    what is missing or not finite is left out."""
    tags = {**TAGS, **{key: key for key in row if key.startswith((HELD_OUT, TASKS))}}
    values = {tag: row[key] for key, tag in tags.items() if row.get(key) is not None}
    return {tag: float(value) for tag, value in values.items() if math.isfinite(value)}
