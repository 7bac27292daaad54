"""Training runs of the kill campaign: each is killed a few times, resumed each time, and then brought to its end."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.errors import UserError
from telechat_twins.core.train.metrics import MEASURED, read_metrics
from tests.campaigns.killed_recipes import RECIPES, STEPS
from tests.campaigns.killing import Trial, family, finish, kill, leftovers, orphans, shows, start, wait_until

LAYOUTS = {"pt": ("single", "tp2", "dp2"), "ms": ("single", "tp2")}
MOMENTS = ("starting", "spawning", "resuming", "training", "saving", "removing", "finishing")
LEAVE = 600  # seconds for a launch to end after a kill


@dataclass
class Work:
    """The folder of a campaign, with the configs and the data of its runs, each made at its first use."""

    folder: Path
    whole: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)

    def config(self, recipe: str) -> Path:
        file = self.folder / f"of-{recipe}" / "run.yaml"
        if not file.exists():
            file.parent.mkdir(parents=True)
            file.write_text(RECIPES[recipe](file.parent))
        return file


class RunTrials:
    """Chains of kills of one backend's runs."""

    def __init__(
        self,
        backend: str,
        work: Work,
        chance: random.Random,
        moments: Sequence[str] = MOMENTS,
        how: Sequence[str] = (),
        recipes: Sequence[str] = ("plain",),
    ) -> None:
        """``moments``: when; ``how``: only the launcher, by one of these (default: anyone, by anything)."""
        self.backend, self.work, self.chance, self.moments, self.how = backend, work, chance, moments, how
        self.recipes, self.count = recipes, 0

    def chain(self, kills: int, plan: list[tuple[str, str, str]] | None = None, layout: str = "") -> Iterator[Trial]:
        """Up to ``kills`` kills of one run, or those of ``plan`` (moment, who, how); the last is judged by its end."""
        chance = self.chance
        layout = layout or chance.choice(LAYOUTS[self.backend])
        recipe = self.recipes[self.count % len(self.recipes)]
        self.count += 1
        out = self.work.folder / f"{self.backend}-{recipe}-{layout}-{self.count}"
        log = out.with_suffix(".log")
        whole = self._whole(recipe, layout)
        words = self._words(
            recipe, layout, out, "--resume", "auto", "--set", f"checkpoint.asynchronous={_coin(chance)}"
        )
        last: Trial | None = None
        for number in range(kills):
            if last is not None:
                yield last
            moment, who, how = plan[number] if plan else self._draw(number, kills)
            last = self._kill(words, out, log, f"{recipe} {layout}", moment, who, how)
            if latest(out) >= STEPS:
                break
        code = finish(words, log)
        assert last is not None
        if code:
            last.faults.append(f"not finished: the resumed run ended with {code}; see {log}")
        else:
            last.faults.extend(_differences(facts(out), whole))
            last.faults.extend(leftovers(out))
        yield last

    def _draw(self, number: int, kills: int) -> tuple[str, str, str]:
        chance = self.chance
        # Nothing is resumed by the first start, and nothing is left to kill once a run has finished.
        left_out = {"resuming" if number == 0 else "", "finishing" if number < kills - 1 else ""}
        possible = [moment for moment in self.moments if moment not in left_out]
        moment = chance.choice(possible or list(self.moments))
        if self.how:
            return moment, "launcher", chance.choice(self.how)
        who = chance.choice(["launcher", "launcher", "rank", "all", "middle"] + ["scheduler"] * (self.backend == "ms"))
        return moment, who, chance.choice(["-9", "-9", "-9", "-15", "Ctrl-C"]) if who == "launcher" else "-9"

    def _kill(self, words: list[str], out: Path, log: Path, what: str, moment: str, who: str, how: str) -> Trial:
        """One start and one kill; a moment that does not come counts as the one that did."""
        before = latest(out)
        process = start(words, log)
        if not self._await(process, out, moment, before):
            moment = "ended"
        members = family(process)
        known = [p for group in members.values() for p in group]
        victims = known if who == "all" else members.get(who) or members.get("launcher", [])
        kill([self.chance.choice(victims)] if who == "rank" and victims else victims, how)
        faults = []
        try:
            # It gives ranks two minutes to save.
            process.wait(LEAVE)
        except subprocess.TimeoutExpired:
            faults.append(f"orphan: the launcher did not end within {LEAVE} s")
            kill(known, "-9")
            process.wait()
        faults += orphans(str(out), known)
        faults += unreadable(out)
        if latest(out) < before:
            faults.append(f"lost: the latest checkpoint was of step {before}, now {latest(out)}")
        return Trial(f"{self.backend} {what}", moment, who if victims else "nobody", how, faults)

    def _await(self, process: subprocess.Popen[bytes], out: Path, moment: str, before: int) -> bool:
        """Wait for a moment of the run; False when the run has ended before."""
        chance = self.chance
        ready = out / "logs" / "launcher.log"
        status = out / "logs" / "status_0.json"
        if moment == "starting":
            began = time.time()
            if not wait_until(lambda: ready.exists() and ready.stat().st_mtime >= began - 1, process):
                return False
            time.sleep(chance.uniform(0, 4))
            return process.poll() is None
        if moment == "spawning":  # there are ranks, but they are not themselves yet
            if not wait_until(lambda: bool({"rank", "scheduler"} & set(family(process))), process):
                return False
            time.sleep(chance.choice([0, chance.uniform(0, 0.1), chance.uniform(0, 0.5)]))
            return process.poll() is None
        old = status.stat().st_mtime_ns if status.exists() else 0
        if not wait_until(lambda: status.exists() and status.stat().st_mtime_ns != old, process):
            return False
        if moment == "resuming":
            time.sleep(chance.uniform(0, 6))
            return process.poll() is None
        step = STEPS if moment == "finishing" else min(before + chance.randint(1, 7), STEPS - 1)
        rows = out / "metrics.jsonl"
        if not wait_until(lambda: rows.exists() and (m := read_metrics(out)) != [] and m[-1]["step"] >= step, process):
            return False
        if moment in ("saving", "removing"):
            prefix = ".tmp-tele-step-" if moment == "saving" else ".gone-tele-"
            if not wait_until(lambda: shows(out, prefix), process):
                return False
            time.sleep(chance.choice([0, 0, chance.uniform(0, 0.03)]))
        else:
            time.sleep(chance.uniform(0, 1.0 if moment == "finishing" else 0.1))
        return process.poll() is None

    def _whole(self, recipe: str, layout: str) -> dict[str, Any]:
        """What a run without interruption leaves."""
        key = (self.backend, recipe, layout)
        if key not in self.work.whole:
            out = self.work.folder / f"whole-{self.backend}-{recipe}-{layout}"
            code = finish(self._words(recipe, layout, out), out.with_suffix(".log"))
            if code:
                raise SystemExit(f"the uninterrupted run ended with {code}; see {out.with_suffix('.log')}")
            self.work.whole[key] = facts(out)
        return self.work.whole[key]

    def _words(self, recipe: str, layout: str, out: Path, *more: str) -> list[str]:
        words = ["train", "--backend", self.backend, "--layout", layout]
        return [*words, "--config", str(self.work.config(recipe)), "--out", str(out), *more]


def _coin(chance: random.Random) -> str:
    return chance.choice(["true", "false"])


def latest(out: Path) -> int:
    """The step of a run's latest checkpoint, 0 without one."""
    try:
        return int((out / "latest").read_text().strip().removeprefix("step-"))
    except (OSError, ValueError):
        return 0


def unreadable(out: Path) -> list[str]:
    """Checkpoints that a user would find and could not open, each file hashed."""
    found = [*out.glob("step-*"), *([out] if (out / "latest").exists() else [])]
    faults = []
    for path in found:
        try:
            open_checkpoint(path)
        except UserError as error:
            faults.append(f"unreadable: {error}")
    return faults


def facts(out: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions: tensors, where the run is, every step's row, which
    checkpoints are kept."""
    checkpoint = open_checkpoint(out)
    trainer = dict(checkpoint.trainer or {})
    trainer["config"] = {k: v for k, v in trainer["config"].items() if k != "checkpoint"}
    rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(out)]
    tensors = {
        f"{kind} {name}": checkpoint.read(kind, name).tobytes()
        for kind in ("weights", "optimizer")
        for name in checkpoint.names(kind)
    }
    kept = sorted(path.name for path in out.glob("step-*"))
    return {"trainer": trainer, "rows": rows, "checkpoints": kept, **tensors}


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return [f"different: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")] * bool(
        names
    )
