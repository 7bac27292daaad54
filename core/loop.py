"""The training loop both backends share: everything about a step except its arithmetic.

A backend's ``train.py`` supplies a ``Stepper`` and calls ``main(Trainer)``. The loop draws batches, sets the learning
rate, judges gradients, and keeps the records (metrics.jsonl, TensorBoard, checkpoints), so that the two backends cannot
drift apart in any of these. Its state (step, samples drawn, health window, loss scale) is small, plain numbers and in
every checkpoint: a run that was interrupted and resumed equals one that was not, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np

from core.batch import Batch
from core.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from core.cli import Parser
from core.config import RunConfig, load_run_config
from core.data.blend import Blend, open_blend
from core.errors import UserError
from core.health import Health, TrainingStopped
from core.loss_scale import DynamicLossScale
from core.metrics import MetricsLog, Row, plot_losses, read_metrics, require_fresh
from core.params import count_parameters
from core.progress import Console
from core.recipe import clip_factor, learning_rate
from core.tensorboard import TensorBoard
from core.worker import run_script

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stepper(Protocol):
    """What a backend does for the loop: a model, its gradients and its optimizer.

    Gradients accumulate over ``micro_step`` calls until ``update`` or ``discard``. Weights change in ``update`` and
    ``load`` only. Names are logical parameter names; arrays cross the border as numpy.
    """

    def micro_step(self, batch: Batch, num_targets: int, loss_scale: float) -> float:
        """Forward and backward of one micro-batch.

        Adds the gradient of ``loss_scale * sum(token losses) / num_targets`` to the fp32 accumulators and returns
        sum(token losses) / num_targets, unscaled: the shares of a step's micro-batches add up to its loss.
        ``num_targets`` counts the targets of the *global* batch.
        """
        ...

    def grad_norm(self, loss_scale: float) -> float:
        """Global L2 norm of the accumulated gradients divided by ``loss_scale``; not finite if any of them is not."""
        ...

    def update(self, lr: float, grad_scale: float) -> None:
        """One AdamW step on the fp32 masters with gradients times ``grad_scale``; then gradients are zero again."""
        ...

    def discard(self) -> None:
        """Zero the accumulated gradients without a step."""
        ...

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, fp32 master) of every parameter."""
        ...

    def optimizer_state(self) -> Iterator[tuple[str, np.ndarray]]:
        """("m.<name>", array) and ("v.<name>", array) of every parameter."""
        ...

    def load(self, checkpoint: Checkpoint, optimizer: bool) -> None:
        """Take weights, and with ``optimizer`` also m, v and ``step`` (trainer.json's ``optimizer_steps``)."""
        ...

    @property
    def step(self) -> int:
        """Updates made so far, for Adam's bias correction. Skipped steps do not count."""
        ...

    def implementation(self) -> dict[str, str]:
        """What runs, for the log: ``backend`` and ``device``, then operator -> implementation."""
        ...


@dataclass
class TrainState:
    """Where a run is, besides weights and optimizer."""

    step: int = 0  # batches drawn, skipped ones included; drives the schedule
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class TrainResult:
    """How ``train`` ended: at which step, with which checkpoint, and the signal that interrupted it, if one did."""

    step: int
    checkpoint: Path
    interrupted_by: int | None = None


def train(
    stepper_factory: Callable[[RunConfig], Stepper],
    config: RunConfig,
    out: str | Path,
    resume: str | None = None,
) -> TrainResult:
    """Train to ``config.train.steps`` and write everything under ``out``.

    ``resume``: None starts anew; "auto" continues from ``out``'s latest checkpoint if there is one; otherwise a
    checkpoint or run folder, of either backend. Writes metrics.jsonl, tensorboard/, loss.png and step-*/ checkpoints.
    Raises UserError before the model is built for what the user can mend, TrainingStopped when the numbers go wrong.
    SIGINT or SIGTERM ends the run after the current step with a checkpoint; a second signal kills at once.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); give another folder") from None
    blend = open_blend(config.data, config.train.seed, config.model.vocab_size, config.model.pad_token_id)
    checkpoint = _checkpoint_to_resume(out, resume)
    if checkpoint is not None:
        _require_same_model(checkpoint, config)
    stepper = stepper_factory(config)
    run = _Run(stepper, config, out, blend)
    if checkpoint is not None:
        run.load(checkpoint)
    return run.go()


class _Run:
    """One training run in one process: the loop's state and its outputs."""

    def __init__(self, stepper: Stepper, config: RunConfig, out: Path, blend: Blend) -> None:
        self.stepper, self.config, self.out, self.blend = stepper, config, out, blend
        self.state = TrainState()
        self.health = Health(config.health)
        self.loss_scale = DynamicLossScale() if config.train.precision == "fp16" else None
        self.saved: Path | None = None
        self.notes: list[str] = []

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue where ``checkpoint`` was taken; notes for the log say what differs from the run that wrote it."""
        trainer = checkpoint.trainer
        if trainer is None:
            raise UserError(
                f"{checkpoint.path}: holds weights but no trainer.json; only a training run's checkpoint resumes"
            )
        self.stepper.load(checkpoint, optimizer=True)
        if self.stepper.step != trainer["optimizer_steps"]:
            raise RuntimeError(f"stepper is at update {self.stepper.step}, checkpoint at {trainer['optimizer_steps']}")
        self.state = TrainState(trainer["step"], trainer["samples"], trainer["tokens"])
        self.health.load(trainer["health"])
        if self.loss_scale is not None and trainer["loss_scale"] is not None:
            self.loss_scale = DynamicLossScale.from_dict(trainer["loss_scale"])
        self.notes.append(f"resumed from {checkpoint.path} (step {self.state.step}, written by {trainer['backend']})")
        if trainer["data_digest"] != self.blend.digest():
            self.notes.append("warning: the data differs from what this checkpoint was trained on")
        for line in _differences(trainer["config"], self.config.to_dict()):
            self.notes.append(f"warning: changed since the checkpoint: {line}")
        if checkpoint.path.resolve().parent == self.out.resolve():
            self.saved = checkpoint.path

    def go(self) -> TrainResult:
        """Run from the present state to the end, an interruption or a stop."""
        total = self.config.train.steps
        console = Console(total, self.state.step)
        for line in (*_header(self.stepper, self.config, self.blend, self.state), *self.notes):
            console.note(line)
        metrics_path = self.out / "metrics.jsonl"
        with _Signals() as signals, MetricsLog(metrics_path, self.state.step) as log:
            board = TensorBoard(self.out / "tensorboard", self.state.step)
            try:
                while self.state.step < total and signals.caught is None:
                    row = self.one_step(console)
                    log.append(row)
                    board.step(row)
                    console.step(row)
                    every = self.config.checkpoint.every
                    if every and self.state.step % every == 0:
                        self.save()
                if self.saved is None or self.saved.name != _folder_name(self.state.step):
                    self.save()
            except TrainingStopped as stop:
                raise TrainingStopped(f"{stop}. {self._way_back()}") from None
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise
                raise UserError(
                    f"{self.out}: the disk is full ({error.strerror}) after step {self.state.step}; "
                    f"free some space and go on with --resume auto. {self._way_back()}"
                ) from None
            finally:
                board.close()
                console.close()
                self._plot(metrics_path)
            assert self.saved is not None
            if signals.caught is not None:
                console.note(
                    f"stopped by {signal.Signals(signals.caught).name} after step {self.state.step}; "
                    f"saved {self.saved}. Go on with: --resume auto"
                )
            else:
                console.note(f"finished {self.state.step} steps; checkpoint {self.saved}; plot {self.out / 'loss.png'}")
            return TrainResult(self.state.step, self.saved, signals.caught)

    def one_step(self, console: Console) -> Row:
        """Draw a global batch, train on it, advance; returns the step's row of metrics."""
        train, state = self.config.train, self.state
        started = time.perf_counter()
        lr = learning_rate(self.config.optim, train.steps, state.step)
        batch = self.blend.batch(state.samples, train.global_batch)
        row: Row = {"step": state.step + 1, "loss": None, "grad_norm": None, "lr": lr}
        if self.loss_scale is not None:
            row["loss_scale"] = self.loss_scale.scale
        if batch.num_targets:
            skipped = self._accumulate_and_update(batch, lr, row, console)
        else:
            skipped = True
            console.note(f"warning: step {state.step + 1}: no position of this batch counts in the loss; skipped")
        seconds = time.perf_counter() - started
        self.state = TrainState(
            state.step + 1, state.samples + train.global_batch, state.tokens + int(batch.input_ids.size)
        )
        row |= {"tokens": self.state.tokens, "tokens_per_s": batch.input_ids.size / seconds, "step_ms": seconds * 1000}
        return row | ({"skipped": True} if skipped else {})

    def _accumulate_and_update(self, batch: Batch, lr: float, row: Row, console: Console) -> bool:
        """Gradients over the micro-batches, verdict, update. Fills loss and norm into ``row``; True if skipped."""
        train, step = self.config.train, self.state.step + 1
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        # One divisor for the whole global batch: with masked targets, a mean of micro-batch means is another number.
        num_targets = batch.num_targets
        loss = 0.0
        for start in range(0, train.global_batch, train.micro_batch):
            loss += self.stepper.micro_step(batch.rows(start, start + train.micro_batch), num_targets, scale)
        norm = self.stepper.grad_norm(scale)
        row["loss"], row["grad_norm"] = loss, norm

        if self.loss_scale is not None and math.isfinite(loss) and not math.isfinite(norm):
            self.stepper.discard()
            if not self.loss_scale.overflow():
                raise TrainingStopped(
                    f"training stopped at step {step}: fp16 gradients overflow even with loss scale {scale:g}; "
                    "use precision bf16 or a lower learning rate"
                )
            console.note(
                f"step {step}: fp16 gradients overflowed; skipped, loss scale {scale:g} -> {self.loss_scale.scale:g}"
            )
            return True

        before = self.health.to_dict()
        verdict = self.health.judge(loss, norm)
        if verdict.action == "stop":
            self.stepper.discard()
            if math.isfinite(loss) and math.isfinite(norm):
                # A spike: the weights are still good, so keep the work up to here. After a non-finite loss they are
                # suspect, and a checkpoint of them could push a good one out of keep_last.
                self.health.load(before)
                if self.state.step and (self.saved is None or self.saved.name != _folder_name(self.state.step)):
                    self.save()
            # The same batch comes again after a resume, so say how to get past it.
            past = "; --set health.spike_policy=skip passes it" if math.isfinite(loss) and math.isfinite(norm) else ""
            raise TrainingStopped(f"training stopped at step {step}: {verdict.reason}{past}")
        if verdict.action == "skip":
            self.stepper.discard()
            console.note(f"warning: step {step}: {verdict.reason}; skipped")
        else:
            if verdict.action == "warn":
                console.note(f"warning: step {step}: {verdict.reason}")
            self.stepper.update(lr, clip_factor(norm, self.config.optim.clip_grad) / scale)
        if self.loss_scale is not None:
            self.loss_scale.good()
        return verdict.action == "skip"

    def save(self) -> None:
        """A checkpoint of the present state under ``out``."""
        state = self.state
        trainer: dict[str, Any] = {
            **dataclasses.asdict(state),
            "optimizer_steps": self.stepper.step,
            "data_digest": self.blend.digest(),
            "loss_scale": self.loss_scale.to_dict() if self.loss_scale else None,
            "health": self.health.to_dict(),
            # The only randomness is the initial weights and the data order, both functions of this seed and a counter.
            "seed": self.config.train.seed,
            "backend": self.stepper.implementation().get("backend", "unknown"),
            "config": self.config.to_dict(),
        }
        self.saved = save_checkpoint(
            self.out,
            state.step,
            model={"config": self.config.model.to_dict()},
            weights=self.stepper.weights(),
            optimizer=self.stepper.optimizer_state(),
            trainer=trainer,
            keep_last=self.config.checkpoint.keep_last,
            assets=[self.blend.tokenizer_path()],
        )

    def _way_back(self) -> str:
        if self.saved is None:
            return "No checkpoint had been saved (set checkpoint.every)"
        return f"The last checkpoint is intact: {self.saved}"

    def _plot(self, metrics_path: Path) -> None:
        rows = read_metrics(metrics_path)
        # A picture that does not fit on the disk must not hide why training ended.
        with contextlib.suppress(OSError):
            if rows:
                plot_losses({self.out.name: rows}, self.out / "loss.png", f"Training: {self.out.name}")


class _Signals:
    """While active, the first SIGINT or SIGTERM is remembered in ``caught`` and the next one has its default, deadly
    effect: done by the kernel and not by Python, so that it also ends a step that hangs inside a framework."""

    caught: int | None = None

    def __enter__(self) -> _Signals:
        # Python allows handlers in the main thread only; a run in another thread is its owner's to interrupt.
        watched = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._previous = {s: signal.signal(s, self._catch) for s in watched}
        return self

    def _catch(self, number: int, _: FrameType | None) -> None:
        self.caught = number
        for s in self._previous:
            signal.signal(s, signal.SIG_DFL)
        # os.write, not print: a print could be interrupted inside another one, which Python forbids.
        os.write(
            2, f"\n{signal.Signals(number).name}: finishing this step and saving; once more to stop at once\n".encode()
        )

    def __exit__(self, *_: object) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _checkpoint_to_resume(out: Path, resume: str | None) -> Checkpoint | None:
    if resume == "auto":
        return open_checkpoint(out) if (out / "latest").exists() else None
    if resume is not None:
        checkpoint = open_checkpoint(resume)
        if checkpoint.path.resolve().parent != out.resolve():
            require_fresh(out)
        return checkpoint
    require_fresh(out)
    return None


def _require_same_model(checkpoint: Checkpoint, config: RunConfig) -> None:
    differing = _differences(checkpoint.model["config"], config.model.to_dict())
    if differing:
        raise UserError(
            f"model: not the model of {checkpoint.path}: {'; '.join(differing[:3])}; use the config it was trained with"
        )


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``path: old -> new`` for every leaf that differs between two nested mappings."""
    lines = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def _header(stepper: Stepper, config: RunConfig, blend: Blend, state: TrainState) -> list[str]:
    """What is about to run, one fact a line."""
    implementation = dict(stepper.implementation())
    parameters = count_parameters(config.model)
    train, seq_len = config.train, config.data.seq_len
    left = train.steps - state.step
    facts: dict[str, str] = {
        "backend": implementation.pop("backend", "unknown"),
        "device": implementation.pop("device", "unknown"),
        "precision": train.precision,
        "parameters": f"{parameters:,}",
        **implementation,
        "data": f"{sum(blend.num_samples):,} samples of {seq_len} tokens, digest {blend.digest()[:12]}",
        "plan": f"{left:,} of {train.steps:,} steps, each {train.global_batch} x {seq_len} tokens in micro-batches of "
        f"{train.micro_batch}: {left * train.global_batch * seq_len:,} tokens to go",
    }
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    return lines + [f"{'':<{width}}  {line}" for line in blend.summary().splitlines()]


def launched_world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun or msrun told this process; (0, 1) without a launcher."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("RANK_ID", "RANK_SIZE"), ("MS_NODE_ID", "MS_WORKER_NUM")):
        if size in os.environ:
            given = os.environ.get(rank, "0")
            return int(given) if given.isdigit() else 0, int(os.environ[size])
    return 0, 1


def parser() -> argparse.ArgumentParser:
    """The arguments of both backends' train.py."""
    made = Parser(prog="train.py", description="Train from one YAML config.")
    made.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    made.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override, e.g. train.steps=100",
    )
    made.add_argument("--out", metavar="DIR", help="where everything is written (default: runs/<config's name>)")
    made.add_argument(
        "--resume", metavar="auto|DIR", help="auto: --out's latest checkpoint, if any; DIR: that checkpoint"
    )
    return made


def main(stepper_factory: Callable[[RunConfig], Stepper], argv: list[str] | None = None) -> int:
    """What a backend's train.py does: parse ``argv``, train, return the exit code.

    0 done; 2 a mistake of the user's (one line); 130 or 143 interrupted, with a checkpoint. Training that stopped
    itself leaves through SystemExit with its message, which Python prints before it exits with 1.
    """

    def run() -> int:
        args = parser().parse_args(argv)
        world = launched_world()[1]
        if world > 1:
            raise UserError(f"--nproc: launched with {world} processes, but training runs in one; use --nproc 1")
        config = load_run_config(args.config, args.set)
        out = args.out or Path("runs") / Path(args.config).stem
        try:
            result = train(stepper_factory, config, out, args.resume)
        except TrainingStopped as stop:
            raise SystemExit(str(stop)) from None
        return 0 if result.interrupted_by is None else 128 + result.interrupted_by

    return run_script(run)
