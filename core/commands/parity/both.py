"""``tele parity --config``: compares both backends on one config, on one device and in layouts, against bounds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.config import RunConfig, load_run_config, naming_lines
from telechat_twins.core.files.atomic import writable_file
from telechat_twins.core.launch.run_lock import hold_folder
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parity.report import ParityReport, summary, write_report
from telechat_twins.core.parity.runs import LAYOUT_ROWS, compare_batch, compare_layouts, compare_training, read_layouts
from telechat_twins.core.train.metrics import Row


def run(args: argparse.Namespace) -> int:
    """Compare the backends, write the report, print its verdict and bounds; 1 when a bound is broken."""
    from telechat_twins.convert.initial import open_initial

    config = load_run_config(args.config, args.set, lambda init: open_initial(init).config)
    if config.train.init is not None:
        print(f"note: train.init {config.train.init} is not read: the weights are drawn (--weights {args.weights})")
    layouts = read_layouts(args.layouts, config)
    writable_file(Path(args.out) / "report.md", "--out")
    names = list(dict.fromkeys(args.backends))
    with hold_folder(args.out, f"--out {args.out}"), naming_lines(args.config, args.set):
        print("one batch: logits, loss and every gradient against float64", file=sys.stderr, flush=True)
        report, runs = make_report(config, Path(args.out), args.steps, names, args.weights, layouts, args.layout_steps)
        path = write_report(report, Path(args.out), runs, args.junit)
    print(summary(report))
    print(f"report: {path}")
    return 1 if report.broken else 0


def make_report(
    config: RunConfig,
    out: Path,
    steps: int,
    names: list[str],
    weights: str = "strong",
    layouts: list[Layout] | None = None,
    updates: int = 2,
) -> tuple[ParityReport, dict[str, list[Row]]]:
    """Compare the backends. Returns the report, and the rows of each trace by its label; nothing is written.

    ``layouts``: each is compared with one device over ``updates`` optimizer updates.
    """
    batch_report = compare_batch(config, names, weights)
    layout_reports = compare_layouts(config, out, names, layouts or [], weights, updates) if layouts else []
    trace, runs = None, dict[str, list[Row]]()
    if steps and len(names) == 2:
        trace, runs = compare_training(config, out, steps, names)
    model, train, seq_len = config.model, config.train, config.data.seq_len
    facts = {
        "backends": ", ".join(backends.TITLES[name] for name in names),
        "model": f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads, "
        f"{model.num_kv_heads} kv heads, vocabulary {model.vocab_size}",
        "precision": train.precision,
        "one batch": f"{train.micro_batch} x {seq_len} tokens, {weights} weights of seed {train.seed}",
    }
    if runs:
        facts["training"] = f"{steps} steps of {train.global_batch} x {seq_len} tokens, each launched as users do"
    if layouts:
        rows = min(train.global_batch, LAYOUT_ROWS)
        facts["layouts"] = f"{rows} x {seq_len} tokens, {weights} weights, {updates} updates at learning rate "
        facts["layouts"] += f"{config.optim.lr:g}"
    return ParityReport(facts, batch_report, trace, layout_reports), runs
