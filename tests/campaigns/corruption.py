"""`python -m tests.campaigns.corruption`: damage files of every format and see what the readers make of them.

Each trial copies a small intact folder, damages one file of it (``corrupting``) and reads all of it. It ends in one of

    refused     a UserError of one line
    unchanged   what is read is what was written: the damage met nothing that is read
    silent      something else is read, and nothing is said
    broken      any other exception, a message of several lines, the death of the process, or no end within 30 s

The promise: nothing is broken, and nothing is silent where the format has hashes. Trials are read in a process of their
own, so that one that dies or hangs costs itself alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from telechat_twins.core.errors import UserError
from tests.campaigns.corrupting import corrupt
from tests.campaigns.corruption_formats import FORMATS

LIMIT_S = 30.0
START_S = 300.0
OUTCOMES = ("refused", "unchanged", "silent", "broken")


@dataclass(frozen=True)
class Trial:
    """``outcome``: one of OUTCOMES; ``hashed``: whether the damaged file has a hash; ``said``: the message."""

    format: str
    seed: int
    kind: str
    file: str
    damage: str
    hashed: bool
    outcome: str
    said: str = ""

    @property
    def breaks(self) -> bool:
        """Whether the promise is broken."""
        return self.outcome == "broken" or (self.outcome == "silent" and self.hashed)


def run_trial(name: str, work: Path, seed: int) -> Trial:
    """One trial on the folders ``intact`` and ``other`` of ``work``, where the digest of the first lies, too."""
    form, intact, folder = FORMATS[name], work / "intact", work / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(intact, folder)
    damage = corrupt(folder, work / "other", seed)
    hashed = form.hashed(intact, damage.file) and not (form.inside and damage.kind == "replaced")
    outcome, said = "broken", ""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            found = form.read(folder)
        outcome = "unchanged" if found == (work / "digest").read_text() else "silent"
    except UserError as error:
        said = str(error)
        outcome = "broken" if "\n" in said else "refused"
    except BaseException as error:  # noqa: BLE001 - what a reader lets through is what is looked for
        said = f"{type(error).__name__}: {error}"
    return Trial(name, seed, damage.kind, damage.file, damage.said, hashed, outcome, said[:300])


def prepare(name: str, work: Path) -> None:
    """An intact folder, another one, and the digest of the first."""
    form = FORMATS[name]
    form.make(work / "intact", 0)
    form.make(work / "other", 1)
    first, second = form.read(work / "intact"), form.read(work / "other")
    if first == second:
        raise AssertionError(f"{name}: two folders of different content read alike")
    (work / "digest").write_text(first)


def _serve(name: str, work: str, seeds: Sequence[int], results: Connection) -> None:
    """Trials in a process of their own, in the order of ``seeds``; first None, when everything is imported."""
    FORMATS[name].read(Path(work) / "intact")
    results.send(None)
    for seed in seeds:
        results.send(run_trial(name, Path(work), seed))


def run_format(name: str, trials: int, seed: int) -> Iterator[Trial]:
    """Trials number ``seed`` to ``seed + trials - 1`` of a format."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="corruption-") as folder:
        work = Path(folder)
        prepare(name, work)
        left = list(range(seed, seed + trials))
        while left:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(name, folder, left, sender))
            process.start()
            sender.close()
            try:
                receiver.poll(START_S)
                receiver.recv()
                while left and receiver.poll(LIMIT_S):
                    yield receiver.recv()
                    left.pop(0)
                fault = f"no end within {LIMIT_S:g} s"
            except EOFError:
                process.join()
                fault = f"the process ended with {process.exitcode}"
            process.kill()
            process.join()
            if left:
                damaged = left.pop(0)
                yield Trial(name, damaged, "?", "?", "?", False, "broken", fault)


def summary(trials: Sequence[Trial]) -> str:
    """A table with a line for each format, and the trials that break the promise."""
    lines = [f"{'format':26}{'trials':>8}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES) + "  silent, hashed"]
    for name in dict.fromkeys(trial.format for trial in trials):
        mine = [trial for trial in trials if trial.format == name]
        counts = Counter(trial.outcome for trial in mine)
        guarded = sum(trial.outcome == "silent" and trial.hashed for trial in mine)
        row = f"{name:26}{len(mine):>8}" + "".join(f"{counts[outcome]:>11}" for outcome in OUTCOMES)
        lines.append(f"{row}{guarded:>16}")
    for trial in [trial for trial in trials if trial.breaks][:40]:
        where = f"{trial.format}, trial {trial.seed}, {trial.file} {trial.kind}"
        lines.append(f"{trial.outcome}: {where} ({trial.damage}): {trial.said}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; 1 if its promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.corruption", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000, metavar="N", help="of each format (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first trial (0)")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS), metavar="NAME")
    parser.add_argument("--out", type=Path, metavar="F", help="write every trial to a JSON file")
    args = parser.parse_args(argv)
    found: list[Trial] = []
    for name in args.formats:
        started = time.monotonic()
        found += run_format(name, args.trials, args.seed)
        print(f"{name}: {args.trials} trials in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(trial) for trial in found], indent=1) + "\n", encoding="utf-8")
    print(summary(found))
    return 1 if any(trial.breaks for trial in found) else 0


if __name__ == "__main__":
    from tests.campaigns.corruption import main as run  # what the other process imports, not this __main__ copy

    raise SystemExit(run())
