"""Comparison of parallel layouts with one device, and the bounds beyond which a difference is a fault.

Every number of a layout (loss, gradient norm, each gradient by name, each weight's change over some updates) is held
against one device of the same backend and against PyTorch in float64: in fp32 under fixed limits, in the 16-bit
precisions by the ratio of the two errors against float64. What the ranks sent, and how many micro-batch graphs they
held, must equal what ``core.parallel.traffic`` and ``core.parallel.schedule`` say beforehand.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.config import OptimConfig
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parallel.schedule import actions, peak_live
from telechat_twins.core.parallel.sequence import split_batch
from telechat_twins.core.parallel.traffic import Traffic, expected_traffic
from telechat_twins.core.parity.bounds import (
    NUDGED,
    UNIT_ROUNDOFF,
    Bound,
    compare_tensors,
    global_norm,
    relative_frobenius,
    tolerances,
)
from telechat_twins.core.parity.worker import Outcome, Task, pad_rows, read_batch, row_multiple, run_alone, run_config
from telechat_twins.core.train.recipe import clip_factor, tells_classes_apart
from telechat_twins.core.train.trainable import first_trained_stage

EXACT = "pt"  # the backend of the float64 run
# What a layout may add in fp32: sums in another order, over ranks and micro-batches. 17 u for the scalars; a gradient
# goes through every layer twice. In fp64 as many u, but no wider type adds up what makes a scalar there, so that the
# scalars have the gradients' limit. Measured values are in docs/parity.md.
SCALAR_LIMIT, GRADIENT_LIMIT = 1e-6, 1e-5
# In 16-bit precisions: a layout's error against float64 over one device's, in all, and of the worst tensor.
RATIO_LIMIT, WORST_RATIO_LIMIT = 1.5, 3.0


@dataclass(frozen=True)
class References:
    """What a layout is held against, all from the weights ``initial``. ``nudged``: gradients of the float64 run with
    core.parity.bounds.nudged_weights, which measures how much the model magnifies rounding; None where it does not
    much."""

    single: Outcome
    exact: Outcome
    initial: dict[str, np.ndarray]
    nudged: Mapping[str, np.ndarray] | None = None


@dataclass(frozen=True)
class TensorError:
    """A gradient, or the change of a weight over the updates: relative Frobenius distance from one device's
    (``apart``) and from float64's (``error``), and the limit of both."""

    name: str
    apart: float
    error: float
    limit: float


@dataclass(frozen=True)
class LayoutReport:
    """The verdict on one layout of one backend.

    ``errors``: of "loss" and "gradient norm", (against one device, against float64). ``gradients`` and ``weights``:
    worst first. ``sent``: bytes handed to collectives in a step by the rank that handed in most. ``live``: most graphs
    alive at once, by pipeline rank. ``seconds``: by rank. ``notes``: what was not judged, and why.
    """

    layout: str
    backend: str
    precision: str
    bounds: list[Bound]
    errors: dict[str, tuple[float, float]]
    gradients: list[TensorError]
    weights: list[TensorError]
    sent: int
    live: list[int]
    seconds: list[float]
    notes: list[str] = field(default_factory=list)

    @property
    def broken(self) -> list[Bound]:
        return [bound for bound in self.bounds if not bound.holds]

    @property
    def worst(self) -> Bound:
        """The bound nearest to its limit, a broken one before all others."""
        return max(self.bounds, key=lambda b: (not b.holds, b.value / b.limit if b.limit else 0.0))


def smooth_optim(optim: OptimConfig, exact: Outcome) -> OptimConfig:
    """``optim`` with an eps as large as the gradient (root mean square, clipped).

    With a tiny eps the first updates are lr * sign(g): where g is only rounding, the sign is chance, and no limit on
    the weights follows from one on the gradients. With this one AdamW is smooth, and both moments still count.
    """
    elements = sum(g.size for g in exact.gradients.values())
    rms = exact.norms[0] / math.sqrt(elements) * clip_factor(exact.norms[0], optim.clip_grad)
    return dataclasses.replace(optim, eps=rms)


def one_device(backend: str, task: Task, precision: str | None = None) -> Outcome:
    """``task`` without a layout, in this process: logits, loss and gradients by the plain model (``forward.run``),
    weights after ``task.steps`` updates by a trainer alone. ``precision``: in place of the task's."""
    batch = read_batch(task.batch)
    held = init_weights(task.model, task.seed, task.weights)
    precision = precision or task.precision
    if batch.weights is not None or batch.reference is not None or task.lora is not None or task.freeze:
        # forward.run knows plain means of token losses only, and parameters that are all trained.
        return _trainer_alone(backend, task, precision)
    forward = backends.load(backend, "forward")
    result = forward.run(task.model, held.__getitem__, batch, precision, True)
    gradients = result["grads"]
    found = Outcome([result["loss"]], [global_norm(gradients)], result["logits"], gradients)
    if not task.steps:
        return found
    alone = _trainer_alone(backend, dataclasses.replace(task, gradients=False, logits=False), precision)
    return dataclasses.replace(
        found,
        losses=[*found.losses, *alone.losses[1:]],
        norms=[*found.norms, *alone.norms[1:]],
        weights=alone.weights,
    )


def _trainer_alone(backend: str, task: Task, precision: str) -> Outcome:
    """``task`` by a trainer in this process, all rows in one micro-batch."""
    rows = len(read_batch(task.batch).input_ids)
    plain = dataclasses.replace(task, layout=Layout(), micro_batch=rows, precision=precision, recompute="none")
    with tempfile.TemporaryDirectory(prefix="tele-layout-") as folder:
        return run_alone(backend, plain, Path(folder))


def expected_of(task: Task) -> tuple[list[Traffic] | str, list[int]]:
    """What every rank must send in one step (or why it is not known) and the most graphs it may hold."""
    layout, batch = task.layout, read_batch(task.batch)
    padded = pad_rows(batch, row_multiple(task))
    micro_batches = len(padded.input_ids) // (layout.dp * task.micro_batch)
    ranks = range(layout.world)
    first = 0 if not task.freeze else first_trained_stage(run_config(task, *padded.input_ids.shape))
    peaks = [_peak(layout, micro_batches, layout.coord(rank).pp, first) for rank in ranks]
    if task.recompute != "none":
        return f"messages are not counted: recompute {task.recompute} sends some of the forward's twice", peaks
    if task.lora is not None or task.freeze:
        return "messages are not counted: the backward pass ends at the first parameter that is trained", peaks
    starts = range(0, len(padded.input_ids), task.micro_batch)
    methods = {split_batch(padded.rows(i, i + task.micro_batch), layout, 0).visibility.method for i in starts}
    if len(methods) > 1:
        return "messages are not counted: only some micro-batches have documents that fit a zigzag", peaks
    sizes = {"seq_len": batch.input_ids.shape[1], "micro_batch": task.micro_batch, "micro_batches": micro_batches}
    by_class = tells_classes_apart(task.optim)
    method = methods.pop()
    traffic = [
        expected_traffic(
            task.model, layout, rank=rank, precision=task.precision, method=method, by_class=by_class, **sizes
        )
        for rank in ranks
    ]
    return traffic, peaks


def _peak(layout: Layout, micro_batches: int, rank: int, first: int) -> int:
    """Most graphs that a pipeline rank holds at once; stages before ``first`` make none."""
    if first == 0:
        return peak_live(layout.schedule, layout.pp, layout.virtual, micro_batches, rank)
    live = peak = 0
    for action in actions(layout.schedule, layout.pp, layout.virtual, micro_batches, rank):
        if action.chunk * layout.pp + rank >= first:
            live += 1 if action.kind == "F" else -1
            peak = max(peak, live)
    return peak


def judge_layout(backend: str, task: Task, run: Outcome, references: References) -> LayoutReport:
    """Judge what the ranks of ``task`` left, with gradients kept; weights are judged where updates were made."""
    single, exact = references.single, references.exact
    problems = [*run.problems, *_names(run, single)]
    source = "; ".join(problems[:3]) or "all ranks say the same, and their pieces make up the model"
    bounds = [Bound("names, shapes or pieces that differ", float(len(problems)), 0.0, source)]
    errors = {
        what: (_apart(run, single, key), _apart(run, exact, key))
        for what, key in (("loss", "losses"), ("gradient norm", "norms"))
    }
    low = task.precision not in ("fp32", "fp64")
    gradients = _compare([o.gradients for o in (run, single, exact)], _gradient_limits(task, references, low))
    changes = [_moved(o.weights, references.initial) for o in (run, single, exact)] if task.steps else [{}, {}, {}]
    constant = changes[0].keys() - run.gradients.keys()
    bounds.append(_frozen([name for name in constant if np.any(changes[0][name])]))
    changes = [{name: moved for name, moved in held.items() if name not in constant} for held in changes]
    weights = _compare(changes, _weight_limits(task, references, low))
    if low:
        bounds += _low_scalars(task, run, single, exact)
        bounds += _ratios("gradients", [o.gradients for o in (run, single, exact)], task.precision)
        bounds += _ratios("updates of weights", changes, task.precision) if task.steps else []
    else:
        bounds += _scalars(task, errors) + _tensors(task, gradients, weights)
    traffic, peaks = expected_of(task)
    notes = [traffic] if isinstance(traffic, str) else []
    bounds += [] if isinstance(traffic, str) else [_messages(run, traffic)]
    return LayoutReport(
        layout=task.name,
        backend=backend,
        precision=task.precision,
        bounds=[*bounds, _graphs(run, peaks)],
        errors=errors,
        gradients=gradients,
        weights=weights,
        sent=max(sum(size for _, size in sent.values()) for sent in run.traffic),
        live=[run.peaks[rank] for rank in task.layout.ranks("pp", 0)],
        seconds=run.seconds,
        notes=notes,
    )


def _names(run: Outcome, single: Outcome) -> list[str]:
    found = []
    for kind in ("gradients", "weights"):
        ours, theirs = getattr(run, kind), getattr(single, kind)
        if kind == "gradients" or theirs:
            compared = compare_tensors(ours, theirs)
            found += [f"{kind}: {name} is missing" for name in compared.missing]
            found += [f"{kind}: {name} is not a parameter" for name in compared.unexpected]
            found += [
                f"{kind}: {n} has shape {ours[n].shape}"
                for n in theirs
                if n in ours and ours[n].shape != theirs[n].shape
            ]
    return found


def _apart(run: Outcome, other: Outcome, key: str) -> float:
    value, truth = getattr(run, key)[0], getattr(other, key)[0]
    return abs(value - truth) / abs(truth)


def _moved(weights: Mapping[str, np.ndarray], initial: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How far the updates moved every weight; one of a wrong shape stays as it is, to be found by its shape."""
    return {n: w - initial[n].astype(np.float64) if w.shape == initial[n].shape else w for n, w in weights.items()}


def _gradient_limits(task: Task, references: References, low: bool) -> dict[str, float]:
    """GRADIENT_LIMIT, or what core.parity.bounds grants a gradient that a rounding of the weights moves further."""
    unit = math.inf if low else UNIT_ROUNDOFF[task.precision] / UNIT_ROUNDOFF["fp32"]
    limits = dict.fromkeys(references.single.gradients, GRADIENT_LIMIT * unit)
    for name, moved in (references.nudged or {}).items():
        limits[name] = max(limits[name], NUDGED * _distance(moved, references.exact.gradients[name]))
    return limits


def _weight_limits(task: Task, references: References, low: bool) -> dict[str, float]:
    """Limits on the change of each weight, from those on its gradient.

    An update moves a weight by lr * m / (sqrt(v) + eps), like lr * g / (|g| + eps). The slope of that in g is at most
    lr / eps, its size at least lr * |g| / (max|g| + eps): a relative error grows by at most 1 + max|g| / eps. And the
    weight itself is rounded twice an update (decay, step), on its own scale.
    """
    single, limits = references.single, _gradient_limits(task, references, low)
    scale = clip_factor(single.norms[0], task.optim.clip_grad)
    for name in limits.keys() & single.weights.keys():
        weight = single.weights[name]
        moved = float(np.linalg.norm(weight - references.initial[name].astype(np.float64)))
        rounding = 2 * UNIT_ROUNDOFF[task.precision] * float(np.linalg.norm(weight)) / (moved or math.inf)
        magnified = 1 + scale * float(np.abs(single.gradients[name]).max()) / task.optim.eps
        limits[name] = task.steps * (limits[name] * magnified + rounding)
    return limits


def _compare(sets: Sequence[Mapping[str, np.ndarray]], limits: Mapping[str, float]) -> list[TensorError]:
    """Every tensor of (layout, one device, float64), worst first; one that the layout lacks is infinitely far."""
    run, single, exact = sets
    rows = []
    for name in exact:
        far = [_distance(run[name], other[name]) if name in run else math.inf for other in (single, exact)]
        rows.append(TensorError(name, far[0], far[1], limits[name]))
    return sorted(rows, key=lambda row: _share(row.apart, row.limit), reverse=True)


def _distance(actual: np.ndarray, expected: np.ndarray) -> float:
    return relative_frobenius(actual, expected) if actual.shape == expected.shape else math.inf


def _share(value: float, limit: float) -> float:
    """Of its limit; without one the value itself. nan is above everything."""
    return math.inf if math.isnan(value) else value if math.isinf(limit) else value / limit


def _scalars(task: Task, errors: Mapping[str, tuple[float, float]]) -> list[Bound]:
    u = UNIT_ROUNDOFF[task.precision]
    limit = (GRADIENT_LIMIT if task.precision == "fp64" else SCALAR_LIMIT) * u / UNIT_ROUNDOFF["fp32"]
    source = f"sums in another order: {limit / u:.0f} u, u = {u:.3g} ({task.precision})"
    return [
        Bound(f"{what} against {whom}", error, limit, source)
        for what, both in errors.items()
        for whom, error in zip(("one device", "float64"), both, strict=True)
    ]


def _tensors(task: Task, gradients: Sequence[TensorError], weights: Sequence[TensorError]) -> list[Bound]:
    u = UNIT_ROUNDOFF[task.precision]
    sources = (
        f"sums in another order, through every layer twice: {GRADIENT_LIMIT / UNIT_ROUNDOFF['fp32']:.0f} u, or "
        f"{NUDGED:g} x a rounding of the weights, u = {u:.3g} ({task.precision})",
        f"{task.steps} updates of AdamW, eps {task.optim.eps:.2g}: the gradients' limit times 1 + max|g| / eps, and "
        "two roundings of the weight each",
    )
    bounds = []
    for what, tensors, source in zip(("gradient", "weight's change"), (gradients, weights), sources, strict=True):
        for whom, key in (("one device", "apart"), ("float64", "error")) if tensors else ():
            worst = max(tensors, key=lambda t: _share(getattr(t, key), t.limit))
            bounds.append(Bound(f"{what} ({worst.name}) against {whom}", getattr(worst, key), worst.limit, source))
    return bounds


def _low_scalars(task: Task, run: Outcome, single: Outcome, exact: Outcome) -> list[Bound]:
    """Loss and norm of a 16-bit layout, by the rule under which two backends are judged."""
    rules = tolerances(task.precision, task.model.num_layers)
    bounds = []
    for what, rule, key in (("loss", rules["loss"], "losses"), ("gradient norm", rules["grad_norm"], "norms")):
        errors = {"layout": _apart(run, exact, key), "one device": _apart(single, exact, key)}
        source = rule.source.replace("the other backend's", "one device's")
        bounds.append(Bound(f"{what} against float64", errors["layout"], rule.limits(errors)["layout"], source))
    return bounds


def _ratios(what: str, sets: Sequence[Mapping[str, np.ndarray]], precision: str) -> list[Bound]:
    """Error of a layout against float64 over that of one device; an error below u counts as u."""
    run, single, exact = sets
    floor, source = UNIT_ROUNDOFF[precision], "error against float64 over one device's; the same roundings give 1"
    ratios = {
        name: _distance(run[name], truth) / max(_distance(single[name], truth), floor) if name in run else math.inf
        for name, truth in exact.items()
    }
    worst = max(ratios, key=lambda name: _share(ratios[name], 1.0))
    return [
        Bound(f"{what}, all as one", _whole(run, exact) / max(_whole(single, exact), floor), RATIO_LIMIT, source),
        Bound(f"{what}, median", float(np.median(list(ratios.values()))), RATIO_LIMIT, source),
        Bound(f"{what}, worst ({worst})", ratios[worst], WORST_RATIO_LIMIT, source),
    ]


def _whole(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Relative Frobenius error of all tensors as one vector."""
    if any(n not in actual or actual[n].shape != expected[n].shape for n in expected):
        return math.inf
    apart = {n: actual[n].astype(np.float64) - expected[n] for n in expected}
    return global_norm(apart) / global_norm(expected)


def _frozen(moved: Sequence[str]) -> Bound:
    """Of the weights without a gradient, those that updates changed."""
    source = ", ".join(sorted(moved)[:3]) or "what is frozen has no gradient and no decay"
    return Bound("frozen weights that moved", float(len(moved)), 0.0, source)


def _messages(run: Outcome, expected: Sequence[Traffic]) -> Bound:
    wrong = []
    for rank, (sent, promised) in enumerate(zip(run.traffic, expected, strict=True)):
        for key in sorted(sent.keys() | promised.keys()):
            found, wanted = list(sent.get(key, (0, 0))), list(promised.get(key, (0, 0)))
            if found != wanted:
                calls = f"{found[0]} calls of {found[1]} bytes, not {wanted[0]} of {wanted[1]}"
                wrong.append(f"rank {rank}, {key[0]} over {key[1]}: {calls}")
    source = "; ".join(wrong[:3]) or "calls and bytes of every rank equal core.parallel.traffic's closed form"
    return Bound("messages unlike the formula", float(len(wrong)), 0.0, source)


def _graphs(run: Outcome, expected: Sequence[int]) -> Bound:
    wrong = [f"rank {r}: {a}, not {b}" for r, (a, b) in enumerate(zip(run.peaks, expected, strict=True)) if a != b]
    source = "; ".join(wrong[:3]) or "most micro-batch graphs alive at once, as core.parallel.schedule promises"
    return Bound("ranks with more or fewer live graphs", float(len(wrong)), 0.0, source)
