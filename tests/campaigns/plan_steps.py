"""Forecasts of this computer's steps beside the measured ones: the table at the end of docs/planning.md, for an idle
machine: `python -m tests.campaigns.plan_steps --label EPYC`, some four minutes.

It runs `tele bench parallel --calibrate` in both backends, writes the rows of the processor ``--label`` into both
languages' pages, and prints the whole report. ``--machines`` also writes configs/machines/cpu-LABEL-BACKEND.yaml from
the same probes. ``--measured F`` makes rows of measurements written before, with the forecasts of today.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from telechat_twins.core import backends, cli
from telechat_twins.core.bench.calibrate import fitted, machines_of
from telechat_twins.core.bench.parallel import forecasts_of
from telechat_twins.core.bench.report import layouts_to_markdown
from telechat_twins.core.bench.worker import spread
from telechat_twins.core.files import ROOT
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.types import JsonObject

PAGES = {ROOT / "docs" / "planning.md": "{}, {}", ROOT / "docs" / "planning.zh.md": "{}，{}"}
LAYOUTS = ("single", "tp2", "pp2", "pp2.vpp2", "ring2", "dp2")
MACHINES = ROOT / "configs" / "machines"


def measure(path: Path, steps: int) -> None:
    """Run the benchmark, whose measurements go to ``path``."""
    words = ["bench", "parallel", "--backends", "ms", "pt", "--calibrate", "--steps", str(steps)]
    if code := cli.main([*words, "--layouts", ",".join(LAYOUTS), "--out", str(path)]):
        raise SystemExit(code)


def forecast_anew(measured: JsonObject) -> JsonObject:
    """``measured`` with the forecasts that today's program makes of its probes."""
    options, machines = measured["options"], {}
    for key, ranks in measured["calibrations"].items():
        machines[key] = machines_of(key.split()[0], options, ranks)
    for row in measured["rows"]:
        machine = machines[f"{row['backend']} {parse_layout(row['layout']).world}"]
        row["forecast"] = forecasts_of(options, row["layout"], *machine)
    return measured


def table_rows(measured: JsonObject, label: str, form: str) -> dict[str, str]:
    """A line of the table for each backend, by its first cell."""
    found = {}
    for backend in dict.fromkeys(row["backend"] for row in measured["rows"]):
        rows = {row["layout"]: row for row in measured["rows"] if row["backend"] == backend}
        cells = []
        for layout in LAYOUTS:
            median = spread([s for turn in rows[layout]["seconds"] for s in turn])["median"]
            error = round(100 * (rows[layout]["forecast"]["seconds"] / median - 1.0))
            cells.append(f"{error:+d} %" if error else "0 %")
        first = form.format(label, backends.TITLES[backend])
        found[first] = f"| {first} | {' | '.join(cells)} |"
    return found


def write_rows(page: Path, rows: dict[str, str]) -> None:
    """Put ``rows`` in the place of the lines that begin with the same cell."""
    lines = page.read_text(encoding="utf-8").split("\n")
    for first, line in rows.items():
        (place,) = (number for number, old in enumerate(lines) if old.startswith(f"| {first} |"))
        lines[place] = line
    page.write_text("\n".join(lines), encoding="utf-8")


def write_machines(measured: JsonObject, label: str) -> None:
    """The machine files of two ranks' probes."""
    for key, ranks in measured["calibrations"].items():
        backend, world = key.split()
        if world == "2":
            name = f"cpu-{label.lower()}-{backend}"
            found = fitted(backend, name, measured["options"], ranks)
            (MACHINES / f"{name}.yaml").write_text(yaml.safe_dump(found, sort_keys=False, width=118), encoding="utf-8")


def main() -> int:
    """Measure, or read what was measured, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", required=True, help="the processor's name in the table, e.g. EPYC")
    parser.add_argument("--measured", metavar="F", help="measurements of `--out`, in place of new ones")
    parser.add_argument("--out", default="plan-steps.json", metavar="F", help="where new measurements go")
    parser.add_argument("--steps", type=int, default=10, help="steps of each layout, two a round (10)")
    parser.add_argument("--machines", action="store_true", help="also write the machine files")
    args = parser.parse_args()
    if args.measured is None:
        measure(Path(args.out), args.steps)
    measured = json.loads(Path(args.measured or args.out).read_text(encoding="utf-8"))
    measured = forecast_anew(measured)
    print(layouts_to_markdown(measured))
    for page, form in PAGES.items():
        rows = table_rows(measured, args.label, form)
        write_rows(page, rows)
        print("\n".join(rows.values()))
    if args.machines:
        write_machines(measured, args.label)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
