"""The work of one optimizer step, and the practices in which training programs differ."""

from __future__ import annotations

from dataclasses import dataclass

from telechat_twins.core.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a data-parallel rank computes in a step: ``micro_batches`` of ``micro_batch`` samples of ``seq_len`` tokens.

    ``recompute_share``: of the layers, the share that recomputes; 1 but for published runs that name single layers.
    ``method``: core.parallel.sequence.Visibility's, where the ring has more than one rank. ``by_class``: whether
    buckets are divided by muP class (core.train.recipe.tells_classes_apart).
    """

    seq_len: int
    micro_batch: int = 1
    micro_batches: int = 1
    precision: str = "bf16"
    recompute: str = "none"
    recompute_share: float = 1.0
    fused_attention: bool = True
    method: str = "ring"
    by_class: bool = False

    def tokens(self, dp: int) -> int:
        """Tokens of the global batch."""
        return self.seq_len * self.micro_batch * self.micro_batches * dp


@dataclass(frozen=True, kw_only=True)
class Practice:
    """Habits of a training program that change its time.

    ``sum_bytes``: width of an element in sums over tensor and context ranks; None: as core.parallel.traffic, float32 or
    wider. ``gradient_bytes``: the same for gradients. ``tp_overlap``: share of tensor-parallel transfers that runs
    beside computation. ``fused_accumulation``: the product that makes a gradient adds to the accumulator itself.
    ``selective``: what selective recomputation repeats: "core" (attention and activation), "attention" or
    "activation". ``gathers_again``: share of the layers whose gathers along tp are repeated in the backward, beside
    full recomputation. ``stream_in_compute``: with amp, too, the stream between blocks has the dtype of products.
    ``rotary_bytes``: bytes that the rotation of an element moves in one direction; by default those of one operator,
    2 x the width of products. ``attention``: speed of its fused attention, relative to the machine's.
    """

    name: str = "this program"
    sum_bytes: int | None = None
    gradient_bytes: int = 4
    tp_overlap: float = 0.0
    fused_accumulation: bool = False
    selective: str = "core"
    gathers_again: float = 0.0
    stream_in_compute: bool = False
    rotary_bytes: float | None = None
    attention: float = 1.0


OURS = Practice()


def work_of(config: RunConfig, by_class: bool = False) -> Work:
    """The work of a step of ``config`` on one data-parallel rank, without its stages of length."""
    train = config.train
    return Work(
        seq_len=config.data.seq_len,
        micro_batch=train.micro_batch,
        micro_batches=max(1, train.global_batch // (train.micro_batch * config.parallel.dp)),
        precision=train.precision,
        recompute=train.recompute,
        by_class=by_class,
    )
