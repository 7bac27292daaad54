"""`make mutation`: every fault of the catalogue, planted in both twins, and the share that the suite's bounds see.

    python -m tests.mutation [--only PATTERN] [--backends ms pt] [--out FILE] [--list]

Exit 1 when a fault without a reason survives, when a fault breaks other bounds than the expected one, when a fault with
a reason is seen after all, or when a check breaks a bound without any fault.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from telechat_twins.core.parity.bounds import Bound
from tests.mutation.catalogue import FAULTS, KINDS, LAYOUTS, in_layout, named
from tests.mutation.checks import Checks, Verdict
from tests.mutation.fault import Fault
from tests.support.frameworks import BACKENDS

LOOSE = 0.02  # the rule of thumb for two runs' losses that docs/mutation.md and docs/parity.md speak of
TITLES = {"ms": "MindSpore", "pt": "PyTorch"}


@dataclass
class Score:
    """What became of the faults: verdicts by (backend, fault), and what checks broke without a fault."""

    verdicts: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    controls: dict[tuple[str, str], list[Bound]] = field(default_factory=dict)

    def seen(self, backend: str, name: str) -> bool:
        """Whether a fault broke a bound that its entry names: a launch that fails for another reason kills nothing."""
        return any(re.search(_fault(name).bound, bound.what) for bound in self.verdicts[backend, name].broken)

    @property
    def killed(self) -> int:
        return sum(self.seen(*key) for key in self.verdicts)

    @property
    def survivors(self) -> list[tuple[str, Fault]]:
        return [(backend, _fault(name)) for backend, name in self.verdicts if not self.seen(backend, name)]

    def problems(self) -> list[str]:
        """What must not be: see the module's docstring."""
        found = [
            f"{TITLES[backend]}, {check}: broken without a fault: {', '.join(b.what for b in bounds if not b.holds)}"
            for (backend, check), bounds in self.controls.items()
            if not all(bound.holds for bound in bounds)
        ]
        for (backend, name), verdict in self.verdicts.items():
            fault = _fault(name)
            if not verdict.broken and not fault.survives:
                found.append(f"{TITLES[backend]}: '{name}' survives {fault.check}; give it a bound or a reason")
            elif verdict.broken and fault.survives:
                found.append(f"{TITLES[backend]}: '{name}' is said to survive, but breaks {verdict.broken[0].what}")
            elif verdict.broken and not self.seen(backend, name):
                found.append(
                    f"{TITLES[backend]}: '{name}' breaks {first_line(verdict.broken[0].what)}, not {fault.bound}"
                )
        return found


def _fault(name: str) -> Fault:
    found = named(name)
    assert found is not None  # verdicts have the names of faults
    return found


def score(faults: Sequence[Fault], backends: Sequence[str], folder: Path, show: bool = True) -> Score:
    """Plant ``faults`` in each of ``backends``; ``folder`` keeps runs and logs."""
    checks, made = Checks(folder), Score()
    for backend in backends:
        layouts = [fault for fault in faults if fault.check.startswith("layout ")]
        checks.layouts.prepare(backend, layouts)
        for check in dict.fromkeys(fault.check for fault in faults):
            made.controls[backend, check] = checks.bounds(backend, check, None)
        for fault in faults:
            verdict = made.verdicts[backend, fault.name] = checks.verdict(backend, fault)
            if show:
                print(line(backend, fault, verdict), flush=True)
    return made


def line(backend: str, fault: Fault, verdict: Verdict) -> str:
    """One row of the report."""
    if not verdict.broken:
        return f"SURVIVES  {backend}  {fault.name:<48} {fault.check:<22} {fault.survives or 'no reason given'}"
    worst = verdict.broken[0]
    return f"killed    {backend}  {fault.name:<48} {fault.check:<22} {times(verdict):>9}  {first_line(worst.what)}"


def first_line(text: str) -> str:
    return (text.splitlines() or [""])[0][:70]


def times(verdict: Verdict) -> str:
    """The margin for people: how many times its limit, or that the limit was equality."""
    return "unequal" if math.isinf(verdict.margin) else f"{verdict.margin:.2g} x"


def summary(made: Score) -> str:
    """The share killed, by kind and by bound, and the smallest margins."""
    total = len(made.verdicts)
    kinds, seen, bounds = Counter[str](), Counter[str](), Counter[str]()
    for (backend, name), verdict in made.verdicts.items():
        kinds[_fault(name).kind] += 1
        seen[_fault(name).kind] += made.seen(backend, name)
        if made.seen(backend, name):
            bounds[family(verdict.broken[0].what)] += 1
    lines = [f"{'kind':<14}{'planted':>8}{'killed':>8}"]
    lines += [f"{kind:<14}{kinds[kind]:>8}{seen[kind]:>8}  {KINDS[kind]}" for kind in KINDS if kinds[kind]]
    lines += ["", "farthest broken bound of each:"]
    lines += [f"{count:>8}  {what}" for what, count in bounds.most_common()]
    finite = sorted(
        (v.margin, backend, name)
        for (backend, name), v in made.verdicts.items()
        if v.broken and math.isfinite(v.margin)
    )
    lines += ["", "smallest margins (value / limit):"]
    lines += [f"{margin:>9.2g}  {backend}  {name}" for margin, backend, name in finite[:8]]
    moved = [verdict.loss for verdict in made.verdicts.values() if verdict.loss is not None]
    below = sum(loss < LOOSE for loss in moved)
    lines += ["", f"of {len(moved)} that one batch shows, {below} move its loss by less than {LOOSE:.0%}"]
    lines += ["", *(f"survives: {backend} {f.name}: {f.survives or 'NO REASON'}" for backend, f in made.survivors)]
    lines += [f"PROBLEM  {problem}" for problem in made.problems()]
    lines.append(f"mutation score: {made.killed} of {total} killed, {100 * made.killed / max(1, total):.1f} %")
    return "\n".join(lines)


def family(what: str) -> str:
    """A bound without the name of the tensor that was worst."""
    return re.sub(r"refused.*", "refused by the product", re.sub(r" \([^)]*\)", "", what), flags=re.S)


def record(made: Score) -> dict[str, Any]:
    """The report as JSON values; margins of equalities are null."""
    rows = []
    for (backend, name), verdict in made.verdicts.items():
        fault, worst = _fault(name), verdict.broken[0] if verdict.broken else None
        rows.append(
            {
                "fault": name,
                "text": fault.text,
                "kind": fault.kind,
                "check": fault.check,
                "backend": backend,
                "killed": made.seen(backend, name),
                "bounds": [bound.what for bound in verdict.broken],
                "bound": worst and worst.what,
                "value": worst and (worst.value if math.isfinite(worst.value) else str(worst.value)),
                "limit": worst and worst.limit,
                "loss_moved": verdict.loss,
                "margin": verdict.margin if verdict.broken and math.isfinite(verdict.margin) else None,
                "survives": fault.survives or None,
            }
        )
    return {"planted": len(rows), "killed": made.killed, "score": made.killed / max(1, len(rows)), "faults": rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="PATTERN", help="faults whose name, kind or check contains this pattern")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="twins (ms pt)")
    parser.add_argument(
        "--layouts",
        nargs="*",
        choices=LAYOUTS,
        default=list(LAYOUTS),
        help="plant faults of the model's arithmetic here, too",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON here")
    parser.add_argument("--list", action="store_true", help="print the catalogue and plant nothing")
    args = parser.parse_args(argv)
    faults = [*FAULTS.values(), *(fault for layout in args.layouts for fault in in_layout(FAULTS.values(), layout))]
    faults = [f for f in faults if not args.only or re.search(args.only, f"{f.name} | {f.kind} | {f.check}")]
    if args.list:
        print("\n".join(f"{f.kind:<12}{f.check:<24}{f.name}: {f.text}" for f in faults))
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tele-mutation-") as folder:
        made = score(faults, args.backends, Path(folder))
    print(f"\n{summary(made)}\n{(time.monotonic() - began) / 60:.1f} minutes")
    if args.out:
        args.out.write_text(json.dumps(record(made), indent=1) + "\n", encoding="utf-8")
    return 1 if made.problems() or not made.verdicts else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
