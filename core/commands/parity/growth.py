"""``tele parity --growth``: compares both backends before, at and after every growth of a schedule, also in layouts.

For each growth, on weights with which every error shows, these models are compared: the small one; the grown one at
c = 0 with float64 and with the small one (logits, loss and old gradients must be equal, gradients of new entries zero);
the grown one between the sizes (c between 0 and 1), also in the given layouts; and at c = 1, where it must equal the
model without masks. Then the first backend trains the small model for a few steps, and every backend trains what it
grows to.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.config import RunConfig
from telechat_twins.core.data.blend import open_blend
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import writable_file
from telechat_twins.core.launch.run_lock import hold_folder
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parity.bounds import (
    BatchResult,
    Bound,
    compare_traces,
    global_norm,
    judge_batch,
    nudged_weights,
    relative_frobenius,
    tolerances,
)
from telechat_twins.core.parity.document.model import Document, Section
from telechat_twins.core.parity.document.versions import own_versions
from telechat_twins.core.parity.document.write import write_document
from telechat_twins.core.parity.layouts import EXACT
from telechat_twins.core.parity.runs import compare_layouts, read_layouts, trace_rows

if TYPE_CHECKING:
    from telechat_twins.convert.growth.plan import GrowthPlan
    from telechat_twins.convert.growth.schedule import Stage

BETWEEN = 0.4
EXACTLY = 1e-12
SMALL_STEPS = 10

Weights = Mapping[str, np.ndarray]


def run(args: argparse.Namespace) -> int:
    """Run all comparisons, write the report, print every bound; 1 when one is broken."""
    from telechat_twins.convert.growth.schedule import load_schedule

    stages = load_schedule(args.growth, args.config, args.set)
    if len(stages) < 2:
        raise UserError(f"--growth {args.growth}: must have at least two stages, found one; add a stage that grows")
    out = Path(args.out)
    writable_file(out / "report.md", "--out")
    with hold_folder(out, f"--out {out}"):
        return _compare(args, stages, out)


def _compare(args: argparse.Namespace, stages: Sequence[Stage], out: Path) -> int:
    names = list(dict.fromkeys(args.backends))
    sections: list[Section] = []
    for before, stage in zip(stages, stages[1:], strict=False):
        layouts = read_layouts(args.layouts, stage.config)
        sections += growth_sections(before, stage, names)
        if layouts:
            sections += layout_sections(stage, names, layouts, args.layout_steps, out)
        if args.steps:
            sections.append(training_section(before, stage, names, args.steps, out))
    facts = {"schedule": args.growth, "backends": ", ".join(backends.TITLES[name] for name in names)}
    document = Document("growth", "Parity under growth", facts, own_versions(), sections)
    page = write_document(document, out, args.junit)
    print(document.verdict)
    for section in sections:
        print(f"{section.title}")
        for bound in section.bounds:
            mark = "ok    " if bound.holds else "BROKEN"
            print(f"  {mark}  {bound.what:<58}{bound.value:9.2e}  limit {bound.limit:.2e}")
    print(f"report: {page}")
    return 1 if document.broken else 0


def growth_sections(before: Stage, stage: Stage, names: list[str]) -> list[Section]:
    """Comparison of the function and its gradients on one micro-batch."""
    from telechat_twins.convert.growth.plan import plan_growth
    from telechat_twins.convert.growth.weights import grow_arrays

    assert stage.plan is not None
    seed = before.config.train.seed
    plan = plan_growth(
        before.config.model, stage.target, dataclasses.replace(stage.plan.options, scheme="strong"), 0, 0
    )
    small = init_weights(plan.source, seed, "strong")
    grown = grow_arrays(plan, small)
    batch = _batch(before.config)
    title = f"{before.name} to {stage.name}"
    precision = before.config.train.precision

    def results(config: ModelConfig, weights: Weights) -> tuple[dict[str, BatchResult], BatchResult, list[Bound]]:
        found = {name: _forward(name, config, weights, batch, precision) for name in names}
        exact = _forward(EXACT, config, weights, batch, "fp64")
        moved = _forward(EXACT, config, nudged_weights(weights, precision), batch, "fp64")
        return found, exact, judge_batch(found, exact, precision, config.num_layers, moved).bounds()

    first, first_exact, judged = results(plan.source, small)
    sections = [Section(f"{title}: before", judged)]
    start, start_exact, judged = results(plan.config, grown)
    masked = plan.config.growth is not None
    kept = _kept("float64", plan, first_exact, start_exact, "fp64", masked)
    for name in names:
        kept += _kept(backends.TITLES[name], plan, first[name], start[name], precision, masked, first_exact)
    sections.append(Section(f"{title}: {'at c = 0' if masked else 'grown without masks'}", judged + kept))
    for c in (BETWEEN, 1.0) if masked else ():
        config = with_mask(plan.config, c)
        _, exact, bounds = results(config, grown)
        if c == 1.0:
            plain = _forward(EXACT, with_mask(plan.config, None), grown, batch, "fp64")
            apart = relative_frobenius(exact["logits"], plain["logits"])
            bounds.append(Bound("logits, float64: masks at 1 against none", apart, EXACTLY, "masks of ones are none"))
        sections.append(Section(f"{title}: at c = {c:g}", bounds))
    return sections


def with_mask(config: ModelConfig, c: float | None) -> ModelConfig:
    """A growing model with its masks at ``c``; None: without them."""
    growth = None if c is None or config.growth is None else dataclasses.replace(config.growth, mask=c)
    return dataclasses.replace(config, growth=growth)


def _kept(
    who: str,
    plan: GrowthPlan,
    small: BatchResult,
    grown: BatchResult,
    precision: str,
    masked: bool,
    exact: BatchResult | None = None,
) -> list[Bound]:
    """Bounds on the grown model against the small one in the same arithmetic; ``exact``: the small one in float64."""
    from telechat_twins.convert.growth.gradients import gradients_of_new, gradients_of_old

    old = gradients_of_old(plan, grown["grads"])
    if exact is None:
        limits, source = dict.fromkeys(("logits", "loss", "gradients"), EXACTLY), "float64: the same function"
    else:
        # The grown model sums more terms, in another order, so it may differ from the small one by a few roundings, or
        # as much as the small one itself differs from float64.
        rules = tolerances(precision, plan.source.num_layers)
        own = {
            "logits": relative_frobenius(small["logits"], exact["logits"]),
            "loss": abs(small["loss"] / exact["loss"] - 1),
            "gradients": _apart(small["grads"], exact["grads"]),
        }
        limits = {
            key: min(rule.ceiling, rule.factor * max(rule.floor, own[key])) for key, rule in rules.items() if key in own
        }
        source = f"4 x the small model's own distance from float64, or as between backends ({precision})"
    bounds = [
        Bound(
            f"{who}: logits unchanged",
            relative_frobenius(grown["logits"], small["logits"]),
            limits["logits"],
            source,
        ),
        Bound(f"{who}: loss unchanged", abs(grown["loss"] / small["loss"] - 1), limits["loss"], source),
        Bound(f"{who}: old gradients unchanged", _apart(old, small["grads"]), limits["gradients"], source),
    ]
    if masked:
        largest = max((float(np.abs(g).max()) for g in gradients_of_new(plan, grown["grads"]).values()), default=0.0)
        bounds.append(Bound(f"{who}: largest gradient of a new entry", largest, 0.0, "everything new is times c = 0"))
    return bounds


def _apart(a: Weights, b: Weights) -> float:
    """Relative distance of all gradients as one vector."""
    return global_norm({n: a[n].astype(np.float64) - b[n] for n in b}) / global_norm(b)


def _forward(name: str, config: ModelConfig, weights: Weights, batch: Batch, precision: str) -> BatchResult:
    get: Callable[[str], np.ndarray] = weights.__getitem__
    found: BatchResult = backends.load(name, "forward").run(config, get, batch, precision, True)
    # Padding rows of the vocabulary are not compared.
    found["logits"] = found["logits"][..., : config.num_tokens]
    return found


def _batch(config: RunConfig) -> Batch:
    blend = open_blend(config.data, config.train.seed, config.model.num_tokens, config.model.filler_id)
    batch = blend.batch(0, config.train.micro_batch)
    if not batch.num_targets:
        raise UserError(
            "data: at least one position of the first micro-batch must count in the loss, found none; use a larger "
            "train.micro_batch"
        )
    return batch


def layout_sections(stage: Stage, names: list[str], layouts: list[Layout], updates: int, out: Path) -> list[Section]:
    """Comparison of the model between the sizes, in every layout of every backend, with one device."""
    assert stage.plan is not None
    model = with_mask(stage.plan.config, BETWEEN)
    config = dataclasses.replace(stage.config, model=model)
    reports = compare_layouts(config, out / stage.name, names, layouts, "strong", updates)
    return [
        Section(
            f"{stage.name} between the sizes, {report.layout} with {backends.TITLES[report.backend]}", report.bounds
        )
        for report in reports
    ]


def training_section(before: Stage, stage: Stage, names: list[str], steps: int, out: Path) -> Section:
    """Comparison of training after growth: the small model is trained for a few steps, grown, and trained further by
    each backend and in float64."""
    from telechat_twins.convert.growth.files import grow_checkpoint, plan_checkpoint
    from telechat_twins.core.checkpoint.read import open_checkpoint

    assert stage.plan is not None
    options = dataclasses.replace(
        stage.plan.options, anneal_steps=max(1, min(stage.plan.options.anneal_steps, steps // 2))
    )
    folder = out / f"growth-{stage.name}"
    shutil.rmtree(folder, ignore_errors=True)  # left by an earlier comparison
    small = dataclasses.replace(before.config, checkpoint=dataclasses.replace(before.config.checkpoint, every=0))
    # One step more than the growth starts from: the grown model's first loss must equal that step's.
    longer = trace_rows(small, folder, names[0], SMALL_STEPS + 1, "longer")
    trace_rows(small, folder, names[0], SMALL_STEPS, "small")
    checkpoint = open_checkpoint(folder / "trace-small")
    plan = plan_checkpoint(checkpoint, stage.target, options)
    grow_checkpoint(checkpoint, folder / "grown", plan)
    model = dataclasses.replace(plan.config, growth=None)
    config = dataclasses.replace(stage.config, model=model)
    total = SMALL_STEPS + steps
    rows = {name: trace_rows(config, folder, name, total, resume=folder / "grown") for name in names}
    judge = dataclasses.replace(config.train, precision="fp64")
    exact_config = dataclasses.replace(config, train=judge, parallel=Layout())
    exact = trace_rows(exact_config, folder, EXACT, total, "fp64", resume=folder / "grown")
    first = [abs(run[0]["loss"] / longer[-1]["loss"] - 1) for run in rows.values()]
    bounds = [
        Bound("first loss after growth against the small model's", max(first), 1e-5, "the same function and batch")
    ]
    if len(names) == 2:
        a, b = rows.values()
        bounds += compare_traces(a, b, exact).bounds
    return Section(f"{before.name} to {stage.name}: {steps} steps after growth", bounds)
