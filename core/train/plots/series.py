"""Rows of the runs that `tele plot` lays side by side: plain runs, runs in growth stages, pairs of a parity job."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import parse_json
from telechat_twins.core.near import near_path, nearest
from telechat_twins.core.train.metrics import HELD_OUT, TASKS, Row, read_metrics

TITLES = {
    "loss": "loss (nats per token)",
    "grad_norm": "gradient norm (before clipping)",
    "lr": "learning rate",
    "tokens_per_s": "tokens per second",
    "mfu": "MFU",
    "step_ms": "step (ms)",
    "data_share": "share of a step that waits for data",
    "comm_share": "share of a step in collectives",
    "host_peak_gib": "peak memory, host (GiB)",
    "device_peak_gib": "peak memory, device (GiB)",
}
COLUMNS = ("loss", "grad_norm", "lr", "tokens_per_s")  # shown unless others are named
MOST_RUNS, MOST_POINTS = 24, 4_000


@dataclass(frozen=True)
class Series:
    """One run: its label, its rows, and what begins at which step (growth or length stages)."""

    label: str
    rows: list[Row]
    marks: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """Points of one column of one run; ``y`` has nan where the run has no number."""

    label: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Panel:
    """Curves over one x axis. ``logarithmic``: of the y axis."""

    title: str
    curves: list[Curve]
    logarithmic: bool = False


def read_runs(paths: Sequence[Path]) -> list[Series]:
    """The runs at ``paths``: run folders, metrics.jsonl files, or folders whose subfolders are runs (of a parity job or
    a sweep). UserError names a path that holds none."""
    found = [series for path in paths for series in _runs_at(path)]
    if len(found) > MOST_RUNS:
        raise UserError(f"RUN: {len(found)} runs are too many for one picture; name at most {MOST_RUNS}")
    labels = [series.label for series in found]
    if len(set(labels)) == len(labels):
        return found
    return [Series(f"{n}: {series.label}", series.rows, series.marks) for n, series in enumerate(found, 1)]


def _runs_at(path: Path) -> list[Series]:
    if path.is_file() or (path / "metrics.jsonl").is_file():
        if path.is_file() and path.suffix != ".jsonl":
            raise UserError(f"{path}: not a run; name the folder of a run, or its metrics.jsonl")
        folder = path.parent if path.is_file() else path
        rows = read_metrics(path)
        if not rows:
            raise UserError(f"{path}: no step has been recorded yet")
        return [Series(folder.resolve().name, rows, _marks(folder, rows))]
    inner = sorted(child.parent for child in path.glob("*/metrics.jsonl")) if path.is_dir() else []
    if not inner:
        raise UserError(f"{path}: no metrics.jsonl here or one folder below; name the folder of a run{_hint(path)}")
    prefix = path.resolve().name
    runs = [Series(f"{prefix}/{folder.name}", read_metrics(folder), {}) for folder in inner]
    return [run for run in runs if run.rows]


def _hint(path: Path) -> str:
    """Where the runs are that a path without any may mean: around a checkpoint, or further below."""
    if not path.exists():
        return near_path(path)
    if (path.parent / "metrics.jsonl").is_file():
        return f", {path.parent}"
    below = sorted({str(file.parent.parent) for file in path.glob("*/*/metrics.jsonl")})
    return f"; runs are in {', '.join(below[:3])}" if below else ""


def _marks(folder: Path, rows: Sequence[Row]) -> dict[int, str]:
    """First steps of stages: of growth, by report.json; of lengths, by the rows."""
    marks: dict[int, str] = {}
    report = folder / "report.json"
    if report.is_file() and report.stat().st_size < 1 << 20:
        try:
            stages = parse_json(report.read_bytes()).get("stages", [])
            begins = [int(stage["steps"][0]) + 1 for stage in stages]
            marks = {step: str(stage["name"])[:60] for step, stage in zip(begins, stages, strict=True)}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            marks = {}  # another report: the stages then stay unmarked
    before = None
    for row in rows:
        stage = row.get("stage")
        if stage is not None and stage != before:
            marks.setdefault(row["step"], f"{row.get('seq_len')} tokens")
            before = stage
    return marks


def panels(runs: Sequence[Series], columns: Sequence[str], against: str, difference: bool) -> list[Panel]:
    """A panel a column that some run has, then held-out losses and scores of tasks, then with ``difference`` the
    relative differences of loss and gradient norm from the first run."""
    known = {key for run in runs for row in run.rows for key in row} - {"step"}
    for name in columns:
        if name not in known:
            near = nearest(name, sorted(known))
            hint = f"did you mean '{near}'? " if near else ""
            raise UserError(f"--columns: no run has '{name}'; {hint}there are: {', '.join(sorted(known))[:600]}")
    made = [Panel(TITLES.get(name, name), _curves(runs, name, against)) for name in columns]
    made += [
        Panel(name.removeprefix(HELD_OUT), _curves(runs, name, against))
        for name in sorted(known)
        if _is_evaluation(name) and name not in columns
    ]
    if difference:
        for name in ("loss", "grad_norm"):
            title = f"relative difference of {name} from {runs[0].label}"
            made.append(Panel(title, _differences(runs, name, against), logarithmic=True))
    return made


def _is_evaluation(name: str) -> bool:
    """Whether a column is a held-out loss or the score of a task."""
    return (name.startswith(HELD_OUT) and name.endswith("/loss")) or (
        name.startswith(TASKS) and not name.endswith("/stderr")
    )


def _curves(runs: Sequence[Series], name: str, against: str) -> list[Curve]:
    made = []
    for run in runs:
        if rows := [row for row in run.rows if name in row]:
            made.append(_curve(run, rows, against, [_number(row, name) for row in rows]))
    return made


def _differences(runs: Sequence[Series], name: str, against: str) -> list[Curve]:
    first = {row["step"]: _number(row, name) for row in runs[0].rows if name in row}
    made = []
    for run in runs[1:]:
        rows = [row for row in run.rows if name in row and first.get(row["step"])]
        values = [abs(_number(row, name) / first[row["step"]] - 1.0) for row in rows]
        # The axis is logarithmic: no difference is a gap.
        made.append(_curve(run, rows, against, [value or math.nan for value in values]))
    return made


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _curve(run: Series, rows: Sequence[Row], against: str, y: list[float]) -> Curve:
    """At most MOST_POINTS: the lowest and the highest value of each of equal parts, so that no spike is lost."""
    label = run.label
    # The scores of a checkpoint are in a row of their own, without the tokens so far.
    places = {row["step"]: _number(row, against) for row in run.rows if against in row}
    x = [places.get(row["step"], math.nan) for row in rows]
    parts = MOST_POINTS // 2
    if len(x) <= MOST_POINTS:
        return Curve(label, x, y)
    kept: list[int] = []
    for part in range(parts):
        span = range(len(x) * part // parts, len(x) * (part + 1) // parts)
        whole = [n for n in span if not math.isnan(y[n])]
        if whole:
            kept += sorted({min(whole, key=y.__getitem__), max(whole, key=y.__getitem__)})
    return Curve(label, [x[n] for n in kept], [y[n] for n in kept])
