"""The sections `optim` and `preference` of a run: AdamW, its schedule, and the loss of preference pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from telechat_twins.core.errors import UserError
from telechat_twins.core.schema import option

SCHEDULES = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = option(help="peak learning rate", above=0.0)
    min_lr: float = option(0.0, help="learning rate at the end of the schedule", min=0.0)
    schedule: str = option(
        "cosine",
        help="after warm-up: cosine or linear to min_lr; constant; wsd: constant, then a decay to min_lr at the end",
        choices=SCHEDULES,
    )
    decay_steps: int | None = option(None, help="wsd: steps of the decay at the end of the schedule", min=1)
    decay_ratio: float | None = option(
        None, help="wsd: the same as a share of the schedule's steps; default 0.1", above=0.0, max=1.0
    )
    decay_shape: str = option(
        "linear", help="wsd: form of the decay; sqrt: 1 - sqrt(progress)", choices=("linear", "cosine", "sqrt")
    )
    matrix_lr: float | None = option(
        None, help="peak for matrix-like weights (attention and ffn) under muP, same schedule; default: lr", above=0.0
    )
    warmup_steps: int = option(0, help="linear warm-up: step s < warmup uses lr*(s+1)/warmup", min=0)
    warmup_ratio: float | None = option(
        None, help="the same as a share of the schedule's steps, rounded up; in place of warmup_steps", min=0.0, max=1.0
    )
    rewarmup_steps: int = option(0, help="the same once more after the model has grown", min=0)
    restart_lr: float | None = option(
        None, help="after the model has grown, a new cosine from here; default: the old one goes on", above=0.0
    )
    beta1: float = option(0.9, help="AdamW", min=0.0, max=0.999999)
    beta2: float = option(0.95, help="AdamW", min=0.0, max=0.9999999)
    eps: float = option(1e-8, help="AdamW", above=0.0)
    weight_decay: float = option(0.1, help="decoupled, on matrices only", min=0.0)
    matrix_weight_decay: float | None = option(
        None, help="that of matrix-like weights under muP; default: weight_decay", min=0.0
    )
    clip_grad: float = option(1.0, help="global gradient norm limit; 0 switches clipping off", min=0.0)

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise UserError(f"optim.min_lr: {self.min_lr} is above the peak optim.lr {self.lr}")
        if self.restart_lr is not None and self.min_lr > self.restart_lr:
            raise UserError(f"optim.min_lr: {self.min_lr} is above optim.restart_lr {self.restart_lr}")
        if self.schedule == "constant" and self.min_lr:
            raise UserError(f"optim.min_lr: {self.min_lr} is never reached by schedule constant; leave it out")
        if self.warmup_steps and self.warmup_ratio is not None:
            raise UserError("optim.warmup_ratio, optim.warmup_steps: both say how long warm-up is; give one")
        if self.decay_steps is not None and self.decay_ratio is not None:
            raise UserError("optim.decay_ratio, optim.decay_steps: both say how long the decay is; give one")
        for name, default in (("decay_steps", None), ("decay_ratio", None), ("decay_shape", "linear")):
            if self.schedule != "wsd" and getattr(self, name) != default:
                raise UserError(f"optim.{name}: belongs to schedule wsd, found schedule {self.schedule}; leave it out")

    def warmup(self, schedule_steps: int) -> int:
        """Steps of warm-up in a schedule of so many steps."""
        return self.warmup_steps if self.warmup_ratio is None else math.ceil(self.warmup_ratio * schedule_steps)

    def decay(self, schedule_steps: int) -> int:
        """Steps of the decay at the end of a wsd schedule of so many steps."""
        if self.decay_steps is not None:
            return self.decay_steps
        return math.ceil((0.1 if self.decay_ratio is None else self.decay_ratio) * schedule_steps)


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Direct preference optimisation (DPO, arXiv 2305.18290) on pairs of `tele data --preference`."""

    beta: float = option(0.1, help="strength with which the model is held to the reference", above=0.0)
    reference: str = option(
        "once",
        help="log-probabilities of the initial weights: of all pairs before training (once), or of each batch by the "
        "base under the adapters (live, with lora)",
        choices=("once", "live"),
    )
    label_smoothing: float = option(0.0, help="probability that a pair is labelled the wrong way round", min=0.0)

    def __post_init__(self) -> None:
        if self.label_smoothing >= 0.5:
            raise UserError(
                f"preference.label_smoothing: {self.label_smoothing} leaves no preference; give less than 0.5"
            )
