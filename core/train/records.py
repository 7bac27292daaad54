"""Outputs of a run other than checkpoints (console, metrics.jsonl, trackers, plot), and its signal handlers."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType

from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.launch.worker import relayed_signal
from telechat_twins.core.model.masks import describe as describe_growth
from telechat_twins.core.model.params import count_parameters
from telechat_twins.core.parallel.schedule import bubble_formula
from telechat_twins.core.train.metrics import MetricsLog, Row, plot_losses, read_metrics
from telechat_twins.core.train.progress import Console
from telechat_twins.core.train.run.state import Run
from telechat_twins.core.train.stages import Stage, StagedData, marks, stage_of
from telechat_twins.core.train.stepper import Stepper, TrainState
from telechat_twins.core.train.track.open import open_trackers
from telechat_twins.core.train.track.tensorboard import TensorBoard
from telechat_twins.core.train.watch.environment import write_environment
from telechat_twins.core.train.watch.refresh import PlotRefresher


class Records:
    """What a run leaves besides checkpoints: lines on the console, metrics.jsonl, config and versions, trackers, plot.

    Only rank 0 (``active``) keeps them. ``lines`` are shown first.
    """

    def __init__(self, run: Run, total: int, active: bool, lines: tuple[str, ...]) -> None:
        self._out, self._active, self._marks, done = run.out, active, marks(run.stages), run.state.step
        if not active:
            return
        self._console = Console(total, done)
        for line in lines:
            self.note(line)
        self._log = MetricsLog(run.out / "metrics.jsonl", done)
        write_environment(run.out, run.config, run.stepper.implementation(), done)
        self._trackers = open_trackers(run.config, run.out, done, self.note)
        self._plot = PlotRefresher(run.out, self._marks)

    def note(self, text: str) -> None:
        """A line that stays on the console."""
        if self._active:
            self._console.note(text)

    def step(self, row: Row) -> None:
        """Show and keep one step."""
        if self._active:
            self._console.measure(row)
            row["eta_s"] = self._console.seconds_left()
            self._log.append(row)
            for tracker in self._trackers:
                tracker.step(row)
            self._console.step(row)
            self._plot.look()

    def more(self, step: int, row: Row) -> None:
        """Keep further figures of a step that has been recorded, as rows of their own; texts go to TensorBoard. Those
        that an interrupted process has kept already are left out."""
        if self._active:
            before = self._log.kept if self._log.kept.get("step") == step else {}
            texts = {key: value for key, value in row.items() if isinstance(value, str)}
            for tracker in self._trackers:
                if texts and isinstance(tracker, TensorBoard):
                    tracker.texts(step, texts)
            numbers = {k: v for k, v in row.items() if k not in texts and not (k in before and before[k] == v)}
            if numbers:
                self._log.append({"step": step, **numbers})
                for tracker in self._trackers:
                    tracker.step({"step": step, **numbers})

    def close(self) -> None:
        """End the files and draw the plot."""
        if not self._active:
            return
        for tracker in self._trackers:
            tracker.close()
        self._plot.close()
        self._console.close()
        self._log.close()
        # A picture that does not fit on the disk, or a file that was taken away, must not hide why training ended.
        with contextlib.suppress(OSError, UserError):
            if rows := read_metrics(self._out):
                plot_losses({self._out.name: rows}, self._out / "loss.png", f"Training: {self._out.name}", self._marks)


class Signals:
    """While active, the first SIGINT or SIGTERM is remembered in ``caught`` and the next one has its default, deadly
    effect: done by the kernel and not by Python, so that it also ends a step that hangs inside a framework.

    ``relayed``: a launcher passed it on. It sends SIGINT whatever it was sent, which ``caught`` then is.
    """

    caught: int | None = None
    relayed = False

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet

    def __enter__(self) -> Signals:
        # Python allows handlers in the main thread only; a run in another thread is its owner's to interrupt.
        watched = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._previous = {s: signal.signal(s, self._catch) for s in watched}
        return self

    def _catch(self, number: int, _: FrameType | None) -> None:
        passed_on = relayed_signal() if number == signal.SIGINT else None
        self.caught, self.relayed = passed_on or number, passed_on is not None
        name = signal.Signals(self.caught).name
        for s in self._previous:
            signal.signal(s, signal.SIG_DFL)
        if self._quiet:
            return
        # os.write, not print: a print could be interrupted inside another one, which Python forbids.
        os.write(2, f"\n{name}: finishing this step and saving; once more to stop at once\n".encode())

    def __exit__(self, *_: object) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)


def header(
    stepper: Stepper, config: RunConfig, stages: Sequence[Stage], data: StagedData, state: TrainState, end: int
) -> list[str]:
    """What is about to run, up to step ``end``, one fact a line."""
    now = stage_of(stages, state.step)
    blend = data.of(now)
    implementation = dict(stepper.implementation())
    parameters = count_parameters(config.model)
    train = config.train
    left = max(0, end - state.step)
    tokens = sum(max(0, min(s.end, end) - max(s.begin, state.step)) * s.tokens for s in stages)
    facts: dict[str, str] = {
        "backend": implementation.pop("backend", "unknown"),
        "device": implementation.pop("device", "unknown"),
        **layout_facts(config),
        "precision": train.precision,
        "parameters": f"{parameters:,}",
        **({"growing": describe_growth(config.model)} if config.model.growth is not None else {}),
        **implementation,
        "data": f"{sum(blend.num_samples):,} samples of {now.data.seq_len} tokens, digest {blend.digest()[:12]}",
        "plan": f"{left:,} of {train.steps:,} steps, each {now.label} in micro-batches of {now.micro_batch}"
        f"{' at first' if now is not stages[-1] else ''}: {tokens:,} tokens to go",
    }
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    return lines + [f"{'':<{width}}  {line}" for line in blend.summary().splitlines()]


def layout_facts(config: RunConfig) -> dict[str, str]:
    """How the ranks share the work; nothing to say for one."""
    layout, train = config.parallel, config.train
    if layout.world == 1:
        return {}
    micro_batches = train.global_batch // layout.dp // train.micro_batch
    facts = {
        "layout": f"{layout.name} ({layout.world} ranks: pp {layout.pp} x dp {layout.dp} x cp {layout.cp} x "
        f"tp {layout.tp})",
        "batch": f"{train.global_batch} sequences over {layout.dp} data-parallel ranks, each {micro_batches} "
        f"micro-batches of {train.micro_batch}",
    }
    if layout.pp > 1:
        idle = bubble_formula(layout.schedule, layout.pp, layout.virtual, micro_batches)
        facts["bubble"] = f"{idle:.1%} of a step, by the formula of {layout.schedule} with equal stages"
    return facts
