"""Results of `tele parity locate`: lines for the terminal, locate.json, and a failing input with its script."""

from __future__ import annotations

import json
from pathlib import Path

from telechat_twins.core.files.atomic import new_file
from telechat_twins.core.parity.locate.case import Case, write_case
from telechat_twins.core.parity.locate.examine import OPERATOR, Examined
from telechat_twins.core.parity.locate.find import Walk
from telechat_twins.core.parity.locate.shrink import shrink
from telechat_twins.core.parity.locate.verdict import Verdict, judge
from telechat_twins.core.types import JsonObject

CASE, SCRIPT = "case.safetensors", "rerun.py"
_LINES = '''"""{site}: {operator} in {title} is wrong on the input beside this file."""
from pathlib import Path

from telechat_twins.core.parity.locate.case import read_case
from telechat_twins.core.parity.locate.verdict import judge

verdict = judge(read_case(Path(__file__).with_name("{case}")), "{backend}")
for row in verdict.rows:
    print(f"{{row.name}}: {{row.error:.3g}} from float64, limit {{row.limit:.3g}}")
raise SystemExit(0 if verdict.holds else 1)
'''


def walk_lines(walk: Walk) -> list[str]:
    """What the walk found, for people."""
    if walk.found is None:
        return [f"nothing to locate: {walk.looked_at} quantities, all within budget (largest {walk.largest:.2f} of it)"]
    found, excess = walk.found, walk.found.excess
    suspect = found.suspect
    errors = ", ".join(f"{side} {excess.errors[side]:.2g} (limit {excess.limits[side]:.2g})" for side in excess.errors)
    lines = [
        f"first beyond its budget: {excess.key}",
        f"  operator  {suspect.operator}, {suspect.direction}, {suspect.where} ({suspect.site})",
        f"  side      {found.side}",
        f"  error     {errors}",
        f"  before it {found.looked_at} quantities within budget, the largest at {found.largest:.2f} of it",
    ]
    if abs(excess.factor - 1.0) > 0.01:  # false for nan
        lines.append(f"  size      the norm of A is {excess.factor:.4g} x that of B")
    if any(excess.nonfinite.values()):
        lines.append("  not finite " + ", ".join(f"{side}: {count}" for side, count in excess.nonfinite.items()))
    others = [f"{other.operator} ({other.site})" for other in found.check.suspects[1:]]
    if others:
        lines.append(f"  or        {', '.join(others)}: they read the same tensor")
    return lines


def to_json(walk: Walk, examined: list[Examined], notes: list[str]) -> JsonObject:
    """The content of locate.json (docs/locate.md)."""
    if walk.found is None:
        return {"found": None, "quantities": walk.looked_at, "largest": walk.largest, "notes": notes}
    found = walk.found
    return {
        "found": {
            "key": found.check.key,
            "operator": found.suspect.operator,
            "site": found.suspect.site,
            "layer": found.suspect.layer,
            "direction": found.suspect.direction,
            "side": found.side,
            "errors": found.excess.errors,
            "limits": found.excess.limits,
            "suspects": [{"operator": s.operator, "site": s.site} for s in found.check.suspects],
        },
        "examined": [{"site": one.suspect.site, "side": one.side, "verdict": one.verdict} for one in examined],
        "quantities": found.looked_at,
        "largest": found.largest,
        "missing": walk.missing,
        "notes": notes,
    }


def write_json(path: Path, content: JsonObject) -> None:
    """Write locate.json; infinite errors as null."""
    text = json.dumps(_finite(content), indent=1, allow_nan=False)
    with new_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if isinstance(value, float) and value - value != 0.0:  # inf or nan
        return None
    return value


def culprit(examined: list[Examined]) -> Examined | None:
    """The first suspect that is wrong alone."""
    return next((one for one in examined if one.verdict == OPERATOR), None)


def smaller(verdict: Verdict) -> Case:
    """A small input on which the operator still fails in the quantity that was worst."""
    name = verdict.worst.name

    def fails(case: Case) -> bool:
        return any(row.name == name and row.fails for row in judge(case, verdict.backend).rows)

    return shrink(verdict.case, fails)


def write_reproduction(folder: Path, case: Case, backend: str, title: str) -> Path:
    """Write a failing case and the script that runs it again; returns the script's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_case(folder / CASE, case)
    script = folder / SCRIPT
    script.write_text(
        _LINES.format(site=case.site, operator=case.operator, title=title, case=CASE, backend=backend), encoding="utf-8"
    )
    return script
