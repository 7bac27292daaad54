"""``tele parity``: run both backends on one config, on one device and in layouts, and say whether they are equal."""

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
from core.data.blend import Blend, open_blend
from core.errors import UserError
from core.init import init_weights
from core.launch import launch
from core.layout import Layout, check_layout, parse_layout
from core.layout_parity import EXACT, LayoutReport, References, judge_layout, one_device, smooth_optim
from core.layout_worker import Task, collect, launch_tasks, read_batch, write_batch
from core.metrics import Row, read_metrics
from core.parity import (
    FULL,
    BatchReport,
    TraceReport,
    compare_low_precision_traces,
    compare_traces,
    judge_batch,
    nudged_weights,
)
from core.parity_report import ParityReport, write_report
from core.run_lock import hold_folder

LAYOUT_ROWS = 8  # samples that the layouts are compared on: enough for every rank of 8 to have one

EPILOG = """\
examples:
  tele parity --config F --steps 50
      both backends against each other: one batch, then 50 training steps
  tele parity --config F --steps 0 --layouts tp2,ring2,pp2,tp2.pp2
      also each of these layouts, in each backend, against one device (layouts: see `tele train --help`)
  tele parity --config F --growth configs/growth/flm-replica.yaml --steps 20 --layouts tp2
      before, at and after every growth of a schedule: the function kept, the backends equal
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele parity``."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--config", required=True, metavar="F", help="a training run's YAML; its model, data and recipe are used"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. train.precision=bf16"
    )
    parser.add_argument("--growth", metavar="G", help="a growth schedule: compare around every growth of it")
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
    parser.add_argument(
        "--layouts", nargs="+", default=[], metavar="L,...", help="compare these with one device, e.g. tp2,pp2,tp2.pp2"
    )
    parser.add_argument(
        "--layout-steps", type=int, default=2, metavar="N", help="optimizer updates in each layout, 0 to 100 (2)"
    )


def run(args: argparse.Namespace) -> int:
    """Compare, write the report, print its verdict and bounds; 1 when a bound is broken."""
    if args.steps < 0:
        raise UserError(f"--steps: must be at least 0, found {args.steps}")
    if not 0 <= args.layout_steps <= 100:
        raise UserError(f"--layout-steps: must be from 0 to 100, found {args.layout_steps}")
    if args.growth is not None:
        from core.commands import parity_growth

        return parity_growth.run(args)
    config = load_run_config(args.config, args.set)
    layouts = read_layouts(args.layouts, config)
    writable_file(Path(args.out) / "report.md", "--out")
    names = list(dict.fromkeys(args.backends))
    with hold_folder(args.out, f"--out {args.out}"):
        report, runs = make_report(config, Path(args.out), args.steps, names, args.weights, layouts, args.layout_steps)
        path = write_report(report, Path(args.out), runs)
    print(summary(report))
    print(f"report: {path}")
    return 1 if report.broken else 0


def read_layouts(words: list[str], config: RunConfig) -> list[Layout]:
    """The layouts named in ``words``, each of them with commas; UserError for one that this model cannot have."""
    texts = [text.strip() for word in words for text in word.split(",") if text.strip()]
    if words and not texts:
        raise UserError("--layouts: names none; give e.g. --layouts tp2,pp2")
    layouts = {layout.name: layout for layout in map(parse_layout, texts)}
    for layout in layouts.values():
        try:
            check_layout(layout, config.model, seq_len=config.data.seq_len)
        except UserError as error:
            raise UserError(f"--layouts {layout.name}: {error}") from None
    return list(layouts.values())


def summary(report: ParityReport) -> str:
    """Verdict, one line a bound and one line a layout, for the terminal."""
    bounds = [*report.own_bounds(), *report.layout_bounds(worst_only=True)]
    width = max(len(bound.what) for bound in bounds)
    lines = [report.verdict]
    for bound in bounds:
        mark = "ok    " if bound.holds else "BROKEN"
        lines.append(f"  {mark}  {bound.what:<{width}}  {bound.value:9.2e}  limit {bound.limit:.2e}")
    return "\n".join(lines)


def make_report(
    config: RunConfig,
    out: Path,
    steps: int,
    names: list[str],
    weights: str = "strong",
    layouts: list[Layout] | None = None,
    updates: int = 2,
) -> tuple[ParityReport, dict[str, list[Row]]]:
    """The comparison without writing it: the report, and the rows of each trace by its label.

    ``layouts``: each is compared with one device, over ``updates`` optimizer updates.
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


def compare_batch(config: RunConfig, names: list[str], scheme: str = "strong") -> BatchReport:
    """Forward and backward of the run's first micro-batch in each backend and in float64, from identical weights."""
    batch = _blend(config).batch(0, config.train.micro_batch)
    if not batch.num_targets:
        raise UserError("data: no position of the first micro-batch counts in the loss; use a larger train.micro_batch")
    held = init_weights(config.model, config.train.seed, scheme)
    runs = {
        name: backends.load(name, "forward").run(config.model, held.__getitem__, batch, config.train.precision, True)
        for name in names
    }
    judge = backends.load(EXACT, "forward")
    exact = judge.run(config.model, held.__getitem__, batch, "fp64", True)
    nudged = nudged_weights(held, config.train.precision)
    moved = judge.run(config.model, nudged.__getitem__, batch, "fp64", True)
    return judge_batch(runs, exact, config.train.precision, config.model.num_layers, moved)


def compare_layouts(
    config: RunConfig, out: Path, names: list[str], layouts: list[Layout], scheme: str, updates: int
) -> list[LayoutReport]:
    """Every layout in every backend against one device of it, on the first rows of the run's first global batch.

    All layouts of as many processes share a launch. AdamW has the run's settings but a large eps, see smooth_optim.
    Logs of the ranks stay under ``out``. SystemExit with the launcher's code when a launch fails.
    """
    rows = min(config.train.global_batch, LAYOUT_ROWS)
    folder = out / "layouts"
    shutil.rmtree(folder, ignore_errors=True)  # a former comparison's, by its name
    base = Task(
        name="one device",
        model=config.model,
        layout=Layout(),
        batch=write_batch(folder / "batch.safetensors", _blend(config).batch(0, rows)),
        weights=scheme,
        seed=config.train.seed,
        precision=config.train.precision,
        recompute=config.train.recompute,
        optim=config.optim,
    )
    optim = smooth_optim(config.optim, one_device(EXACT, base, "fp64"))
    base = dataclasses.replace(base, steps=updates, optim=optim)
    exact = one_device(EXACT, base, "fp64")
    initial = init_weights(config.model, config.train.seed, scheme)
    nudged = None
    if base.precision in FULL:
        weights = nudged_weights(initial, base.precision)
        judge = backends.load(EXACT, "forward")
        nudged = judge.run(config.model, weights.__getitem__, read_batch(base.batch), "fp64", True)["grads"]
    found: dict[tuple[str, str], LayoutReport] = {}
    for name in names:
        references = References(one_device(name, base), exact, initial, nudged)
        for world in sorted({layout.world for layout in layouts}):
            tasks = [_layout_task(base, layout, rows) for layout in layouts if layout.world == world]
            print(f"{len(tasks)} layouts of {world} ranks with {backends.TITLES[name]}", flush=True)
            where = folder / f"{name}-{world}"
            if code := launch_tasks(name, tasks, where):
                print(f"tele parity: {world} ranks with {backends.TITLES[name]} ended with {code}", file=sys.stderr)
                raise SystemExit(code)
            for number, task in enumerate(tasks):
                outcome = collect(where / str(number), world)
                found[name, task.name] = judge_layout(name, task, outcome, references)
                shutil.rmtree(where / str(number))
    return [found[name, layout.name] for layout in layouts for name in names]


def _layout_task(base: Task, layout: Layout, rows: int) -> Task:
    """``base`` in a layout, in micro-batches small enough for twice as many as the pipeline has ranks."""
    wanted = rows // (layout.dp * 2 * layout.pp)
    sizes = [size for size in range(1, wanted + 1) if rows % (layout.dp * size) == 0]
    fitting = [n for n in sizes if layout.virtual == 1 or rows // (layout.dp * n) % layout.pp == 0]
    return dataclasses.replace(base, name=layout.name, layout=layout, micro_batch=max(fitting, default=1))


def _blend(config: RunConfig) -> Blend:
    return open_blend(config.data, config.train.seed, config.model.num_tokens, config.model.filler_id)


def compare_training(
    config: RunConfig, out: Path, steps: int, names: list[str]
) -> tuple[TraceReport, dict[str, list[Row]]]:
    """Train ``steps`` steps in each backend, each in its own processes under its own launcher, and compare the metrics.

    A run of higher precision (float64; fp32 for the 16-bit precisions), on one device, joins as the judge; fp64 is one.
    """
    runs = {backends.TITLES[name]: trace_rows(config, out, name, steps) for name in names}
    a, b = runs.values()
    precision = config.train.precision
    if precision == "fp64":  # nothing judges it: PyTorch's run is the judge
        return compare_traces(a, b, precision=precision), runs
    full = precision == "fp32"
    judge = "fp64" if full else "fp32"
    exact_config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, precision=judge), parallel=Layout()
    )
    exact = trace_rows(exact_config, out, EXACT, steps, judge)
    report = compare_traces(a, b, exact) if full else compare_low_precision_traces(a, b, exact)
    return report, runs | {f"{judge} ({backends.TITLES[EXACT]})": exact}


def trace_rows(
    config: RunConfig, out: Path, backend: str, steps: int, label: str = "", resume: Path | None = None
) -> list[Row]:
    """Launch a run to step ``steps`` under ``out``, from the checkpoint ``resume`` if given; its rows of metrics."""
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
    options = ["--config", str(file), "--out", str(folder), *(["--resume", str(resume)] if resume else [])]
    code = launch(backend, options, config.parallel.world, folder / "logs")
    if code:
        print(f"tele parity: training with {backends.TITLES[backend]} ended with code {code}", file=sys.stderr)
        raise SystemExit(code)
    return read_metrics(folder)
