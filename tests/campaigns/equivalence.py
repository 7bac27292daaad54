"""Random equivalence: both backends, and their layouts, against an independent float64 decoder.

    python -m tests.campaigns.equivalence --trials 100 [--seed S] [--out report.json]

Each case is a random release (tests/campaigns/equivalence_cases.py) that the product reads as ``tele forward --grads``
does; logits, loss and the gradient of every released tensor, in the release's packing, must be those of
tests/campaigns/float64_run.py. Every third case also runs by several processes. Exit 1 when a bound is broken, or when
a planted fault changes a case and no bound sees it.

Limits. A relative error (Frobenius norm) must stay below

    max(n u, 12 d)

u is the unit roundoff of the precision; n is 16 for logits, loss, gradient norm and all gradients as one vector, 32 for
each gradient: factor times floor of docs/parity.md's fp32 row. d is the conditioning of the case: how far the float64
run moves when its weights, rotary angles, scores and streams are rounded to u (root mean square of three draws), and 12
is what docs/parity.md grants for roundings that are not among them. A gradient below 1e-9 of all gradients is rounding
in itself and is compared as a part of all.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from telechat_twins.convert.parity_rank import SCRIPT
from telechat_twins.convert.source import open_model
from telechat_twins.core import backends
from telechat_twins.core.commands.forward import make_batch
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.parallel.layout import Layout, check_layout, parse_layout
from telechat_twins.core.parity.worker import Task, collect, launch_tasks, write_batch
from tests.campaigns.equivalence_cases import Case, make_case
from tests.campaigns.float64_decoder import FAULTS, Shape, Weights, read_release, shows
from tests.campaigns.float64_run import run

ROUNDOFF = {"fp32": 2.0**-24, "fp64": 2.0**-53}
FLOORS = {"logits": 16, "loss": 16, "gradient norm": 16, "all gradients": 16}
FLOOR_OF_EACH = 32
GRANTED = 12.0
DRAWS = 3
FAULT_SIZE = 4.0  # limits by which a planted fault must change a case to be asked for
LAYOUTS = {
    2: ("tp2", "pp2", "ring2", "ulysses2", "dp2", "tp2.nosp", "pp2.gpipe"),
    4: ("tp4", "tp2.ring2", "ring2.ulysses2", "tp2.pp2", "dp2.tp2", "ulysses4", "ring4"),
}

Result = dict[str, Any]  # logits, loss, grads


@dataclass
class Trial:
    """One case, what the judge computed (``moved``: the conditioning d / u of each quantity), and what was found: of
    each run the worst share of a limit, where, and the largest relative error of a gradient; of faults times the limit.
    """

    case: Case
    shape: Shape
    weights: Weights
    exact: Result
    moved: dict[str, float]
    shares: dict[str, float] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    faults: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def errors(result: Result, exact: Result) -> dict[str, float]:
    """Relative errors by quantity; gradients by name, those that are rounding in themselves left to "all gradients"."""
    found = {"logits": _far(result["logits"], exact["logits"]), "loss": _far(result["loss"], exact["loss"])}
    if "grads" not in result:
        return found
    ours, truth = result["grads"], exact["grads"]
    size = math.sqrt(sum(float((g**2).sum()) for g in truth.values()))
    difference = math.sqrt(sum(float(((_wide(ours[n]) - g) ** 2).sum()) for n, g in truth.items()))
    norm = math.sqrt(sum(float((_wide(ours[n]) ** 2).sum()) for n in truth))
    found |= {"all gradients": difference / size, "gradient norm": abs(norm - size) / size}
    for name, gradient in truth.items():
        if np.linalg.norm(gradient) > 1e-9 * size:
            found[name] = _far(ours[name], gradient)
    return found


def _wide(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)


def _far(actual: Any, expected: Any) -> float:
    expected = _wide(expected)
    return float(np.linalg.norm(_wide(actual) - expected) / np.linalg.norm(expected))


def judge(seed: int, number: int, folder: Path) -> Trial:
    """Make a case and compute it, and its conditioning, in float64."""
    case = make_case(seed, number, folder)
    shape, weights = read_release(case.folder)
    exact = run(shape, weights, case.inputs)
    unit = ROUNDOFF["fp32"]
    draws = [errors(run(shape, weights, case.inputs, nudge=(draw, unit)), exact) for draw in range(DRAWS)]
    moved = {name: math.sqrt(sum(d[name] ** 2 for d in draws) / DRAWS) / unit for name in draws[0]}
    return Trial(case, shape, weights, exact, moved)


def limit(trial: Trial, name: str, precision: str) -> float:
    """The bound of one quantity of one case."""
    return ROUNDOFF[precision] * max(FLOORS.get(name, FLOOR_OF_EACH), GRANTED * trial.moved[name])


def compare(trial: Trial, label: str, result: Result, precision: str) -> None:
    """Keep the worst share of a limit under ``label``; a problem for each bound that is broken."""
    expected, held = trial.exact["grads"], result["grads"]
    shapes = {name: gradient.shape for name, gradient in expected.items()}
    if {name: np.shape(gradient) for name, gradient in held.items()} != shapes:
        trial.problems.append(f"{label}: gradients have other names or shapes: {sorted(set(held) ^ set(shapes))[:4]}")
        return
    found = errors(result, trial.exact)
    share = {name: error / limit(trial, name, precision) for name, error in found.items()}
    worst = max(share, key=lambda name: math.inf if math.isnan(share[name]) else share[name])
    trial.shares[label], trial.places[label] = share[worst], worst
    trial.gradients[label] = max(error for name, error in found.items() if name not in FLOORS)
    for name, value in share.items():
        if not value <= 1.0:
            trial.problems.append(f"{label}: {name} is off by {found[name]:.2e}, limit {found[name] / value:.2e}")


def plant_all(trial: Trial, result: Result) -> None:
    """The product's result against judges with one mistake each: how many times its limit the worst bound is off."""
    inputs = trial.case.inputs
    for fault in FAULTS:
        if not shows(fault, trial.shape, inputs.ids, inputs.targets(), inputs.docs):
            continue
        wrong = run(trial.shape, trial.weights, inputs, fault=fault, grads=False)
        if _times(trial, trial.exact, wrong) < FAULT_SIZE:
            continue  # by chance this case hardly feels it
        trial.faults[fault] = _times(trial, result, wrong)
        if trial.faults[fault] <= 1.0:
            trial.problems.append(f"planted fault not seen: {fault} ({trial.faults[fault]:.2f} of the limit)")


def _times(trial: Trial, result: Result, wrong: Result) -> float:
    """How many times its limit the worse of logits and loss is away from a judge's with a mistake."""
    found = errors({name: result[name] for name in ("logits", "loss")}, wrong)
    return max(error / limit(trial, name, "fp32") for name, error in found.items())


def read_case(case: Case) -> tuple[Any, Batch]:
    """The product's view of a case: its source, and the batch as ``tele forward`` (or packed data) makes it."""
    source, inputs = open_model(case.folder), case.inputs
    if inputs.docs is None:
        arrays = {"input_ids": inputs.ids, "labels": inputs.labels}
        if inputs.counted is not None:
            arrays["loss_mask"] = inputs.counted.astype(np.int32)
        return source, make_batch(arrays, source.config, case.text)
    ids, targets, positions, docs = (
        np.ascontiguousarray(array, np.int32)
        for array in (inputs.ids, inputs.targets(), inputs.positions(), inputs.docs)
    )
    return source, Batch(ids, targets, positions, docs)


def run_single(trial: Trial, backend: str, precision: str) -> Result | None:
    """One backend in this process, compared; None when it failed, which is a problem of the case."""
    label = f"{backend} {precision}"
    try:
        source, batch = read_case(trial.case)
        result = backends.load(backend, "forward").run(source.config, source.tensor, batch, precision, True)
        result = result | {"grads": source.export(result["grads"])}
    except Exception as error:
        trial.problems.append(f"{label}: {type(error).__name__}: {error}")
        return None
    compare(trial, label, result, precision)
    return result


def choose_layout(trial: Trial, world: int, random: np.random.Generator) -> Layout | None:
    """A layout of so many processes that this model can have, one with tp if any, as few sizes allow it; or None."""
    config, S = open_model(trial.case.folder).config, trial.case.inputs.ids.shape[1]
    for text in sorted(map(str, random.permutation(LAYOUTS[world])), key=lambda text: "tp" not in text):
        layout = parse_layout(text)
        try:
            check_layout(layout, config, seq_len=S)
        except UserError:
            continue
        return layout
    return None


def run_layouts(trials: Sequence[Trial], backend: str, world: int, seed: int, top: Path) -> list[str]:
    """Each trial in a layout of ``world`` processes, all in one launch; the layouts that ran."""
    random = np.random.default_rng([seed, world])
    chosen = [(trial, choose_layout(trial, world, random)) for trial in trials]
    wanted = [(trial, layout) for trial, layout in chosen if layout is not None]
    if not wanted:
        return []
    folder = top / f"{backend}-{world}"
    tasks = []
    for trial, layout in wanted:
        source, batch = read_case(trial.case)
        file = write_batch(folder / f"batch-{trial.case.number}.safetensors", batch)
        weights = str(trial.case.folder.resolve())
        tasks.append(
            Task(name=layout.name, model=source.config, layout=layout, batch=file, weights=weights, logits=True)
        )
    if code := launch_tasks(backend, tasks, folder, script=SCRIPT):
        wanted[0][0].problems.append(f"{backend}: a launch of {world} processes ended with {code}")
        return []
    for number, (trial, layout) in enumerate(wanted):
        outcome = collect(folder / str(number), world)
        label = f"{backend} {layout.name}"
        if outcome.problems:
            trial.problems.append(f"{label}: {'; '.join(outcome.problems)}")
            continue
        grads = open_model(trial.case.folder).export(outcome.gradients)
        compare(trial, label, {"logits": outcome.logits, "loss": outcome.losses[0], "grads": grads}, "fp32")
    return [layout.name for _, layout in wanted]


def campaign(args: argparse.Namespace, top: Path) -> list[Trial]:
    """All trials, single first, then those in layouts."""
    trials: list[Trial] = []
    started = time.perf_counter()
    for number in range(args.trials):
        trial = judge(args.seed, number, top / f"case-{number}")
        results = [run_single(trial, backend, "fp32") for backend in args.backends]
        for backend in args.fp64:
            run_single(trial, backend, "fp64")
        if results[0] is not None:
            plant_all(trial, results[0])
        trials.append(trial)
        mark = "; ".join(trial.problems) or f"{max(trial.shares.values(), default=0.0):.2f} of its limit"
        print(
            f"{number + 1}/{args.trials} {time.perf_counter() - started:5.0f} s  {trial.case.text}: {mark}", flush=True
        )
    if args.layouts:
        groups = {2: trials[:: args.layouts], 4: trials[1 :: 2 * args.layouts]}
        for backend in args.backends:
            for world, some in groups.items():
                names = run_layouts(some, backend, world, args.seed, top / "layouts")
                print(f"{backend}: {len(names)} cases by {world} processes: {' '.join(sorted(set(names)))}", flush=True)
    return trials


def summary(trials: Sequence[Trial]) -> str:
    """A table of the worst share of a limit by kind of run and family, of planted faults, and every problem."""
    head = f"{'run':<18}{'cases':>6}{'median':>9}{'worst':>8}  of the limit; the worst at; largest error of a gradient"
    lines = [head]
    for label in sorted({label for trial in trials for label in trial.shares}):
        held = [trial for trial in trials if label in trial.shares]
        worst = max(held, key=lambda trial: trial.shares[label])
        middle = float(np.median([trial.shares[label] for trial in held]))
        lines.append(
            f"{label:<18}{len(held):>6}{middle:>9.3f}{worst.shares[label]:>8.3f}  case {worst.case.number}, "
            f"{worst.places[label]}; {max(trial.gradients.get(label, 0.0) for trial in held):.1e}"
        )
    lines.append(f"{'planted fault':<28}{'cases':>6}{'seen':>6}{'least':>10}  times the limit")
    for fault in FAULTS:
        sizes = [trial.faults[fault] for trial in trials if fault in trial.faults]
        least = f"{min(sizes):.1f}" if sizes else "-"
        lines.append(f"{fault:<28}{len(sizes):>6}{sum(size > 1.0 for size in sizes):>6}{least:>10}")
    for trial in trials:
        lines += [f"BROKEN  case {trial.case.number} ({trial.case.text}): {problem}" for problem in trial.problems]
    broken = sum(bool(trial.problems) for trial in trials)
    lines.append(f"{len(trials)} cases, {broken} with a broken bound")
    return "\n".join(lines)


def record(trials: Sequence[Trial], args: argparse.Namespace) -> dict[str, Any]:
    """The report as JSON values."""
    rows = [
        {
            "case": trial.case.number,
            "text": trial.case.text,
            "shares": trial.shares,
            "places": trial.places,
            "worst_gradient": trial.gradients,
            "conditioning": {name: trial.moved[name] for name in FLOORS},
            "faults": trial.faults,
            "problems": trial.problems,
        }
        for trial in trials
    ]
    return {"seed": args.seed, "trials": args.trials, "cases": rows}


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m tests.campaigns.equivalence", description=__doc__.splitlines()[0])
    made.add_argument("--trials", type=int, default=100, help="cases (100)")
    made.add_argument("--seed", type=int, default=0, help="of the cases (0)")
    made.add_argument("--out", metavar="F", help="write report.json here")
    made.add_argument("--backends", nargs="+", default=["ms", "pt"], choices=sorted(backends.BACKENDS))
    made.add_argument(
        "--fp64",
        nargs="*",
        default=["ms", "pt"],
        choices=sorted(backends.BACKENDS),
        help="backends to judge in fp64, too",
    )
    made.add_argument(
        "--layouts",
        type=int,
        default=3,
        metavar="N",
        help="every N-th case by 2 processes too, every 2N-th by 4; 0: none",
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign, print and write its report; 1 when a promise is broken."""
    args = parser().parse_args(argv)
    top = Path(tempfile.mkdtemp(prefix="tele-equivalence-"))
    try:
        trials = campaign(args, top)
    finally:
        shutil.rmtree(top, ignore_errors=True)
    print(summary(trials))
    if args.out:
        Path(args.out).write_text(json.dumps(record(trials, args), indent=1), encoding="utf-8")
    return 1 if any(trial.problems for trial in trials) else 0


if __name__ == "__main__":
    sys.exit(main())
