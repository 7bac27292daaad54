"""`tele mup check`: the coordinate check."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from telechat_twins.core import backends
from telechat_twins.core.config import load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import writable_file, write_text
from telechat_twins.core.files.pictures import save_picture
from telechat_twins.core.mup.coordinates import (
    FLAT,
    GROUPS,
    GROWING,
    LOGITS_LOW,
    MUP,
    STANDARD,
    SlopeVerdict,
    WidthRecord,
    configs,
    judge,
    measure,
    slope,
    to_json,
    token_batch,
)

FACTORS = (1, 2, 4, 8)
ROWS, MAX_SEQ_LEN = 4, 64

DESCRIPTION = f"""\
Run the first updates of a training run at several widths and check that activations keep their size: the coordinate
check of a complete muP implementation.

Measured are the embedding's output, the outputs of attention and ffn, the residual stream after each block, and the
logits: the means of |x| and of |x - x at the start|, before each update and after the last, on a fixed batch of random
tokens (no data is needed). Widths are the config's times 1, 2, 4 and 8, or those of --widths. Its hyper-parameters are
transferred as by `tele mup transfer`, and for contrast used unchanged at every width (standard parametrisation).
Under muP the slope of log size over log width must lie within {FLAT} of 0, for sizes at the start and for changes after
the last update (for logits from {LOGITS_LOW}, since they start smaller in wider models). In the contrast some change
must grow by more than {GROWING}, which shows that the check can detect growth. Exit code 1 when a bound is broken.
"""
EXAMPLES = """\
examples:
  tele mup check --backend pt --config teleflm-tiny --out check
  tele mup check --backend ms --config flm-tiny --widths 64 128 256 --steps 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele mup check``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "--backend", required=True, choices=sorted(backends.BACKENDS), help="ms: MindSpore, pt: PyTorch"
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="F",
        help="run of the narrow model (file or bundled name); only its model and optim sections are used",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. optim.lr=1e-3"
    )
    parser.add_argument(
        "--widths", nargs="+", type=int, metavar="W", help="hidden sizes (default: the config's x 1 to 8)"
    )
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="updates at each width, 1 to 100 (5)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write check.json and check.png here")


def run(args: argparse.Namespace) -> int:
    """0 when everything holds, 1 when a bound is broken."""
    if not 1 <= args.steps <= 100:
        raise UserError(f"--steps: must be from 1 to 100, found {args.steps}")
    config = load_run_config(args.config, args.set)
    if not config.train.steps:
        raise UserError("train.epochs: the check has no data; give train.steps in its place")
    widths = args.widths or [factor * config.model.hidden_size for factor in FACTORS]
    if len(set(widths)) < 3 or len(set(widths)) < len(widths):
        raise UserError(f"--widths: give at least 3 different widths, found {' '.join(map(str, widths))}")
    if args.out:
        for name in ("check.json", "check.png"):
            writable_file(args.out / name, "--out")
    seq_len = min(config.data.seq_len, MAX_SEQ_LEN)
    try:
        runs = configs(config, sorted(widths), ROWS, seq_len)
    except UserError as error:
        raise UserError(f"--widths: {error}") from None
    batch = token_batch(config.model.vocab_size, ROWS, seq_len, config.train.seed)
    records = []
    with tqdm(total=len(runs) * (args.steps + 1), unit="step", file=sys.stderr, mininterval=2) as bar:
        for parametrisation, one in runs:
            bar.set_postfix_str(f"{parametrisation}, width {one.model.hidden_size}")
            records.append(measure(args.backend, parametrisation, one, batch, args.steps, bar.update))
    judged = judge(records)
    title = (
        f"{Path(args.config).name}, {backends.TITLES[args.backend]}, widths {' '.join(map(str, sorted(widths)))}, "
        f"{args.steps} updates on {ROWS} x {seq_len} tokens"
    )
    print(describe(title, records, judged))
    if args.out:
        facts = {"config": args.config, "backend": args.backend, "steps": args.steps, "tokens": [ROWS, seq_len]}
        report = to_json(records, judged, facts)
        write_text(args.out / "check.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        plot(title, records, args.out / "check.png")
        print(f"wrote {args.out / 'check.json'} and check.png")
    return 0 if all(one.holds for one in judged) else 1


def describe(title: str, records: Sequence[WidthRecord], judged: Sequence[SlopeVerdict]) -> str:
    """Text report of the slopes and of broken bounds."""
    last = len(records[0].losses) - 1
    sides = {name: [r for r in records if r.parametrisation == name] for name in (MUP, STANDARD)}
    heads = [f"{name}, {kind}" for name in sides for kind in ("start", f"change after {last}")]
    lines = [title, "slope of log mean|x| over log width", "", " " * 8 + "".join(head.rjust(26) for head in heads)]
    for group in GROUPS:
        cells = [
            slope(side, kind, group, step)
            for side in sides.values()
            for kind, step in (("scales", 0), ("changes", last))
        ]
        lines.append(f"{group:<8}" + "".join(f"{cell:+26.2f}" for cell in cells))
    broken = [one for one in judged if not one.holds]
    lines += ["", *(f"BROKEN  {one.what}: {one.group} {one.slope:+.2f}, must be {_range(one)}" for one in broken)]
    if not broken:
        lines.append(f"ok: flat within {FLAT} under muP, growing in the contrast")
    return "\n".join(lines)


def _range(one: SlopeVerdict) -> str:
    if one.high == float("inf"):
        return f"at least {one.low:g}"
    return f"from {one.low:g} to {one.high:g}"


def plot(title: str, records: Sequence[WidthRecord], path: Path) -> Path:
    """Plot of the mean change over width by group, with a line for each update; muP above, the contrast below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = range(1, len(records[0].losses))
    figure, axes = pyplot.subplots(2, len(GROUPS), sharex=True, figsize=(14, 6), layout="constrained", squeeze=False)
    for row, name in zip(axes, (MUP, STANDARD), strict=True):
        side = [record for record in records if record.parametrisation == name]
        for axis, group in zip(row, GROUPS, strict=True):
            for step in steps:
                colour = pyplot.get_cmap("viridis")(step / len(records[0].losses))
                axis.plot(
                    [r.width for r in side], [r.changes[group][step] for r in side], "o-", color=colour, markersize=3,
                    label=f"after {step}",
                )  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.set_title(f"{name}: {group}", fontsize=10)
            axis.grid(alpha=0.3)
    for column in range(len(GROUPS)):  # one scale for both rows, so that flat and steep can be compared
        low = min(axes[row][column].get_ylim()[0] for row in (0, 1))
        high = max(axes[row][column].get_ylim()[1] for row in (0, 1))
        for row in (0, 1):
            axes[row][column].set_ylim(low, high)
        axes[1][column].set_xlabel("width")
    axes[0][0].set_ylabel("mean |x - x at the start|")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"Coordinate check: {title}", fontsize=10)
    save_picture(figure, path, 110)
    pyplot.close(figure)
    return path
