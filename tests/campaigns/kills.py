"""`python -m tests.campaigns.kills`: kill runs and commands at random moments and hold what is left against promises.

After every kill: no process is left, every visible checkpoint or folder opens and is whole, and nothing that was
complete before is lost. When the work has then been brought to its end: no leftover of any kind, and results equal, bit
for bit, to those of work that was never interrupted. What is killed:

    run     `tele train`, in PyTorch and MindSpore, by one rank and by two: the launcher, a rank, msrun or torchrun,
            MindSpore's scheduler, or all at once, by -9, -15 or Ctrl-C, while starting, spawning its ranks, resuming,
            training, saving, removing old checkpoints or finishing; whole models, adapters, preferences, stages of
            length, or with a held-out loss (--recipes)
    data    `tele data --force` over a data set        convert   `tele convert --force` over a released folder
    grow    `tele grow`                                 save      a process that saves and prunes without pause
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaigns.killed_commands import convert_trials, data_trials, grow_trials, save_trials
from tests.campaigns.killed_recipes import RECIPES
from tests.campaigns.killed_runs import MOMENTS, RunTrials, Work
from tests.campaigns.killing import HOW, Trial

# Of a hundred trials. A start of MindSpore costs several of PyTorch.
SHARES = {"pt": 44, "ms": 12, "save": 20, "data": 12, "convert": 8, "grow": 4}


def trials(kind: str, count: int, chance: random.Random, work: Work, only: argparse.Namespace) -> Iterator[Trial]:
    """``count`` trials of one kind."""
    if kind in ("pt", "ms"):
        runs = RunTrials(kind, work, chance, only.moments, only.how, only.recipes)
        while count > 0:
            for trial in runs.chain(min(only.chain, count)):
                count -= 1
                yield trial
        return
    makers: dict[str, Callable[[int, random.Random, Path], Iterator[Trial]]] = {
        "data": data_trials,
        "convert": convert_trials,
        "grow": grow_trials,
        "save": save_trials,
    }
    yield from makers[kind](count, chance, work.folder / kind)


def shares(count: int, kinds: list[str]) -> dict[str, int]:
    """How many trials of each kind make up ``count``; each kind gets one at least."""
    whole = sum(SHARES[kind] for kind in kinds)
    parts = {kind: max(1, count * SHARES[kind] // whole) for kind in kinds}
    parts[kinds[0]] = max(1, parts[kinds[0]] + count - sum(parts.values()))
    return parts


def summary(done: list[Trial]) -> str:
    """A line a kind, moment and victim, and every broken promise."""
    counts = Counter((t.kind, t.moment, t.who, t.how) for t in done)
    broken = [(t, fault) for t in done for fault in t.faults]
    lines = [f"{'kind':<14}{'moment':<12}{'killed':<12}{'by':<10}{'trials':>6}"]
    lines += [f"{a:<14}{b:<12}{c:<12}{d:<10}{n:>6}" for (a, b, c, d), n in sorted(counts.items())]
    names = ("unreadable", "orphan", "leftover", "lost", "different", "not finished")
    found = Counter(fault.partition(":")[0] for _, fault in broken)
    lines += ["", f"{len(done)} kills: " + ", ".join(f"{found.pop(name, 0)} {name}" for name in names)]
    lines += [f"{count} {name}" for name, count in found.items()]
    lines += [f"BROKEN  {t.kind}, {t.moment}, {t.who} by {t.how}: {fault}" for t, fault in broken]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300, help="kills in all (300)")
    parser.add_argument("--seed", type=int, default=1, help="of what is killed when (1)")
    parser.add_argument("--out", type=Path, help="write every trial as JSON here")
    parser.add_argument("--kinds", nargs="+", choices=sorted(SHARES), default=list(SHARES), help="only these kinds")
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS), help="of runs: only these")
    parser.add_argument("--how", nargs="+", choices=sorted(HOW), default=[], help="of runs: only `tele`, by these")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=["plain"], help="of runs: what they do")
    parser.add_argument("--chain", type=int, default=5, help="kills of a run before it is left to its end (5)")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no trial after that many (0: no limit)")
    args = parser.parse_args(argv)
    began, done = time.monotonic(), []
    folder = Path(tempfile.mkdtemp(prefix="tele-kills-"))
    work = Work(folder)
    queues = [
        trials(kind, count, random.Random(f"{args.seed} {kind}"), work, args)
        for kind, count in shares(args.trials, list(dict.fromkeys(args.kinds))).items()
    ]
    # In turns, so that a campaign that runs out of time has seen something of each kind.
    while queues:
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            print(f"stopped after {args.minutes:g} minutes", flush=True)
            break
        queue = queues.pop(0)
        try:
            trial = next(queue, None)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            break
        if trial is None:
            continue
        queues.append(queue)
        done.append(trial)
        verdict = "; ".join(trial.faults) or "ok"
        print(f"{len(done):>4}  {trial.kind}, {trial.moment}, {trial.who} by {trial.how}: {verdict}", flush=True)
        if args.out:
            args.out.write_text(json.dumps([t._asdict() for t in done], indent=1) + "\n", encoding="utf-8")
    print(f"\n{summary(done)}\n{(time.monotonic() - began) / 60:.1f} minutes, seed {args.seed}")
    broken = any(trial.faults for trial in done)
    if broken:
        print(f"kept: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if broken or not done else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
