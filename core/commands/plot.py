"""`tele plot`: lay runs side by side, as PNG, SVG and one HTML page with zoom."""

from __future__ import annotations

import argparse
from pathlib import Path

from telechat_twins.core.errors import UserError

EPILOG = """\
examples:
  tele plot runs/first
  tele plot runs/lr-1e-4 runs/lr-3e-4 --columns loss grad_norm mfu --out compared
  tele plot runs/grown --against tokens
  tele plot runs/ms runs/pt --difference

RUN is the folder of a run, its metrics.jsonl, or a folder whose subfolders are runs. The page needs no network."""


SUFFIXES = (".png", ".svg", ".html")
OTHER_SUFFIXES = (".jpg", ".jpeg", ".pdf", ".webp", ".gif", ".eps", ".htm")  # formats that are not written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele plot``."""
    parser.epilog = EPILOG
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs, finished or not")
    parser.add_argument(
        "--out", metavar="NAME", default="plot", help="writes NAME.png, NAME.svg and NAME.html (default: plot)"
    )
    parser.add_argument(
        "--columns", metavar="COLUMN", nargs="+", help="of metrics.jsonl (default: loss grad_norm lr tokens_per_s)"
    )
    parser.add_argument("--against", choices=("step", "tokens"), default="step", help="x axis (default: step)")
    parser.add_argument(
        "--difference", action="store_true", help="also relative differences from the first run, step by step"
    )


def run(args: argparse.Namespace) -> int:
    """Draw; one line on stdout with the files."""
    from telechat_twins.core.files.atomic import writable_file
    from telechat_twins.core.train.plots.page import write_page
    from telechat_twins.core.train.plots.picture import draw
    from telechat_twins.core.train.plots.series import COLUMNS, panels, read_runs

    name = Path(args.out)
    if name.suffix.lower() in OTHER_SUFFIXES:
        raise UserError(f"--out {name}: {', '.join(SUFFIXES)} are written, no {name.suffix}; leave the ending out")
    runs = read_runs(args.runs)
    if args.difference and len(runs) < 2:
        raise UserError("--difference: needs two runs or more, found one; name another")
    known = {key for one in runs for row in one.rows for key in row}
    columns = args.columns or [name for name in COLUMNS if name in known]
    shown = panels(runs, columns, args.against, args.difference)
    marks: dict[float, str] = {}
    for one in runs:
        places = {row["step"]: float(row[args.against]) for row in one.rows if args.against in row}
        marks |= {places[step]: text for step, text in one.marks.items() if step in places}
    name = name.with_suffix("") if name.suffix.lower() in SUFFIXES else name
    paths = [Path(f"{name}{suffix}") for suffix in SUFFIXES]
    for path in paths:
        writable_file(path, "--out")
    title = " \u00b7 ".join(one.label for one in runs[:6]) + (f" and {len(runs) - 6} more" if len(runs) > 6 else "")
    draw(shown, title, args.against, marks, paths[:2])
    write_page(shown, title, args.against, marks, paths[2])
    print(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}: {', '.join(map(str, paths))}")
    return 0
