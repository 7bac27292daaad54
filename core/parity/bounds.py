"""Comparison of two backends, and the bounds beyond which a difference is a fault.

One batch: every quantity of both backends (logits, loss, gradient norm, each gradient) is measured against a float64
run of the same model. The float64 run measures what rounding costs here; a backend is at fault when its error is much
larger than the other's, or larger than rounding can explain. Everything scales with the precision's unit roundoff u,
so fp32 and bf16 are judged by one rule.

N steps: the losses and gradient norms of two training runs, step by step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from telechat_twins.core.train.metrics import Row, column

FULL = ("fp32", "fp64")  # precisions in which all is computed as it is stored
# Half the distance from 1 to the next number of the precision that products are rounded to.
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-8, "amp": 2.0**-8, "fp16": 2.0**-11, "fp64": 2.0**-53}
# The first steps of two fp32 runs, before rounding differences of 1e-7 have grown through the optimizer.
STRICT_STEPS = 50
TRACE_LIMIT = 1e-4


def relative_frobenius(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected|| in float64. 0 when both are zero, inf when only ``expected`` is; nan if
    anything is nan. Raises ValueError when the shapes differ."""
    if np.shape(actual) != np.shape(expected):
        raise ValueError(f"shapes differ: {np.shape(actual)} and {np.shape(expected)}")
    expected = np.asarray(expected, np.float64)
    apart = float(np.linalg.norm(np.asarray(actual, np.float64).ravel() - expected.ravel()))
    size = float(np.linalg.norm(expected.ravel()))
    if size == 0.0:
        return 0.0 if apart == 0.0 else math.inf
    return apart / size


@dataclass(frozen=True)
class TensorDifference:
    """``relative``: relative Frobenius error; ``max_abs``: largest single difference."""

    name: str
    relative: float
    max_abs: float


@dataclass(frozen=True)
class Comparison:
    """Two sets of named tensors: differences of the common names, worst first, and the names only one side has."""

    rows: list[TensorDifference]
    missing: list[str]
    unexpected: list[str]

    @property
    def same_names(self) -> bool:
        return not self.missing and not self.unexpected

    def worst(self) -> float:
        """The largest relative error, nan before all; inf when the sets of names differ or are empty."""
        return self.rows[0].relative if self.rows and self.same_names else math.inf


def compare_tensors(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> Comparison:
    """Compare by name. A tensor of another shape counts as infinitely far."""
    rows = []
    for name in expected:
        if name not in actual:
            continue
        if actual[name].shape != expected[name].shape:
            rows.append(TensorDifference(name, math.inf, math.inf))
            continue
        apart = np.abs(np.asarray(actual[name], np.float64) - np.asarray(expected[name], np.float64))
        rows.append(
            TensorDifference(name, relative_frobenius(actual[name], expected[name]), float(apart.max(initial=0.0)))
        )
    rows.sort(key=lambda row: math.inf if math.isnan(row.relative) else row.relative, reverse=True)
    return Comparison(rows, sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected)))


def global_norm(gradients: Mapping[str, np.ndarray]) -> float:
    """L2 norm over all tensors, in float64."""
    return math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in gradients.values()))


@dataclass(frozen=True)
class Bound:
    """A measured ``value`` that must not exceed ``limit``; ``source``: where the limit comes from.

    ``key``: the bound's name for machines, the same in every run; by default made of ``what``, from which what may
    differ between runs (a name in parentheses, the worse backend) is left out.
    """

    what: str
    value: float
    limit: float
    source: str
    key: str = ""

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", _key(self.what))

    @property
    def holds(self) -> bool:
        return self.value <= self.limit  # false for nan


def _key(what: str) -> str:
    """``what`` without parentheses and the worse backend, lower case, every other character a hyphen."""
    stable = re.sub(r"\([^()]*\)|, (?:ms|pt|a|b)(?= against float64)", "", what)
    return re.sub(r"[^a-z0-9._]+", "-", stable.lower()).strip("-")


# fp32 errors were 3 to 6 times what one rounding of every weight does to the same quantity, in models of 3 to 5 blocks.
NUDGED = 12.0


@dataclass(frozen=True)
class Tolerance:
    """The rule of one batch: error <= min(ceiling, factor * max(floor, the other backend's error)).

    Where a model magnifies rounding more than those that ceilings were measured on, the ceiling is 12 times what a
    rounding of its weights does in float64.
    """

    factor: float
    floor: float
    ceiling: float
    source: str

    def limits(self, errors: Mapping[str, float], nudged: float = 0.0) -> dict[str, float]:
        """The limit of each backend, given every backend's error against float64; ``nudged``: how far a rounding of
        the weights moves the float64 run."""
        ceiling = max(self.ceiling, NUDGED * nudged)
        limits = {}
        for name in errors:
            others = [e for other, e in errors.items() if other != name]
            limits[name] = min([ceiling, *(self.factor * max(self.floor, e) for e in others)])
        return limits


def tolerances(precision: str, num_layers: int) -> dict[str, Tolerance]:
    """The rule for "logits", "loss", "grad_norm", "gradients" (all as one vector) and "gradient" (each tensor).

    Rounding in L residual blocks adds up like a random walk, so ceilings grow with sqrt(L). Their factors are several
    times the errors measured on telechat2-tiny with strong weights (docs/parity.md), and two to six orders of magnitude
    below what a missed bias or a wrong packing does.
    """
    u = UNIT_ROUNDOFF[precision]
    depth = math.sqrt(max(num_layers, 4) / 4)

    def rule(factor: float, floor: float, ceiling: float) -> Tolerance:
        most = f"{ceiling:g} u sqrt(L/4) or {NUDGED:g} x a rounding of the weights, u = {u:.3g} ({precision})"
        if precision == "fp64":
            # One of the two is the judge itself, whose distance from itself says nothing about rounding.
            return Tolerance(math.inf, u, ceiling * u * depth, f"PyTorch's float64 run rounds as much: at most {most}")
        source = (
            f"{factor:g} x the other backend's error against float64, at least {factor * floor:g} u, at most {most}"
        )
        return Tolerance(factor, floor * u, ceiling * u * depth, source)

    if precision in FULL:
        # The frameworks' own exp, rsqrt and order of summation make the factor; faults are hundreds of times larger.
        values: dict[str, tuple[float, float, float]] = {
            "logits": (4, 4, 64),
            "loss": (4, 4, 64),
            "grad_norm": (4, 4, 64),
            "gradients": (4, 4, 128),
            "gradient": (4, 8, 160),
        }
    else:
        # Rounding of operands dominates and is the same in both, so overall errors agree within a tenth; a factor of 2
        # is what one rounding too many, or too few, would bring.
        values = {
            "logits": (2, 1, 16),
            "loss": (4, 0.5, 4),
            "grad_norm": (4, 1, 8),
            "gradients": (2, 1, 32),
            "gradient": (4, 2, 64),
        }
    return {name: rule(*numbers) for name, numbers in values.items()}


@dataclass(frozen=True)
class Judged:
    """One quantity of one batch: ``errors`` and ``limits`` by backend, against float64; ``apart``: the two backends'
    mutual difference; ``max_abs``: by backend, largest single difference from float64."""

    name: str
    errors: dict[str, float]
    limits: dict[str, float]
    apart: float | None
    max_abs: dict[str, float]
    source: str

    @property
    def holds(self) -> bool:
        return all(self.errors[b] <= self.limits[b] for b in self.errors)

    @property
    def margin(self) -> float:
        """Error over limit, the worse backend's: above 1 is a broken bound. nan counts as infinite."""
        ratios = [self.errors[b] / self.limits[b] for b in self.errors]
        return math.inf if any(math.isnan(r) for r in ratios) else max(ratios)


@dataclass(frozen=True)
class BatchReport:
    """The verdict on one batch. ``names``: problems with the sets of gradient names, empty when they agree."""

    quantities: list[Judged]
    gradients: list[Judged]
    names: list[str] = field(default_factory=list)

    def bounds(self) -> list[Bound]:
        """One bound for the names, one per quantity, one for the gradient that is worst by share of its limit."""
        made = [
            Bound("gradient names that differ", float(len(self.names)), 0.0, "both must have exactly the model's names")
        ]
        for judged in [*self.quantities, *self.gradients[:1]]:
            worst = max(judged.errors, key=lambda b: judged.errors[b] / judged.limits[b])
            what = judged.name if judged in self.quantities else f"worst gradient ({judged.name})"
            made.append(
                Bound(f"{what}, {worst} against float64", judged.errors[worst], judged.limits[worst], judged.source)
            )
        return made


def nudged_weights(weights: Mapping[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """float64 weights as far from ``weights`` as a rounding to ``precision`` would put them: times 1 + u * N(0, 1)."""
    random, u = np.random.default_rng(0), UNIT_ROUNDOFF[precision]
    return {n: w.astype(np.float64) * (1.0 + u * random.standard_normal(w.shape)) for n, w in weights.items()}


class BatchResult(TypedDict):
    """Forward and backward of one batch: logits [B, S, V], the loss, and gradients by parameter name."""

    logits: np.ndarray
    loss: float
    grads: dict[str, np.ndarray]


def judge_batch(
    runs: Mapping[str, BatchResult],
    exact: BatchResult,
    precision: str,
    num_layers: int,
    nudged: BatchResult | None = None,
) -> BatchReport:
    """Judge forward-and-backward results of one batch, one or two backends in ``runs``, against the float64 ``exact``.

    ``nudged``: the result of a float64 run with ``nudged_weights``, which measures how much the model magnifies
    rounding. In 16-bit precisions it is not used: their ceilings stay.
    """
    rules = tolerances(precision, num_layers)
    moved = nudged if nudged is not None and precision in FULL else exact
    names = []
    for backend, run in runs.items():
        compared = compare_tensors(run["grads"], exact["grads"])
        names += [f"{backend} lacks {n}" for n in compared.missing]
        names += [f"{backend} also has {n}" for n in compared.unexpected]
    common = [n for n in exact["grads"] if all(n in run["grads"] for run in runs.values())]
    gradients = [
        _judge(
            name,
            rules["gradient"],
            {b: run["grads"][name] for b, run in runs.items()},
            exact["grads"][name],
            moved["grads"][name],
        )
        for name in common
    ]
    gradients.sort(key=lambda judged: judged.margin, reverse=True)
    everything = {b: {n: run["grads"][n] for n in common} for b, run in runs.items()}
    truth = {n: exact["grads"][n] for n in common}
    logits = {b: run["logits"] for b, run in runs.items()}
    losses = {b: run["loss"] for b, run in runs.items()}
    norms = {b: global_norm(g) for b, g in everything.items()}
    quantities = [
        _judge("logits", rules["logits"], logits, exact["logits"], moved["logits"]),
        _judge("loss", rules["loss"], losses, exact["loss"], moved["loss"]),
        _judge("gradient norm", rules["grad_norm"], norms, global_norm(truth), global_norm(moved["grads"])),
        _judge_as_one_vector(everything, truth, rules["gradients"], moved["grads"]),
    ]
    return BatchReport(quantities, gradients, names)


def _judge(
    name: str,
    rule: Tolerance,
    values: Mapping[str, np.ndarray | float],
    exact: np.ndarray | float,
    moved: np.ndarray | float,
) -> Judged:
    """One quantity, its ``values`` by backend, against the float64 run's and the run with nudged weights."""
    wide = {backend: np.asarray(value, np.float64) for backend, value in values.items()}
    truth = np.asarray(exact, np.float64)
    errors = {b: _distance(v, truth) for b, v in wide.items()}
    far = _distance(np.asarray(moved, np.float64), truth)
    apart = _distance(*wide.values()) if len(wide) == 2 else None
    worst = {b: float(np.abs(v - truth).max()) if v.shape == truth.shape else math.inf for b, v in wide.items()}
    return Judged(name, errors, rule.limits(errors, far), apart, worst, rule.source)


def _judge_as_one_vector(
    runs: Mapping[str, Mapping[str, np.ndarray]],
    truth: Mapping[str, np.ndarray],
    rule: Tolerance,
    moved: Mapping[str, np.ndarray],
) -> Judged:
    """All gradients as one long vector, without making it."""

    def norm_of_difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
        if any(a[n].shape != b[n].shape for n in a):
            return math.inf
        return global_norm({n: np.asarray(a[n], np.float64) - np.asarray(b[n], np.float64) for n in a})

    size = global_norm(truth) or 1.0
    errors = {b: norm_of_difference(g, truth) / size for b, g in runs.items()}
    apart = norm_of_difference(*runs.values()) / size if len(runs) == 2 else None
    far = norm_of_difference(truth, moved) / size
    return Judged("all gradients", errors, rule.limits(errors, far), apart, {}, rule.source)


def _distance(actual: np.ndarray, expected: np.ndarray) -> float:
    return relative_frobenius(actual, expected) if actual.shape == expected.shape else math.inf


@dataclass(frozen=True)
class TraceReport:
    """Two runs step by step. ``loss`` and ``grad_norm`` are relative differences |a-b|/|b| of each step."""

    steps: list[int]
    loss: list[float]
    grad_norm: list[float]
    bounds: list[Bound]


def compare_traces(
    a: Sequence[Row], b: Sequence[Row], exact: Sequence[Row] | None = None, precision: str = "fp32"
) -> TraceReport:
    """Compare the metrics rows of two runs that must be the same training: same steps, tokens and learning rates,
    losses and gradient norms within 1e-4 (fp32; in fp64 2e-13, as many u) in the first 50 steps. Later steps are
    measured, not judged: rounding grows through the optimizer, and how fast depends on the recipe.

    ``exact`` is ``b``'s training in float64. Where it shows that this recipe magnifies rounding beyond 1e-4 within
    those steps (too high a learning rate does), the limit is 4 times b's own distance from it.
    """
    steps = [row["step"] for row in b]
    odd = len(set(steps) ^ {row["step"] for row in a}) + (0 if len(a) == len(b) else 1)
    if odd or not steps:
        return TraceReport([], [], [], [Bound("steps that only one run has", float(odd or 1), 0.0, "one row per step")])
    loss = _relative_columns(a, b, "loss")
    norm = _relative_columns(a, b, "grad_norm")
    named = ("lr", "matrix_lr", "tokens")  # a row without a matrix_lr has none that differs from lr
    schedule = max(sum(abs(x.get(n, 0.0) - y.get(n, 0.0)) for n in named) for x, y in zip(a, b, strict=True))
    strict = min(STRICT_STEPS, len(steps))
    bounds = [
        Bound("learning rate or tokens of any step", float(schedule), 0.0, "both come from core: the same doubles")
    ]
    for what, key, apart in (("loss", "loss", loss), ("gradient norm", "grad_norm", norm)):
        limit, source = (
            TRACE_LIMIT * UNIT_ROUNDOFF[precision] / UNIT_ROUNDOFF["fp32"],
            f"{precision} runs of one recipe, before rounding has grown through {STRICT_STEPS} updates",
        )
        if exact is not None and len(exact) == len(steps):
            drift = 4 * _max(_relative_columns(b, exact, key)[:strict])
            if drift > limit:
                limit, source = (
                    drift,
                    "4 x the distance of one of the runs from its float64 run: this recipe magnifies rounding",
                )
        bounds.append(Bound(f"{what}, steps 1 to {strict}", _max(apart[:strict]), limit, source, f"trace.{key}"))
    return TraceReport(steps, loss, norm, bounds)


def compare_low_precision_traces(a: Sequence[Row], b: Sequence[Row], exact: Sequence[Row]) -> TraceReport:
    """Like compare_traces for bf16, amp and fp16: the two runs are not expected to agree step by step, but to stay
    equally far (root mean square of the loss difference, within a factor 2) from an fp32 run of the same training."""
    report = compare_traces(a, b)
    if not report.steps or len(exact) != len(a):
        return report
    far = [float(np.sqrt(np.mean(np.square(_relative_columns(run, exact, "loss"))))) for run in (a, b)]
    ratio = max(far) / min(far) if min(far) > 0 else (1.0 if max(far) == 0 else math.inf)
    source = f"distances from the fp32 run are {far[0]:.2g} and {far[1]:.2g}; the same roundings give the same distance"
    return TraceReport(
        report.steps,
        report.loss,
        report.grad_norm,
        [report.bounds[0], Bound("ratio of distances from fp32", ratio, 2.0, source)],
    )


def _relative_columns(a: Sequence[Row], b: Sequence[Row], key: str) -> list[float]:
    pairs = zip(column(a, key), column(b, key), strict=True)
    # A step without the number (skipped) must be without it in both.
    return [0.0 if math.isnan(x) and math.isnan(y) else abs(x - y) / abs(y) if y else abs(x - y) for x, y in pairs]


def _max(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(v) for v in values) else max(values)
