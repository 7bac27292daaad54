"""The campaign of hostile files: each command ends in one line and exit code 2, soon, and in little memory.

    python -m tests.campaigns.hostile_files --trials 1000 --seed 0 --out report.json

A trial makes one hostile input from a valid one (tests/campaigns/hostile_inputs.py) and runs the verb that reads it, in
a process forked from this one, so that what is measured is the input's and not the interpreter's start. The processor
time, the peak of memory above what it began with, the exit code and everything printed are judged.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from telechat_twins.core import cli
from telechat_twins.core.shown import LONGEST
from tests.campaigns.hostile_cases import Bench
from tests.campaigns.hostile_inputs import Case

# What the verbs import, loaded once so that no trial pays for it.
VERBS = ("convert", "data", "forward", "grow", "mup.predict", "mup.search", "plan", "plan.growth", "tokenize", "train")
CONVERT = ("copy", "growth.files", "growth.schedule", "hf.folder", "mindformers.source")
CPU_S, MEMORY_MB, WALL_S = 2.0, 200.0, 60.0
ADDRESS_SPACE = 4 << 30  # above what is mapped already: a runaway ends in MemoryError and not in the machine's


@dataclass(frozen=True)
class Outcome:
    """How one trial went. ``fault`` is empty when every promise was kept."""

    trial: int
    name: str
    words: str
    code: int
    cpu_s: float
    wall_s: float
    memory_mb: float
    line: str
    fault: str


def execute(words: Sequence[str], printed: Path) -> tuple[int, float, float, float]:
    """(exit code, processor seconds, seconds, megabytes) of a verb in a process of its own; 256 for a hang.

    Megabytes are the peak of its memory above what it began with.
    """
    started = time.monotonic()
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            handle = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            mapped, held = (int(n) * resource.getpagesize() for n in Path("/proc/self/statm").read_text().split()[:2])
            os.write(tell, str(held // 1024).encode())
            resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE,) * 2)
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", errors="backslashreplace") for n in (1, 2))  # noqa: SIM115
            code = cli.main(list(words))
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > WALL_S:
            os.kill(pid, 9)
            _, status, usage = os.wait4(pid, 0)
            status = 256 << 8
            break
        time.sleep(0.002)
    os.close(tell)
    held = int(os.read(told, 100) or 0)
    os.close(told)
    code = status >> 8 if status & 0x7F == 0 else -(status & 0x7F)
    return code, usage.ru_utime + usage.ru_stime, time.monotonic() - started, (usage.ru_maxrss - held) / 1024


def judge(case: Case, code: int, cpu_s: float, memory_mb: float, text: str) -> str:
    """What a trial did that it must not; empty if nothing."""
    lines = text.splitlines()
    told = [line for line in lines if line.startswith("tele: ")]
    if code == 256:
        return f"hangs for {WALL_S:.0f} s"
    if "Traceback" in text or code not in (0, 2):
        return f"exit code {code}{', a traceback' if 'Traceback' in text else ''}"
    if code == 0 and not case.may_pass:
        return "is accepted"
    if code == 2 and (len(told) != 1 or any(not line.startswith("note: ") for line in lines if line not in told)):
        return f"{len(lines)} lines instead of one"
    if any(not line.isprintable() or len(line) > LONGEST + 200 for line in text.split("\n")):
        return "prints control characters or an endless line"
    if cpu_s > CPU_S:
        return f"takes {cpu_s:.1f} s"
    if memory_mb > MEMORY_MB:
        return f"takes {memory_mb:.0f} MB"
    return ""


def campaign(trials: int, seed: int, say: Callable[[str], None]) -> list[Outcome]:
    """Run ``trials`` cases; trial n of a seed is the same every time."""
    for module in (
        *(f"telechat_twins.core.commands.{verb}" for verb in VERBS),
        *(f"telechat_twins.convert.{name}" for name in CONVERT),
    ):
        importlib.import_module(module)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="tele-hostile-") as name:
        folder = Path(name)
        (folder / "valid").mkdir()
        bench = Bench(folder / "valid")
        for trial in range(trials):
            here = folder / "trial"
            here.mkdir()
            case = bench.make(random.Random(f"{seed}/{trial}"), here)
            code, cpu_s, wall_s, memory = execute(case.words, folder / "printed")
            text = (folder / "printed").read_text(encoding="utf-8", errors="replace")
            fault = judge(case, code, cpu_s, memory, text)
            line = next((part for part in reversed(text.splitlines()) if part.startswith("tele: ")), text[-300:])
            words = " ".join(word if len(word) < 80 else f"{word[:77]}..." for word in case.words)
            outcomes.append(Outcome(trial, case.name, words, code, cpu_s, wall_s, memory, line[:400], fault))
            if fault:
                say(f"trial {trial}: {case.name}: {fault}\n  {words!r}\n  {line[:300]}")
            elif trial % 100 == 99:
                say(f"{trial + 1} of {trials}")
            shutil.rmtree(here)
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table of a report: a line for each kind of input."""
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome.name.partition(",")[0], []).append(outcome)
    kinds = dict(sorted(kinds.items())) | {"all": list(outcomes)}
    lines = [
        "| input | trials | refused | passed cleanly | faults | longest s | most MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, group in kinds.items():
        faults = sum(bool(o.fault) for o in group)
        codes = Counter(o.code for o in group if not o.fault)
        longest, most = max(o.cpu_s for o in group), max(o.memory_mb for o in group)
        lines.append(f"| {kind} | {len(group)} | {codes[2]} | {codes[0]} | {faults} | {longest:.2f} | {most:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--out", type=Path, metavar="F", help="write every outcome to this JSON file")
    args = parser.parse_args(argv)
    outcomes = campaign(args.trials, args.seed, lambda text: print(text, flush=True))
    print(summary(outcomes))
    if args.out:
        args.out.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n", encoding="utf-8")
    return int(any(outcome.fault for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
