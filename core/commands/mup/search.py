"""`tele mup search`: hyper-parameter search, which trains many small models one after another."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from telechat_twins.core import backends
from telechat_twins.core.data.blend import open_blend
from telechat_twins.core.errors import UserError, tells_of_full_disk
from telechat_twins.core.files.atomic import writable_file, write_text
from telechat_twins.core.launch.run_lock import hold_folder
from telechat_twins.core.mup.search import (
    FAILED,
    Trial,
    forget_checkpoints,
    plan,
    prepare,
    read_search,
    result_of,
    run_trial,
)
from telechat_twins.core.mup.search_plot import plot
from telechat_twins.core.mup.search_report import describe, judge_widths, loss_tables, report_of, results_csv, to_json
from telechat_twins.core.train.metrics import last_row
from telechat_twins.core.train.progress import clock

SOON = 0.2  # fraction of a trial before which the time measured is mostly that of starting processes

DESCRIPTION = """\
Train small models with several hyper-parameters and widths, one after another, and report which were best.

SEARCH is a YAML file:

  config: ../train/teleflm-tiny.yaml   run of the narrow model; a path relative to this file's folder
  set: [train.steps=200]               overrides of its options
  grid:                                values whose combinations are all tried (at the config's width)
    lr: [1e-3, 3e-3]
    matrix_lr: [1e-3, 2e-3, 4e-3]
  trials:                              further single combinations
    - {lr: 2e-3, logit_mult: 1.0}
  widths: [64, 128, 256]               widths to which combinations are transferred by muP (default: the config's)
  seeds: [1, 2, 3]                     seeds over which each combination is averaged (default: the config's)
  window: 20                           steps over which losses are averaged

Hyper-parameters are lr, matrix_lr, min_lr_ratio, init_std, matrix_init_std, input_mult and logit_mult. All trials of a
seed use the same data in the same order. The seed also determines the initial weights, whose effect on the loss can be
larger than that of the hyper-parameters. With several widths the report states whether wider models were better
throughout, and losses.csv is written for `tele mup predict`.

Each trial is a run in a folder of its own under --out. A search continues when it is started again: finished trials are
kept, an interrupted trial resumes from its last checkpoint (checkpoint.every in the config), and a trial that failed
for another reason than divergence is repeated. Trials and seeds may be added to the file; values may not be changed. A
trial that diverges is recorded, and the next one begins. Under --out: results.csv, results.json, losses.png,
hyperparameters.png, widths.png, losses.csv; checkpoints are removed when a trial has ended.
"""
EXAMPLES = """\
examples:
  tele mup search --backend pt teleflm-tiny --out runs/search
  tele mup search --backend pt teleflm-widths --out runs/widths
  tele mup predict runs/widths/losses.csv --hold-out 2 --out runs/widths
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele mup search``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("search", metavar="SEARCH", help="YAML file as above, or name of a bundled search")
    parser.add_argument("--backend", required=True, choices=("ms", "pt"), help="ms: MindSpore, pt: PyTorch")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the search")


def run(args: argparse.Namespace) -> int:
    """Run all trials. Returns 0 when every trial has ended, with whatever outcome; 2 on a full disk, 130 when
    interrupted."""
    search = read_search(args.search)
    try:
        trials = plan(search, args.out)
    except UserError as error:
        raise UserError(f"{args.search}: {error}") from None
    first = trials[0].config
    open_blend(first.data, first.train.seed, first.model.num_tokens, first.model.filler_id)  # refused before any run
    writable_file(args.out / "results.json", "--out")
    with hold_folder(args.out, f"--out {args.out}"):
        return _search(trials, search.window, args.backend, args.out)


def _search(trials: Sequence[Trial], window: int, backend: str, out: Path) -> int:
    prepare(trials, backend)
    waiting = [t for t in trials if (result := result_of(t)) is None or result.state == FAILED]
    for trial in trials:
        if trial not in waiting:
            forget_checkpoints(trial.folder)  # left by a search that was killed before it removed them
    before = len(trials) - len(waiting)
    print(f"{len(trials)} trials with {backends.TITLES[backend]}, {before} of them ended before", flush=True)
    progress = Progress(waiting)
    for trial in waiting:
        progress.begin(trial)
        result = run_trial(backend, trial, progress.look)
        if result is None:
            print(f"interrupted in {trial.name}; the same command continues from there", file=sys.stderr)
            return 130
        if tells_of_full_disk(result.reason):
            return 2  # the launch has said so in its line; every further trial would end alike
        progress.end(result.state if not result.reason else f"{result.state}: {result.reason}")
        report(trials, window, out)
    print(report(trials, window, out, plots=True))
    return 0


def report(trials: Sequence[Trial], window: int, out: Path, plots: bool = False) -> str:
    """Write all result files for the present state of the trials. Returns the text for the terminal."""
    reports = [report_of(trial, window) for trial in trials]
    widths = judge_widths(reports, window)
    write_text(out / "results.csv", results_csv(reports))
    record = json.dumps(to_json(reports, widths, window), indent=1, allow_nan=False)
    write_text(out / "results.json", record + "\n")
    tables = loss_tables(reports, window)
    for name, text in tables.items():
        write_text(out / name, text)
    pictures = [path.name for path in plot(reports, window, out)] if plots else []
    files = ", ".join(["results.csv", "results.json", *tables, *pictures])
    return f"{describe(reports, widths, window)}\n\nwrote {files} in {out}"


class Progress:
    """Progress line of a search: the state of the present trial and the estimated time for the rest.

    On a terminal the line is overwritten; elsewhere lines are printed at growing intervals, as in core.train.progress.
    """

    def __init__(self, trials: Sequence[Trial], stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._trials, self._place = list(trials), -1
        self._started = self._looked = self._printed = time.monotonic()
        self._done = 0.0  # work of the trials that ended in this session
        self._resumed = 0  # steps of the present trial from an earlier session
        self._width = 0

    def begin(self, trial: Trial) -> None:
        """Note the start of ``trial``."""
        self._place = self._trials.index(trial)
        self._resumed = self._step(trial)
        self._show(f"{self._head()}: starting", stay=self._printed == self._started)

    def look(self) -> None:
        """Update the line, at most once a second; may be called often."""
        now = time.monotonic()
        if now - self._looked < 1.0:
            return
        self._looked = now
        trial = self._trials[self._place]
        row = last_row(trial.folder / "metrics.jsonl")
        if row is None:
            return
        steps, loss = trial.config.train.steps, row["loss"]
        shown = "-" if loss is None else f"{loss:.4f}"
        made = max(0, row["step"] - self._resumed) / steps
        text = f"{self._head()}: step {row['step']}/{steps} loss {shown}"
        self._show(f"{text}, {self._left(now, trial.work * made, row['step'] / steps)}", stay=False)

    def end(self, how: str) -> None:
        """Note the end of the present trial; ``how``: its outcome."""
        trial = self._trials[self._place]
        self._done += trial.work * (1 - self._resumed / trial.config.train.steps)
        self._show(f"{self._head()}: {how}, {self._left(time.monotonic(), 0.0, 1.0)}", stay=True)

    def _head(self) -> str:
        return f"trial {self._place + 1}/{len(self._trials)} {self._trials[self._place].name}"

    def _left(self, now: float, present: float, share: float) -> str:
        """Estimate of the remaining time, from the work done in this session and the time it took."""
        after = self._trials[self._place + 1 :]
        rest = sum(trial.work for trial in after) + self._trials[self._place].work * (1 - share)
        done = self._done + present
        if not after and share == 1.0:
            return f"all in {clock(now - self._started)}"
        if done < SOON * self._trials[self._place].work:
            return "time left not known yet"
        return f"about {clock(rest / done * (now - self._started))} left"

    def _step(self, trial: Trial) -> int:
        """Step of the trial's last checkpoint, from which it resumes; 0 without one."""
        saved = sorted(folder.name for folder in trial.folder.glob("step-*"))
        return int(saved[-1].removeprefix("step-")) if saved else 0

    def _show(self, text: str, stay: bool) -> None:
        now = time.monotonic()
        if self._stream.isatty():
            end = "\n" if stay else ""
            print(f"\r{text:<{self._width}}", end=end, file=self._stream, flush=True)
            self._width = 0 if stay else len(text)
        elif stay or now - self._printed >= min(60.0, max(5.0, (now - self._started) / 30)):
            self._printed = now
            print(text, file=self._stream, flush=True)
