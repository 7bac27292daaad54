"""``tele parity``: run both backends on one config and say whether they are equal."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

from core import backends
from core.atomic import writable_file
from core.config import RunConfig, load_run_config, run_config_from_dict
from core.data.blend import open_blend
from core.errors import UserError
from core.init import init_weights
from core.launch import launch
from core.metrics import Row, read_metrics
from core.parity import BatchReport, TraceReport, compare_low_precision_traces, compare_traces, judge_batch
from core.parity_report import ParityReport, write_report

EXACT = "pt"  # the backend of the float64 judge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele parity``."""
    parser.add_argument(
        "--config", required=True, metavar="F", help="a training run's YAML; its model, data and recipe are used"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. train.precision=bf16"
    )
    parser.add_argument(
        "--steps", type=int, default=50, metavar="N", help="training steps to compare; 0: one batch only (50)"
    )
    parser.add_argument(
        "--out", default="parity", metavar="DIR", help="where report.md, report.json, traces.png go (parity)"
    )
    parser.add_argument(
        "--backends", nargs="+", choices=sorted(backends.BACKENDS), default=["ms", "pt"], help="who to judge (ms pt)"
    )
    parser.add_argument(
        "--weights",
        choices=("strong", "normal"),
        default="strong",
        help="weights of the one-batch comparison: strong (large, random biases and gains) or as initialised",
    )


def run(args: argparse.Namespace) -> int:
    """Compare, write the report, print its verdict and bounds; 1 when a bound is broken."""
    if args.steps < 0:
        raise UserError(f"--steps: must be at least 0, found {args.steps}")
    config = load_run_config(args.config, args.set)
    writable_file(Path(args.out) / "report.md", "--out")
    report, runs = make_report(config, Path(args.out), args.steps, list(dict.fromkeys(args.backends)), args.weights)
    path = write_report(report, Path(args.out), runs)
    print(summary(report))
    print(f"report: {path}")
    return 1 if report.broken else 0


def summary(report: ParityReport) -> str:
    """Verdict and one line a bound, for the terminal."""
    bounds = report.bounds()
    width = max(len(bound.what) for bound in bounds)
    lines = [report.verdict]
    for bound in bounds:
        mark = "ok    " if bound.holds else "BROKEN"
        lines.append(f"  {mark}  {bound.what:<{width}}  {bound.value:9.2e}  limit {bound.limit:.2e}")
    return "\n".join(lines)


def make_report(
    config: RunConfig, out: Path, steps: int, names: list[str], weights: str = "strong"
) -> tuple[ParityReport, dict[str, list[Row]]]:
    """The comparison without writing it: the report, and the rows of each trace by its label."""
    batch_report = compare_batch(config, names, weights)
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
    return ParityReport(facts, batch_report, trace), runs


def compare_batch(config: RunConfig, names: list[str], scheme: str = "strong") -> BatchReport:
    """Forward and backward of the run's first micro-batch in each backend and in float64, from identical weights."""
    blend = open_blend(config.data, config.train.seed, config.model.vocab_size, config.model.pad_token_id)
    batch = blend.batch(0, config.train.micro_batch)
    if not batch.num_targets:
        raise UserError("data: no position of the first micro-batch counts in the loss; use a larger train.micro_batch")
    held = init_weights(config.model, config.train.seed, scheme)
    runs = {
        name: backends.load(name, "forward").run(config.model, held.__getitem__, batch, config.train.precision, True)
        for name in names
    }
    exact = backends.load(EXACT, "forward").run(config.model, held.__getitem__, batch, "fp64", True)
    return judge_batch(runs, exact, config.train.precision, config.model.num_layers)


def compare_training(
    config: RunConfig, out: Path, steps: int, names: list[str]
) -> tuple[TraceReport, dict[str, list[Row]]]:
    """Train ``steps`` steps in each backend, each in its own process under its own launcher, and compare the metrics.

    A run of higher precision (float64; fp32 for the 16-bit precisions) joins as the judge.
    """
    runs = {backends.TITLES[name]: trace_rows(config, out, name, steps) for name in names}
    a, b = runs.values()
    full = config.train.precision in ("fp32", "fp64")
    judge = "fp64" if full else "fp32"
    exact_config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=judge))
    exact = trace_rows(exact_config, out, EXACT, steps, judge)
    report = compare_traces(a, b, exact) if full else compare_low_precision_traces(a, b, exact)
    return report, runs | {f"{judge} ({backends.TITLES[EXACT]})": exact}


def trace_rows(config: RunConfig, out: Path, backend: str, steps: int, label: str = "") -> list[Row]:
    """Launch a training run of ``steps`` steps under ``out`` and return its metrics."""
    folder = out / f"trace-{label or backend}"
    shutil.rmtree(folder, ignore_errors=True)  # a former comparison's, by its name
    folder.mkdir(parents=True)
    tree = config.to_dict()
    tree["train"]["steps"] = steps
    tree["optim"]["warmup_steps"] = min(config.optim.warmup_steps, steps - 1)
    tree["checkpoint"]["every"] = 0
    tree = run_config_from_dict(tree).to_dict()
    for source in tree["data"]["sources"]:
        source["path"] = str(Path(source["path"]).resolve())
    file = folder / "run.yaml"
    file.write_text(json.dumps(tree, indent=1), encoding="utf-8")  # JSON is YAML
    print(f"training {steps} steps with {backends.TITLES[backend]}, {tree['train']['precision']}", flush=True)
    code = launch(backend, ["--config", str(file), "--out", str(folder)], 1, folder / "logs")
    if code:
        print(f"tele parity: training with {backends.TITLES[backend]} ended with code {code}", file=sys.stderr)
        raise SystemExit(code)
    return read_metrics(folder)
