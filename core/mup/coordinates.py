"""Coordinate check of muP: whether activations, and their changes in training, keep their size as the width grows.

Models of several widths are trained for a few steps. Under muP the coordinates of embedding, attention, ffn, residual
stream and logits change by an amount that does not depend on the width. With the same hyper-parameters at all widths
(the standard parametrisation, measured for contrast) they change more in wider models. A size is a mean of absolute
values; the criterion is the slope of its logarithm over that of the width: 0 is flat, 1/2 grows like a random sum, 1
like an aligned one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.config import RunConfig
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.mup import transfer as rules
from telechat_twins.core.mup.activations import observed
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.train.recipe import clip_factor, learning_rate
from telechat_twins.core.types import JsonObject

GROUPS = ("embed", "attn", "ffn", "stream", "logits")
MUP, STANDARD = "muP", "standard"

# Bound on a slope that counts as flat, between the values measured with all rules and without one of them. With the
# bundled narrow recipes slopes stay within 0.06 at the default widths, and mostly within 0.25 from width 64 on and
# after 3 updates; with one rule left out, or the logits' rule applied by half, some slope exceeds 0.44 (docs/mup.md).
FLAT = 0.3
# Under muP, with a head of constant standard deviation, logits start like 1 / sqrt(width), and their first small
# changes may scale alike.
LOGITS_LOW = -0.8
GROWING = 0.5  # slope that the standard parametrisation must reach somewhere, or the check would detect nothing


@dataclass(frozen=True)
class WidthRecord:
    """Measurements of one width in one parametrisation.

    ``scales`` and ``changes``, by group, with a value after 0, 1, ... updates: the means of |x| and of |x - x before
    the first update| over the fixed batch and over layers. ``losses``: on the same batch.
    """

    parametrisation: str
    width: int
    scales: dict[str, list[float]]
    changes: dict[str, list[float]]
    losses: list[float]


@dataclass(frozen=True)
class SlopeVerdict:
    """The slope of ``group``'s size over the width, and the range in which it must lie."""

    what: str
    group: str
    slope: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        return self.low <= self.slope <= self.high  # nan is outside


def configs(narrow: RunConfig, widths: Sequence[int], rows: int, seq_len: int) -> list[tuple[str, RunConfig]]:
    """(parametrisation, run) for every width: with ``narrow``'s hyper-parameters transferred by muP, and unchanged."""
    train = dataclasses.replace(narrow.train, global_batch=rows, micro_batch=rows, precision="fp32", recompute="none")
    data = dataclasses.replace(narrow.data, seq_len=seq_len)
    base = dataclasses.replace(narrow, train=train, data=data, parallel=Layout())
    made = []
    for parametrisation in (MUP, STANDARD):
        for width in widths:
            model, optim = rules.at_width(narrow.model, width), narrow.optim
            if parametrisation == MUP:
                model, optim = rules.transfer(narrow.model, narrow.optim, model)
            made.append((parametrisation, dataclasses.replace(base, model=model, optim=optim)))
    return made


def token_batch(vocab_size: int, rows: int, seq_len: int, seed: int) -> Batch:
    """Random ids [rows, seq_len] with the frequencies of words (Zipf): that of the k-th id is proportional to 1 / k."""
    shares = 1.0 / np.arange(1, vocab_size + 1)
    ids = np.random.default_rng(seed).choice(vocab_size, (rows, seq_len), p=shares / shares.sum()).astype(np.int32)
    return Batch(ids, shift_labels(ids), np.tile(np.arange(seq_len, dtype=np.int32), (rows, 1)))


def measure(
    backend: str, parametrisation: str, config: RunConfig, batch: Batch, steps: int, on_look: Callable[[], None]
) -> WidthRecord:
    """Run the first ``steps`` updates, all on ``batch``, and measure before each and after the last.

    ``on_look`` is called after each measurement.
    """
    trainer = backends.load(backend, "train").Trainer(config)
    to_numpy = backends.load(backend, "model").to_numpy
    scales: dict[str, list[float]] = {group: [] for group in GROUPS}
    changes: dict[str, list[float]] = {group: [] for group in GROUPS}
    start: dict[str, np.ndarray] = {}
    losses = []
    for step in range(steps + 1):
        with observed(trainer.stages[0], to_numpy) as seen:
            losses.append(trainer.gradients(batch, batch.num_targets, 1.0))
        start = start or dict(seen)
        for group in GROUPS:
            names = [name for name in seen if group_of(name) == group]
            scales[group].append(_mean(np.abs(seen[name]) for name in names))
            changes[group].append(_mean(np.abs(seen[name] - start[name]) for name in names))
        if step < steps:
            norm = trainer.grad_norm(1.0)
            lr = learning_rate(config.optim, config.train.steps, step)
            trainer.update(lr, clip_factor(norm, config.optim.clip_grad))
        on_look()
    return WidthRecord(parametrisation, config.model.hidden_size, scales, changes, losses)


def group_of(name: str) -> str:
    """The group of an activation by its name in ``observed``; ``layers.3`` is the stream after block 3."""
    last = name.rpartition(".")[2]
    return "stream" if last.isdigit() else last


def slope(records: Sequence[WidthRecord], kind: str, group: str, step: int) -> float:
    """d log(size) / d log(width) by least squares over ``records``; ``kind``: scales or changes."""
    sizes = [getattr(record, kind)[group][step] for record in records]
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return math.nan
    widths = [math.log(record.width) for record in records]
    return float(np.polyfit(widths, np.log(sizes), 1)[0])


def judge(records: Sequence[WidthRecord]) -> list[SlopeVerdict]:
    """Slopes with their bounds: under muP, sizes at the start and changes after the last update must be flat; under the
    standard parametrisation some change must grow."""
    mup = [record for record in records if record.parametrisation == MUP]
    contrast = [record for record in records if record.parametrisation == STANDARD]
    last = len(mup[0].losses) - 1
    found = []
    for what, kind, step in (("at the start", "scales", 0), (f"change after {last}", "changes", last)):
        for group in GROUPS:
            low = LOGITS_LOW if group == "logits" else -FLAT
            found.append(SlopeVerdict(f"muP, {what}", group, slope(mup, kind, group, step), low, FLAT))
    steepest = max(GROUPS, key=lambda group: slope(contrast, "changes", group, last))
    grown = slope(contrast, "changes", steepest, last)
    found.append(SlopeVerdict(f"standard, change after {last}", steepest, grown, GROWING, math.inf))
    return found


def to_json(records: Sequence[WidthRecord], judged: Sequence[SlopeVerdict], facts: JsonObject) -> JsonObject:
    """The contents of check.json."""
    rows = [
        {
            "what": one.what,
            "group": one.group,
            "slope": _finite(one.slope),
            "low": _finite(one.low),
            "high": _finite(one.high),
            "holds": one.holds,
        }
        for one in judged
    ]
    return {
        **facts,
        "holds": all(one.holds for one in judged),
        "judged": rows,
        "records": [dataclasses.asdict(record) for record in records],
    }


def _mean(parts: Iterable[np.ndarray]) -> float:
    return float(np.mean([np.mean(part, dtype=np.float64) for part in parts]))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
