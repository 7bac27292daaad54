"""Search report: losses, the trend of the gradient norm, and whether wider models are better, as text, CSV and JSON.

Everything is computed from the trials' metrics.jsonl, so a report can be created again at any time. A combination at a
width is reported by the mean over its seeds, step by step; only results.csv has a line for each trial.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from telechat_twins.core.model.params import count_parameters
from telechat_twins.core.mup.loss_prediction import student_quantile
from telechat_twins.core.mup.search import DIVERGED, DONE, FAILED, NAMES, Numbers, Trial, result_of
from telechat_twins.core.mup.transfer import RULES, value_of
from telechat_twins.core.train.metrics import Row, column, read_metrics
from telechat_twins.core.types import JsonObject

QUARTERS = 4  # parts of the steps after warm-up, whose median gradient norms give the trend
SURE = 3.0  # standard errors by which a difference must exceed zero to be significant
SURE_LEVEL = math.erf(SURE / math.sqrt(2.0))  # the same as a probability, for Student's quantile with few seeds
ONE_SEED = "one seed does not show the scatter of initial weights"


@dataclass(frozen=True)
class TrialReport:
    """Report of one trial, or of the mean of a combination at one width over its seeds, whose reports are ``parts``.

    ``loss``: mean over the last steps. ``trend``: gradient norm in the last quarter after warm-up over the first's.
    ``rising``: it increases from each quarter to the next, which the Tele-FLM report names as a warning sign.
    """

    trial: Trial
    state: str
    reason: str
    steps: int
    loss: float | None
    start: float | None
    trend: float | None
    rising: bool
    seconds: float
    rows: list[Row] = field(repr=False)
    parts: tuple[TrialReport, ...] = field(default=(), repr=False)

    @property
    def seeds(self) -> tuple[TrialReport, ...]:
        """The reports of its trials, one for each seed."""
        return self.parts or (self,)

    @property
    def scatter(self) -> float | None:
        """Standard deviation of the loss between seeds."""
        losses = [part.loss for part in self.parts if part.loss is not None]
        return statistics.stdev(losses) if len(losses) > 1 else None

    @property
    def rose(self) -> bool:
        """Whether the loss ended above its start: the run diverged, though its numbers stayed finite."""
        return self.loss is not None and self.start is not None and self.loss > self.start


@dataclass(frozen=True)
class Wider:
    """Comparison of two widths of one combination, in windows of steps after warm-up.

    ``better``: fraction of windows in which the wider model has the lower mean loss. ``surely``: fraction in which it
    is lower beyond noise. ``worse``: last steps of windows in which it is higher beyond noise. ``last``: loss of the
    wider minus that of the narrower in the last window, ``noise``: the noise level there; None if there is no window.
    """

    narrow: int
    wide: int
    windows: int
    better: float
    surely: float
    worse: list[int]
    last: float | None
    noise: float | None


def report_of(trial: Trial, window: int) -> TrialReport:
    """Report of a trial as far as it has been trained."""
    result = result_of(trial)
    file = trial.folder / "metrics.jsonl"
    rows = read_metrics(file) if file.exists() else []
    seconds = sum(row["step_ms"] for row in rows) / 1000
    state = result.state if result else ("begun" if rows else "waiting")
    return _report(trial, state, result.reason if result else "", rows, seconds, window)


def over_seeds(reports: Sequence[TrialReport], window: int) -> list[TrialReport]:
    """One report for every combination at every width: that of its only trial, or the mean over its seeds, step by step
    up to the step that all of them reached. The state is the worst of the seeds' states."""
    places: dict[tuple[int, Numbers], list[TrialReport]] = {}
    for report in reports:
        places.setdefault((report.trial.width, report.trial.numbers), []).append(report)
    return [parts[0] if len(parts) == 1 else _mean(parts, window) for parts in places.values()]


def _mean(parts: Sequence[TrialReport], window: int) -> TrialReport:
    rows = [
        {"step": row["step"], **{key: float(np.mean(column([row, *others], key))) for key in ("loss", "grad_norm")}}
        for row, *others in zip(*(part.rows for part in parts), strict=False)
    ]
    odd = [f"seed {part.trial.seed} {part.state} {part.reason}".rstrip() for part in parts if part.state != DONE]
    worst = max(parts, key=lambda part: _rank(part.state))
    seconds = sum(part.seconds for part in parts)
    return _report(parts[0].trial, worst.state, "; ".join(odd), rows, seconds, window, tuple(parts))


def _report(
    trial: Trial,
    state: str,
    reason: str,
    rows: list[Row],
    seconds: float,
    window: int,
    parts: tuple[TrialReport, ...] = (),
) -> TrialReport:
    losses = [loss for loss in column(rows, "loss") if math.isfinite(loss)]
    norms = [n for n in column(rows[trial.warmup :], "grad_norm") if math.isfinite(n)]
    quarters = np.array_split(np.array(norms), QUARTERS) if len(norms) >= 2 * QUARTERS else []
    medians = [float(np.median(quarter)) for quarter in quarters]
    usable = bool(medians) and min(medians) > 0
    return TrialReport(
        trial=trial,
        state=state,
        reason=reason,
        steps=rows[-1]["step"] if rows else 0,
        loss=statistics.fmean(losses[-window:]) if len(losses) >= window else None,
        start=losses[0] if losses else None,
        trend=medians[-1] / medians[0] if usable else None,
        rising=usable and all(a < b for a, b in zip(medians, medians[1:], strict=False)),
        seconds=seconds,
        rows=rows,
        parts=parts,
    )


def ordered(reports: Sequence[TrialReport]) -> list[TrialReport]:
    """Reports in this order: complete runs by loss, runs that ended early, runs that have not ended."""
    return sorted(reports, key=lambda r: (_rank(r.state), math.inf if r.loss is None else r.loss))


def _rank(state: str) -> int:
    return {DONE: 0, DIVERGED: 1, FAILED: 2, "begun": 3}.get(state, 4)


def varied(trials: Sequence[Trial]) -> list[str]:
    """The hyper-parameters with different values among the trials, in the order of NAMES."""
    return [name for name in NAMES if len({getattr(trial.numbers, name) for trial in trials}) > 1]


def whole_widths(reports: Sequence[TrialReport], window: int) -> dict[Numbers, list[TrialReport]]:
    """Mean reports by combination, in order of width, of combinations that are complete for every seed at two widths or
    more."""
    found: dict[Numbers, list[TrialReport]] = {}
    for report in over_seeds(reports, window):
        if report.state == DONE:
            found.setdefault(report.trial.numbers, []).append(report)
    return {numbers: sorted(whole, key=lambda r: r.trial.width) for numbers, whole in found.items() if len(whole) > 1}


def judge_widths(reports: Sequence[TrialReport], window: int) -> dict[Numbers, list[Wider]]:
    """Comparison of neighbouring widths, for every combination with at least two complete widths.

    Runs of one seed train on the same batches at all widths, so their losses are compared in pairs, and the differences
    are averaged over seeds. A window counts as worse when the mean difference exceeds SURE standard errors. With one
    seed the error is estimated from the differences inside the window: a drift inside it counts as noise, which makes
    the test conservative, but the scatter due to initial weights is not included. With several seeds it is estimated
    from the scatter between them, which includes both (_luck).
    """
    return {numbers: _neighbours(whole, window) for numbers, whole in whole_widths(reports, window).items()}


def _neighbours(whole: Sequence[TrialReport], window: int) -> list[Wider]:
    """Comparisons of neighbouring widths of one combination, whose complete runs have the same steps and seeds."""
    first = whole[0].trial.warmup
    losses = np.array([[column(part.rows, "loss") for part in report.seeds] for report in whole])  # [width, seed, step]
    count = (losses.shape[2] - first) // window
    cut = losses[:, :, first : first + count * window].reshape(*losses.shape[:2], count, window)
    luck = _luck(cut.mean(axis=3)) if cut.shape[1] > 1 else None
    pairs = []
    for place, (narrow, wide) in enumerate(zip(whole, whole[1:], strict=False)):
        apart = cut[place + 1] - cut[place]
        mean = apart.mean(axis=(0, 2))
        noise = SURE * apart[0].std(axis=1, ddof=1) / math.sqrt(window) if luck is None else luck
        pairs.append(
            Wider(
                narrow=narrow.trial.width,
                wide=wide.trial.width,
                windows=count,
                better=float(np.mean(mean < 0)) if count else 0.0,
                surely=float(np.mean(mean < -noise)) if count else 0.0,
                worse=[first + (int(i) + 1) * window for i in np.flatnonzero(mean > noise)],
                last=float(mean[-1]) if count else None,
                noise=float(noise[-1]) if count else None,
            )
        )
    return pairs


def _luck(means: np.ndarray) -> np.ndarray:
    """Largest difference, in each window, of two widths' means over seeds that counts as noise.

    ``means``: [width, seed, window]. The residual of a loss after subtracting the mean of its width and the mean of its
    seed (whose batches all widths share) is chance: initial weights, and how a width responds to these batches. Its
    standard deviation is assumed equal for all widths, since few seeds say little about a single width. This is an
    analysis of variance with seeds as blocks; Student's quantile accounts for its (widths - 1)(seeds - 1) degrees of
    freedom. For two widths it is the paired t-test.
    """
    widths, seeds, _ = means.shape
    left = means - means.mean(axis=0) - means.mean(axis=1, keepdims=True) + means.mean(axis=(0, 1))
    freedom = (widths - 1) * (seeds - 1)
    deviation = np.sqrt((left**2).sum(axis=(0, 1)) / freedom)
    noise: np.ndarray = student_quantile(SURE_LEVEL, freedom) * deviation * math.sqrt(2.0 / seeds)
    return noise


def describe(reports: Sequence[TrialReport], widths: dict[Numbers, list[Wider]], window: int) -> str:
    """Text report: a table of combinations, the best first, and the comparison of widths."""
    means = over_seeds(reports, window)
    names = varied([report.trial for report in means])
    seeds = list(dict.fromkeys(report.trial.seed for report in reports))
    several = len(seeds) > 1
    titles = ["width", *names, "loss", *["+-"] * several, "gradient norm", "minutes", ""]
    rows = [titles, *(_cells(report, names, several) for report in ordered(means))]
    sizes = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    lines = ["  ".join(cell.rjust(n) for cell, n in zip(row, sizes, strict=True)).rstrip() for row in rows]
    lines.append(
        f"loss: mean of the last {window} steps; gradient norm: last quarter after warm-up over the first, "
        "rising: it increases from each quarter to the next"
    )
    if several:
        lines.append(f"values are means over the seeds {_listed(seeds)}; +-: standard deviation of the loss over seeds")
    for numbers, pairs in widths.items():
        holds = not any(pair.worse for pair in pairs)
        lines += ["", f"wider is better ({numbers.label}): {'holds' if holds else 'DOES NOT HOLD'}"]
        for pair in pairs:
            worse = f"WORSE beyond noise in the windows up to step {_listed(pair.worse)}"
            share = f"better in {pair.better:.0%} of {pair.windows} windows of {window} steps"
            ending = worse if pair.worse else "never worse beyond noise"
            at_end = f"; at the end {pair.last:+.4f} (noise {pair.noise:.4f})" if pair.windows else ""
            surely = f"beyond noise in {pair.surely:.0%}"
            lines.append(f"  {pair.narrow} -> {pair.wide}: {share}, {surely}; {ending}{at_end}")
    if widths:
        between = f"between {len(seeds)} seeds, over all widths"
        lines.append(f"  noise: estimated from the scatter {between if several else f'inside a window; {ONE_SEED}'}")
    return "\n".join(lines)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _cells(report: TrialReport, names: Sequence[str], several: bool) -> list[str]:
    numbers = (getattr(report.trial.numbers, name) for name in names)
    loss = "-" if report.loss is None else f"{report.loss:.4f}"
    trend = "-" if report.trend is None else f"x {report.trend:.2f}" + (" rising" if report.rising else "")
    remark = "" if report.state == DONE else f"{report.state} at step {report.steps}"
    if report.rose:
        remark = f"{remark or 'ended'} above its start"
    remark = f"{remark}: {report.reason}" if report.reason else remark
    shown = ("config's" if value is None else f"{value:.4g}" for value in numbers)
    scatter = ["-" if report.scatter is None else f"{report.scatter:.4f}"] * several
    return [str(report.trial.width), *shown, loss, *scatter, trend, f"{report.seconds / 60:.1f}", remark]


def to_json(reports: Sequence[TrialReport], widths: dict[Numbers, list[Wider]], window: int) -> JsonObject:
    """The contents of results.json."""
    return {
        "window": window,
        "trials": [_record(report) for report in ordered(reports)],
        "means over seeds": [
            {
                "place": mean.trial.place,
                "state": mean.state,
                "seeds": [part.trial.seed for part in mean.seeds],
                "loss": mean.loss,
                "standard deviation": mean.scatter,
            }
            for mean in ordered(over_seeds(reports, window))
        ],
        "wider is better": [
            {"numbers": numbers.label, **vars(pair), "holds": not pair.worse}
            for numbers, pairs in widths.items()
            for pair in pairs
        ],
    }


def _record(report: TrialReport) -> JsonObject:
    """One trial as plain values, with the hyper-parameters at its own width, too."""
    trial = report.trial
    model, optim = trial.config.model, trial.config.optim
    return {
        "trial": trial.name,
        "state": report.state,
        "reason": report.reason,
        "width": trial.width,
        "parameters": count_parameters(model),
        **{name: getattr(trial.numbers, name) for name in NAMES},
        "at this width": {rule.option: value_of(rule, model, optim) for rule in RULES},
        "seed": trial.seed,
        "steps": report.steps,
        "loss": report.loss,
        "first loss": report.start,
        "gradient norm trend": report.trend,
        "gradient norm rising": report.rising,
        "seconds": round(report.seconds, 1),
    }


def results_csv(reports: Sequence[TrialReport]) -> str:
    """The contents of results.csv: a line for each trial, the best first."""
    text = io.StringIO()
    records = [{k: v for k, v in _record(r).items() if k != "at this width"} for r in ordered(reports)]
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def loss_tables(reports: Sequence[TrialReport], window: int) -> dict[str, str]:
    """Loss tables for `tele mup predict` by file name: losses.csv, or a losses-LABEL.csv for each combination, of those
    with at least two complete widths."""
    made = {}
    for numbers, whole in whole_widths(reports, window).items():
        seeds = [part.trial.seed for part in whole[0].seeds]
        over = f", mean over seeds {_listed(seeds)}" if len(seeds) > 1 else ""
        lines = [f"# {numbers.label}: mean loss of the last {window} steps{over}", "width,parameters,loss,step"]
        for report in whole:
            millions = count_parameters(report.trial.config.model) / 1e6
            lines.append(f"{report.trial.width},{millions:.6g},{report.loss:.6f},{report.steps}")
        made[numbers.label] = "\n".join(lines) + "\n"
    if len(made) == 1:
        return {"losses.csv": next(iter(made.values()))}
    return {f"losses-{label}.csv": text for label, text in made.items()}
