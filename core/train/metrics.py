"""Metrics of a run: writing and reading metrics.jsonl, and the loss plot."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import lines, open_regular, parse_json
from telechat_twins.core.files.pictures import save_picture
from telechat_twins.core.train.plots.fonts import any_script
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = JsonObject

# Columns that measure the machine: they differ between two runs that are equal in every other number.
MEASURED = frozenset(
    ("tokens_per_s", "step_ms", "tokens_per_s_device", "mfu", "data_share", "comm_share")
    + ("host_peak_gib", "device_peak_gib", "eta_s", "restarts")
)
HELD_OUT = "eval/"  # begins the columns of held-out sources: eval/NAME/loss, .../perplexity, .../bits_per_byte
TASKS = "tasks/"  # begins the scores of tasks at checkpoints: tasks/NAME/METRIC, and tasks/NAME/stderr
_SMOOTH_FROM = 250  # steps from which a plot shows a running mean
FEW = 24  # figures of evaluations in a line
LONGEST_ROW = 16_384  # bytes: a line has a few hundred, with long names of tasks some thousands


class MetricsLog:
    """metrics.jsonl: one JSON object a line, one line a step, steps 1, 2, 3 ... even over interruptions. Figures that
    come after a step has been recorded are a further line with its number.

    ``keep_until``: rows of later steps are dropped at opening, because a run resumed from the checkpoint of that step
    makes them again; the file then reads as one uninterrupted run.
    """

    def __init__(self, path: str | Path, keep_until: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.path) if row["step"] <= keep_until] if self.path.exists() else []
        beside = self.path.with_name(self.path.name + ".new")
        with open(beside, "wb") as file:
            file.write(b"".join(map(row_lines, kept)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self.kept: Row = kept[-1] if kept else {}  # the last row that an earlier process wrote
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def append(self, row: Row) -> None:
        """Write one row. Whole lines in one write to an append-only descriptor: a reader never sees half of one."""
        line = row_lines(row)
        written = os.write(self._fd, line)
        while written < len(line):  # a full disk or a signal may cut a write short; the rest raises or follows
            written += os.write(self._fd, line[written:])

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def row_lines(row: Row) -> bytes:
    """A row as it stands in the file: one line, but with many figures of evaluations further lines of FEW of them, so
    that none is too long to be read again."""
    figures = [(key, value) for key, value in row.items() if key.startswith((HELD_OUT, TASKS))]
    if len(figures) <= FEW:
        return _line(row)
    parts = [{key: value for key, value in row.items() if not key.startswith((HELD_OUT, TASKS))}]
    parts += [{"step": row["step"], **dict(figures[at : at + FEW])} for at in range(0, len(figures), FEW)]
    return b"".join(_line(part) for part in parts if len(part) > 1)


def _line(row: Row) -> bytes:
    # JSON has no nan: a number that does not exist (the loss of a step without targets) is null.
    clean = {k: None if isinstance(v, float) and v - v != 0.0 else v for k, v in row.items()}
    return json.dumps(clean, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def read_metrics(path: str | Path) -> list[Row]:
    """All rows of a metrics.jsonl (or of the one in a run's folder), in order, further lines of a step joined to it.

    A last line without its newline is what a killed process leaves, and is dropped; any other bad line is a UserError
    naming file and line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    rows: list[Row] = []
    with open_regular(path, "no such file; a training run writes it") as file:
        for number, line in enumerate(lines(file, path, LONGEST_ROW), 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = parse_json(line)
                if type(row["step"]) is not int:
                    raise ValueError(row["step"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{number}: not a row of metrics; remove the line") from None
            if rows and rows[-1]["step"] == row["step"] and "loss" not in row:
                rows[-1] |= row
            else:
                rows.append(row)
    return rows


def last_step(path: str | Path) -> int:
    """The last step recorded in a metrics.jsonl; 0 when there is no file or no row."""
    rows = read_metrics(path) if Path(path).exists() else []
    return rows[-1]["step"] if rows else 0


def last_row(path: str | Path) -> Row | None:
    """The last whole row of a step in a metrics.jsonl that may be growing, without reading all of it; None when there
    is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4 * LONGEST_ROW))
            found = [line for line in file.read().split(b"\n")[:-1] if b'"loss": ' in line]
    except FileNotFoundError:
        return None
    try:
        return parse_json(found[-1]) if found else None
    except ValueError:
        return None


def require_fresh(out: Path) -> None:
    """UserError when the folder ``out`` holds a run, which a new one would overwrite."""
    done = last_step(out / "metrics.jsonl")
    if done or (out / "latest").exists():
        raise UserError(
            f"--out {out}: already holds a run (step {done}); give another folder, or --resume auto to go on"
        )


def column(rows: Sequence[Row], key: str) -> list[float]:
    """One column as floats, nan where a row has null or lacks the key."""
    return [float("nan") if row.get(key) is None else float(row[key]) for row in rows]


PANELS = (  # column, name, height
    ("loss", "loss (nats per token)", 3.0),
    ("grad_norm", "gradient norm\n(before clipping)", 1.6),
    ("lr", "learning rate", 1.0),
)
SCORES = (TASKS, "scores of tasks", 1.6)


def plot_losses(
    runs: Mapping[str, Sequence[Row]], path: str | Path, title: str, marks: Mapping[int, str] | None = None
) -> Path:
    """Draw loss, gradient norm and learning rate over steps for each labelled run into a PNG; returns its path.

    Steps that made no update (skipped) are marked on the loss curve; ``marks`` are lines at steps, with what they say.
    Where checkpoints were scored on tasks, a panel shows the scores with their standard errors.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    any_script()
    scored = any(key.startswith(TASKS) for rows in runs.values() for row in rows for key in row)
    panels = PANELS + (SCORES,) * scored
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        sharex=True,
        figsize=(9, 8 + 2 * scored),
        gridspec_kw={"height_ratios": [height for _, _, height in panels]},
        layout="constrained",
    )
    for index, (label, rows) in enumerate(runs.items()):
        steps = [row["step"] for row in rows]
        # Later curves are dashed, so that two that coincide are both seen.
        style = {"color": f"C{index}", "linestyle": "-" if index == 0 else (0, (4, 3)), "linewidth": 1.6}
        # Of a long run single steps are a grey band; what they are around is a running mean.
        smooth = len(rows) >= _SMOOTH_FROM
        for axis, (key, _, _) in zip(axes, PANELS, strict=False):
            thin = {"alpha": 0.3, "linewidth": 0.8} if smooth and key != "lr" else {"label": label}
            axis.plot(steps, column(rows, key), **style | thin)
            if smooth and key != "lr":
                axis.plot(steps, running_mean(column(rows, key), len(rows) // 50), label=label, **style)
        _plot_held_out(axes[0], label, rows)
        if scored:
            _plot_scores(axes[-1], label, rows)
        if any("matrix_lr" in row for row in rows):
            axes[2].plot(steps, column(rows, "matrix_lr"), label="matrix-like", **style | {"linestyle": ":"})
            axes[2].legend()
        skipped = [row for row in rows if row.get("skipped")]
        if skipped:
            axes[0].plot(
                [row["step"] for row in skipped], column(skipped, "loss"), "x", color="C3", label=f"{label}: skipped"
            )
    _plot_marks(axes, marks or {})
    for axis, (_, name, _) in zip(axes, panels, strict=True):
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    norms = [n for rows in runs.values() for n in column(rows, "grad_norm") if n > 0]
    if norms and max(norms) > 50 * min(norms):
        axes[1].set_yscale("log")
    axes[2].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes[0].legend()
    axes[0].set_title(title)
    axes[-1].set_xlabel("step")
    save_picture(figure, Path(path), 120)
    pyplot.close(figure)
    return Path(path)


def _plot_marks(axes: Sequence[Axes], marks: Mapping[int, str]) -> None:
    """Lines at steps, with what they say."""
    for step, text in marks.items():
        for axis in axes:
            axis.axvline(step, color="0.5", linewidth=0.9, linestyle=":")
        axes[0].text(
            step, 0.98, f" {text}", transform=axes[0].get_xaxis_transform(), va="top", color="0.35", fontsize=9
        )


def _plot_held_out(axis: Axes, label: str, rows: Sequence[Row]) -> None:
    """Points of the losses on held-out sources."""
    for name in sorted({key for row in rows for key in row if key.startswith(HELD_OUT) and key.endswith("/loss")}):
        judged = [row for row in rows if name in row]
        text = f"{label}: held out, {name.removeprefix(HELD_OUT).removesuffix('/loss')}"
        places = [row["step"] for row in judged]
        axis.plot(places, column(judged, name), marker="o", markersize=3, linewidth=0.8, label=text)


def _plot_scores(axis: Axes, label: str, rows: Sequence[Row]) -> None:
    """Points of the scores of tasks, with their standard errors."""
    for key in sorted({key for row in rows for key in row if key.startswith(TASKS) and not key.endswith("/stderr")}):
        judged = [row for row in rows if key in row]
        name, _, metric = key.removeprefix(TASKS).rpartition("/")
        error = [row.get(f"{TASKS}{name}/stderr") or 0.0 for row in judged]
        places = [row["step"] for row in judged]
        text = f"{label}: {name} ({metric})"
        axis.errorbar(places, column(judged, key), error, marker="o", markersize=3, linewidth=0.8, label=text)
    axis.legend(fontsize=8)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Of each value and up to ``width`` before it; nan counts for nothing."""
    means, window = [], deque[float](maxlen=width)
    for value in values:
        if not math.isnan(value):
            window.append(value)
        means.append(statistics.fmean(window) if window else math.nan)
    return means
