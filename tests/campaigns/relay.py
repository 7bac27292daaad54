"""`make relay`: runs that change framework, layout, length, size, adapters or operators midway, against whole runs.

    python -m tests.campaigns.relay --segments 200 [--seed S] [--minutes M] [--out report.json]

Each schedule (tests/campaigns/relay_schedule.py) is random, by its seed and number. Its loss and gradient norm must lie
within the drift envelope of the same plan run in one piece (core.parity.envelope; K noisy runs a plan), its learning
rates, tokens and masks must be equal. A schedule that fails is made smaller while it fails, and printed as commands.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

from telechat_twins.convert.growth.files import grow_checkpoint, plan_checkpoint
from telechat_twins.convert.growth.plan import Options
from telechat_twins.convert.initial import open_initial
from telechat_twins.core.backends import load
from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.config import RunConfig, load_run_config
from telechat_twins.core.launch.launcher import launch
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.parity.bounds import Bound
from telechat_twins.core.parity.envelope import COLUMNS, limits_of
from telechat_twins.core.parity.noise import NoiseSource, noisy_operators
from telechat_twins.core.train import loop
from telechat_twins.core.train.metrics import Row, column, read_metrics
from tests.campaigns.relay_schedule import (
    ANNEAL,
    GROWTH,
    PLANS,
    SEQ_LEN,
    VOCAB,
    Leg,
    Schedule,
    Segment,
    commands,
    draw,
    overrides,
    shrink,
    tree,
    unswapped,
)
from tests.support.packed import write_packed

LAUNCH_LIMIT = 900  # seconds
EXACT = ("step", "lr", "tokens", "mask")


@dataclass
class Plan:
    """A plan's unswapped run, and the limits of each step."""

    rows: list[Row]
    limits: dict[str, list[float]]


@dataclass
class Relay:
    """One schedule and what became of it: the largest share of its envelope, and broken bounds."""

    schedule: Schedule
    share: float = 0.0
    problems: list[str] = field(default_factory=list)


class Runner:
    """Runs schedules under ``folder``; plans are measured once, with ``noisy`` noisy runs each."""

    def __init__(self, folder: Path, noisy: int) -> None:
        self.folder, self.noisy, self.count = folder, noisy, 0
        self.data = str(write_packed(folder / "packed", VOCAB, 2 * SEQ_LEN))
        self._plans: dict[str, Plan] = {}

    def plan(self, name: str) -> Plan:
        """Unswapped run and envelope of a plan."""
        if name not in self._plans:
            centre = self.rows(unswapped(name))
            found: dict[str, list[list[float]]] = {key: [] for key in COLUMNS}
            for seed in range(self.noisy):
                rows = self.rows(unswapped(name), seed + 1)
                for key in COLUMNS:
                    pairs = zip(column(rows, key), column(centre, key), strict=True)
                    found[key].append([abs(a - b) / abs(b) for a, b in pairs])
            self._plans[name] = Plan(centre, limits_of(found, "fp32"))
        return self._plans[name]

    def relay(self, schedule: Schedule) -> Relay:
        """Run a schedule and judge it."""
        plan, made = self.plan(schedule.plan), Relay(schedule)
        try:
            rows = self.rows(schedule)
        except Exception as error:  # what a run ends with is the finding
            made.problems.append(f"{type(error).__name__}: {error}")
            return made
        bounds = judge(plan, rows)
        made.share = max(bound.value for bound in bounds if bound.limit)
        made.problems = [f"{b.what}: {b.value:.3g}, limit {b.limit:g} ({b.source})" for b in bounds if not b.holds]
        return made

    def rows(self, schedule: Schedule, noise: int | None = None) -> list[Row]:
        """All rows of a schedule, leg after leg; with the rounding noise of a seed."""
        self.count += 1
        folder, found = self.folder / f"relay-{self.count}", list[Row]()
        folder.mkdir()
        with ExitStack() as active:
            if noise is not None:
                active.enter_context(noisy_operators("pt", NoiseSource("fp32", noise)))
            for number, leg in enumerate(PLANS[schedule.plan]):
                found += self._leg(folder, number, leg, schedule.legs[number])
        shutil.rmtree(folder)
        return found

    def _leg(self, folder: Path, number: int, leg: Leg, segments: Sequence[Segment]) -> list[Row]:
        before, out, grown = folder / f"run-{number - 1}", folder / f"run-{number}", folder / f"grown-{number}"
        model, init, resume, done = None, None, "auto", 0
        if leg.kind == "grow":
            checkpoint = open_checkpoint(before)
            large = load_model_config({**checkpoint.model["config"], **GROWTH})
            options = Options(method=leg.method, anneal_steps=ANNEAL)
            grow_checkpoint(checkpoint, grown, plan_checkpoint(checkpoint, large, options))
            model, resume = {"preset": str(grown / "assets" / "model.yaml")}, str(grown)
            done = read_metrics(before)[-1]["step"]
        elif leg.kind == "lora":
            base = open_checkpoint(before)
            model, init = dict(base.model["config"]), str(base.path)
        file = folder / f"leg-{number}.yaml"
        file.write_text(json.dumps(tree(leg, self.data, model, init), indent=1), encoding="utf-8")
        for segment in segments:
            done += segment.steps
            config = load_run_config(str(file), overrides(leg, segment, done))
            train(segment, config, out, resume)
            resume = "auto"
        return read_metrics(out)


def train(segment: Segment, config: RunConfig, out: Path, resume: str) -> None:
    """One segment: in this process, or by as many as its layout needs. RuntimeError with the launcher's code."""
    layout = parse_layout(segment.layout)
    config = replace(config, parallel=layout)
    if layout.world == 1:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            loop.train(load(segment.backend, "train").Trainer, config, out, resume, open_initial)
        return
    file = out.with_name(f"{out.name}-{config.train.steps}.yaml")
    file.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    words = ["--config", str(file), "--out", str(out), "--resume", resume]
    logs = out.with_name(f"{out.name}-logs")
    if code := launch(segment.backend, words, layout.world, logs, LAUNCH_LIMIT, instead=lambda: None):
        kept = [path.read_text(errors="replace")[-600:] for path in sorted(logs.rglob("*.log"))]
        raise RuntimeError(f"{segment.backend} {segment.layout} ended with code {code}: {' | '.join(kept)[-900:]}")


def judge(plan: Plan, rows: Sequence[Row]) -> list[Bound]:
    """A relay's rows against the unswapped run's."""
    if len(rows) != len(plan.rows):
        return [Bound("steps that only one run has", float(abs(len(rows) - len(plan.rows))), 0.0, "one row a step")]
    differing = [
        f"{key} of row {n + 1}: {row.get(key)}, not {right.get(key)}"
        for n, (row, right) in enumerate(zip(rows, plan.rows, strict=True))
        for key in EXACT
        if row.get(key) != right.get(key)
    ]
    bounds = [Bound("numbers of the schedule", float(len(differing)), 0.0, "; ".join(differing[:2]) or "equal doubles")]
    for key in COLUMNS:
        pairs = zip(column(rows, key), column(plan.rows, key), plan.limits[key], strict=True)
        shares = [abs(a - b) / abs(b) / limit for a, b, limit in pairs]
        worst = max(range(len(shares)), key=lambda n: shares[n] if shares[n] == shares[n] else float("inf"))
        source = f"row {worst + 1}: {rows[worst][key]}, not {plan.rows[worst][key]}"
        bounds.append(Bound(f"{key}, share of its envelope", shares[worst], 1.0, source))
    return bounds


def campaign(args: argparse.Namespace, runner: Runner) -> list[Relay]:
    """Schedules until there are as many segments as asked for, or no time."""
    began, done, segments = time.monotonic(), list[Relay](), 0
    while segments < args.segments:
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            print(f"stopped after {args.minutes:g} minutes", flush=True)
            break
        schedule = draw(args.seed, args.first + len(done), tuple(args.backends), args.ranks)
        made = runner.relay(schedule)
        done.append(made)
        segments += len(schedule.segments)
        verdict = "; ".join(made.problems) or f"{made.share:.2f} of its envelope"
        text = f"{len(done):>3} {segments:>4} segments {time.monotonic() - began:5.0f} s  {schedule.plan}: {verdict}"
        print(text[:400], flush=True)
        if made.problems:
            small, tried = shrink(schedule, lambda one: bool(runner.relay(one).problems), args.tries)
            print(f"FAILS, made smaller in {tried} tries:", *commands(small), sep="\n  ", flush=True)
        if args.out:
            args.out.write_text(json.dumps(record(done, args), indent=1) + "\n", encoding="utf-8")
    return done


def record(done: Sequence[Relay], args: argparse.Namespace) -> dict[str, Any]:
    """The report as JSON values."""
    rows = [
        {
            "plan": relay.schedule.plan,
            "share": relay.share,
            "problems": relay.problems,
            "legs": [[asdict(segment) for segment in leg] for leg in relay.schedule.legs],
        }
        for relay in done
    ]
    return {"seed": args.seed, "segments": sum(len(r.schedule.segments) for r in done), "relays": rows}


def summary(done: Sequence[Relay]) -> str:
    """What was swapped how often, and the largest share by plan."""
    segments = [segment for relay in done for segment in relay.schedule.segments]
    swaps = Counter[str]()
    for relay in done:
        for leg in relay.schedule.legs:
            for before, after in zip(leg, leg[1:], strict=False):
                swaps["framework"] += before.backend != after.backend
                swaps["layout"] += before.layout != after.layout
                swaps["options"] += before.options != after.options
        for leg in PLANS[relay.schedule.plan]:
            swaps[{"grow": "growth", "lora": "adapters"}.get(leg.kind, "start")] += leg.kind != "start"
            swaps["length"] += len(leg.stages) > 1
    del swaps["start"]
    lines = [f"swaps: {', '.join(f'{count} of {name}' for name, count in swaps.most_common())}"]
    layouts = Counter(f"{segment.backend} {segment.layout}" for segment in segments)
    lines.append(f"segments: {', '.join(f'{count} {name}' for name, count in layouts.most_common())}")
    for plan in PLANS:
        shares = [relay.share for relay in done if relay.schedule.plan == plan and not relay.problems]
        if shares:
            lines.append(f"{plan:<22}{len(shares):>4} relays, at most {max(shares):.2f} of their envelope")
    broken = sum(bool(relay.problems) for relay in done)
    lines.append(f"{len(segments)} segments of {len(done)} relays, {broken} relays with a broken bound")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.relay", description=__doc__.splitlines()[0])
    parser.add_argument("--segments", type=int, default=200, help="at least so many (200)")
    parser.add_argument("--seed", type=int, default=1, help="of the schedules (1)")
    parser.add_argument("--first", type=int, default=0, help="number of the first schedule (0)")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no schedule after that many (0: no limit)")
    parser.add_argument("--backends", nargs="+", default=["ms", "pt"], choices=("ms", "pt"))
    parser.add_argument("--ranks", type=float, default=0.3, help="share of segments by two processes (0.3)")
    parser.add_argument("--noisy", type=int, default=4, help="noisy runs of each plan, K (4)")
    parser.add_argument("--tries", type=int, default=40, help="most schedules tried in making one smaller (40)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON here")
    args = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tele-relay-") as folder:
        done = campaign(args, Runner(Path(folder), args.noisy))
    print(f"\n{summary(done)}\n{(time.monotonic() - began) / 60:.1f} minutes, seed {args.seed}")
    return 1 if any(relay.problems for relay in done) or not done else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
