"""Schedules of relay runs: who runs which steps, in which layout, with which options; as commands, and made smaller.

A *plan* is what changes the numbers of a run: legs, of which each after the first grows the model or trains adapters on
it, and stages of length within a leg. A *schedule* is a plan whose steps are cut into segments, each with a framework,
a layout and options that change no number beyond rounding.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

SEQ_LEN, VOCAB = 32, 128
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.1}
GROWTH = {"hidden_size": 96, "ffn_hidden_size": 144, "num_heads": 8, "num_layers": 3}
ANNEAL = 4


@dataclass(frozen=True)
class Leg:
    """Steps of one run folder. kind: start, grow (from the leg before, by ``method``) or lora (on the leg before).
    ``stages``: (steps, length, global batch) where the length changes, else one stage."""

    kind: str
    steps: int
    method: str = "masked"
    stages: tuple[tuple[int, int, int], ...] = ()

    def stages_until(self, step: int) -> list[dict[str, int]]:
        """train.stages of a run that ends after ``step`` steps."""
        found: list[dict[str, int]] = []
        for steps, length, batch in self.stages:
            if step > 0:
                found.append({"steps": min(steps, step), "seq_len": length, "global_batch": batch})
            step -= steps
        return found


PLANS: dict[str, tuple[Leg, ...]] = {
    "plain": (Leg("start", 12),),
    "lengths": (Leg("start", 12, stages=((6, SEQ_LEN, 4), (6, 2 * SEQ_LEN, 2))),),
    "masked growth": (Leg("start", 5), Leg("grow", 8)),
    "zero growth": (Leg("start", 5), Leg("grow", 7, "zero")),
    "adapters": (Leg("start", 4), Leg("lora", 8)),
    "growth and adapters": (Leg("start", 4), Leg("grow", 5), Leg("lora", 6)),
}
LAYOUTS = (
    "dp2",
    "dp2.nozero",
    "tp2",
    "tp2.nosp",
    "pp2",
    "pp2.gpipe",
    "ring2",
    "ulysses2",
)
OPTIONS = (
    "train.recompute=full",
    "train.recompute=selective",
    "train.micro_batch=1",
    "kernels.attention=composite",
    "kernels.linear=composite",
    "kernels.adamw=composite",
    "kernels.rms_norm=composite",
    "checkpoint.asynchronous=false",
)


@dataclass(frozen=True)
class Segment:
    """``steps`` steps of one process or layout."""

    steps: int
    backend: str = "pt"
    layout: str = "single"
    options: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it is as the run that swaps nothing."""
        return self == Segment(self.steps)


@dataclass(frozen=True)
class Schedule:
    """Segments of each leg of a plan."""

    plan: str
    legs: tuple[tuple[Segment, ...], ...]

    @property
    def segments(self) -> list[Segment]:
        return [segment for leg in self.legs for segment in leg]


def unswapped(plan: str) -> Schedule:
    """Every leg in one piece, in PyTorch, in one process."""
    return Schedule(plan, tuple((Segment(leg.steps),) for leg in PLANS[plan]))


def draw(seed: int, number: int, backends: tuple[str, ...], ranks: float) -> Schedule:
    """Schedule ``number`` of a campaign; ``ranks``: the share of segments that run by two processes."""
    chance = random.Random(f"relay {seed} {number}")
    plan = chance.choice(list(PLANS))
    return Schedule(plan, tuple(tuple(_cut(chance, leg, backends, ranks)) for leg in PLANS[plan]))


def _cut(chance: random.Random, leg: Leg, backends: tuple[str, ...], ranks: float) -> Iterator[Segment]:
    left = leg.steps
    while left:
        steps = min(left, chance.randint(1, 4))
        left -= steps
        layout = chance.choice(LAYOUTS) if chance.random() < ranks else "single"
        wanted = chance.sample(OPTIONS, chance.choice((0, 0, 1, 2)))
        options: dict[str, str] = {}
        for option in wanted:
            options.setdefault(option.partition("=")[0], option)
        yield Segment(steps, chance.choice(backends), layout, tuple(sorted(options.values())))


def tree(leg: Leg, data: str, model: dict[str, Any] | None = None, init: str | None = None) -> dict[str, Any]:
    """The run's configuration; ``model``: that of a grown checkpoint; ``init``: the base of adapters."""
    small = {"preset": "telechat2-tiny", "vocab_size": VOCAB, "num_layers": 2, "hidden_size": 64, "head_dim": 16}
    made: dict[str, Any] = {
        "model": model or {**small, "ffn_hidden_size": 96, "num_heads": 4, "num_kv_heads": 2},
        "data": {"sources": [{"path": data}], "seq_len": SEQ_LEN},
        "train": {"global_batch": 4, "micro_batch": 1 if leg.stages else 2, "schedule_steps": 20},
        "optim": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 0, "rewarmup_steps": 2, "beta2": 0.99},
        "checkpoint": {"every": 0, "keep_last": 9},
    }
    if leg.kind == "lora":
        made["lora"] = LORA
        made["train"]["init"] = init
    return made


def overrides(leg: Leg, segment: Segment, end: int) -> list[str]:
    """--set of a segment that ends after the leg's step ``end``."""
    stop = f"train.steps={end}"
    if leg.stages:
        stop = f"train.stages={json.dumps(leg.stages_until(end))}"
    return [stop, *segment.options]


def commands(schedule: Schedule) -> list[str]:
    """The schedule as commands, with leg-N.yaml as written by the campaign."""
    lines, before = list[str](), ""
    done = 0  # steps of the run, which a growth goes on with
    for number, (leg, segments) in enumerate(zip(PLANS[schedule.plan], schedule.legs, strict=True)):
        out, start = f"run-{number}", ""
        if leg.kind == "grow":
            sizes = " ".join(f"{key}={value}" for key, value in GROWTH.items())
            lines.append(
                f"tele grow {before} grown-{number} --set {sizes} --method {leg.method} --anneal-steps {ANNEAL}"
            )
            start = f"grown-{number}"
        elif leg.kind == "lora":
            done = 0
        for segment in segments:
            done += segment.steps
            words = [f"tele train --backend {segment.backend} --config leg-{number}.yaml --out {out}"]
            words.append(f"--resume {start or 'auto'}")
            words += [] if segment.layout == "single" else [f"--layout {segment.layout}"]
            words.append("--set " + " ".join(f"'{o}'" if " " in o else o for o in overrides(leg, segment, done)))
            lines.append(" ".join(words))
            start = ""
        before = out
    return lines


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool], most: int = 40) -> tuple[Schedule, int]:
    """A smaller schedule that still fails, and how many were tried: greedily, each segment is made plain, or loses its
    layout, an option or its framework, or is joined to the one before, while the failure stays. At most ``most``
    tries."""
    tried, progress = 0, True
    while progress and tried < most:
        progress = False
        for candidate in _smaller(schedule):
            if tried == most:
                break
            tried += 1
            if fails(candidate):
                schedule, progress = candidate, True
                break
    return schedule, tried


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    """Simpler schedules, the simplest first."""
    places = [(leg, n) for leg, segments in enumerate(schedule.legs) for n in range(len(segments))]
    for leg, n in places:
        segment = schedule.legs[leg][n]
        if not segment.plain:
            yield _with(schedule, leg, n, Segment(segment.steps))
    for leg, n in places:
        segment = schedule.legs[leg][n]
        for simpler in (
            replace(segment, layout="single"),
            replace(segment, backend="pt"),
            *(replace(segment, options=tuple(o for o in segment.options if o != option)) for option in segment.options),
        ):
            if simpler not in (segment, Segment(segment.steps)):
                yield _with(schedule, leg, n, simpler)
    for leg, n in places:
        segments = schedule.legs[leg]
        if n and segments[n - 1] == replace(segments[n], steps=segments[n - 1].steps):
            joined = replace(segments[n], steps=segments[n - 1].steps + segments[n].steps)
            yield _put(schedule, leg, (*segments[: n - 1], joined, *segments[n + 1 :]))


def _with(schedule: Schedule, leg: int, n: int, segment: Segment) -> Schedule:
    segments = schedule.legs[leg]
    return _put(schedule, leg, (*segments[:n], segment, *segments[n + 1 :]))


def _put(schedule: Schedule, leg: int, segments: tuple[Segment, ...]) -> Schedule:
    return replace(schedule, legs=(*schedule.legs[:leg], segments, *schedule.legs[leg + 1 :]))
