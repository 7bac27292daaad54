"""The runs of the parity job: one batch, layouts, and a training trace in both backends."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.data.blend import Blend, open_blend
from telechat_twins.core.errors import UserError
from telechat_twins.core.launch.launcher import launch
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.parallel.layout import Layout, check_layout, parse_layout
from telechat_twins.core.parity.bounds import (
    FULL,
    BatchReport,
    TraceReport,
    compare_low_precision_traces,
    compare_traces,
    judge_batch,
    nudged_weights,
)
from telechat_twins.core.parity.layouts import EXACT, LayoutReport, References, judge_layout, one_device, smooth_optim
from telechat_twins.core.parity.worker import Task, collect, launch_tasks, read_batch, write_batch
from telechat_twins.core.train.metrics import Row, read_metrics

LAYOUT_ROWS = 8  # samples that the layouts are compared on: enough for every rank of 8 to have one


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
                raise _ended(f"{world} ranks with {backends.TITLES[name]}", code)
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
    tree["train"] |= {"steps": steps, "epochs": None, "stages": None}
    warmup = min(config.optim.warmup(config.train.schedule_steps or config.train.steps or steps), steps - 1)
    tree["optim"] |= {"warmup_steps": warmup, "warmup_ratio": None}
    if config.optim.decay_steps is not None:
        tree["optim"]["decay_steps"] = min(config.optim.decay_steps, steps - warmup)
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
        raise _ended(f"training with {backends.TITLES[backend]}", code)
    return read_metrics(folder)


def _ended(what: str, code: int) -> SystemExit:
    """What ends the command as its launch ended. Of a mistake in the input (2) the launch has said all, in one line."""
    if code != 2:
        print(f"tele parity: {what} ended with code {code}", file=sys.stderr)
    return SystemExit(code)
