"""Evaluation of a run's present weights on its held-out sources, and the best evaluation so far.

With ``tokens`` targets that stand for ``bytes`` of text, and ``loss`` the mean of their token losses (nats):

    perplexity = exp(loss)        bits per byte = loss * tokens / bytes / ln 2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from telechat_twins.core.checkpoint.retention import BEST, best_name
from telechat_twins.core.config import EvalConfig, RunConfig
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.train.heldout.sources import HeldOutSource
from telechat_twins.core.train.metrics import HELD_OUT, Row
from telechat_twins.core.train.stepper import Stepper
from telechat_twins.core.types import JsonObject


def held_out_metrics(
    sources: Sequence[HeldOutSource], stepper: Stepper, global_batch: int, micro_batch: int
) -> dict[str, float]:
    """Loss, perplexity and bits per byte of each source as columns of a row of metrics, equal on all ranks."""
    before, stepper.micro_batch = stepper.micro_batch, micro_batch
    found: dict[str, float] = {}
    for source in sources:
        total = tokens = size = 0.0
        first, count = stepper.share(global_batch)
        for start in range(0, source.rows, global_batch):
            batch = source.batch(start + first, count)
            targets = stepper.count_targets(batch.num_targets)
            size += stepper.count_targets(source.num_bytes(batch))
            if targets:
                total += stepper.held_out_loss(batch, targets) * targets
                tokens += targets
        found |= figures(source.name, total / tokens if tokens else math.nan, tokens, size)
    stepper.micro_batch = before
    return found


def figures(name: str, loss: float, tokens: float, size: float) -> dict[str, float]:
    """The columns of one source."""
    bits = loss * tokens / size / math.log(2) if size else math.nan
    perplexity = math.exp(loss) if loss < 700 else math.inf
    values = {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits}
    return {f"{HELD_OUT}{name}/{key}": value for key, value in values.items()}


def describe(step: int, row: Row) -> str:
    """A line for the console."""
    parts = []
    for key, loss in row.items():
        if key.startswith(HELD_OUT) and key.endswith("/loss"):
            source = key.removesuffix("loss")
            parts.append(
                f"{source.removeprefix(HELD_OUT).rstrip('/')} loss {loss:.4f}, perplexity "
                f"{row[source + 'perplexity']:.4g}, {row[source + 'bits_per_byte']:.4f} bits per byte"
            )
    return f"held out after step {step}: " + "; ".join(parts)


@dataclass
class Best:
    """The best evaluation of a run by ``eval.metric``, lower being better: its value, its step, and the number of
    evaluations since."""

    value: float | None = None
    step: int = 0
    since: int = 0

    def judge(self, value: float, step: int) -> bool:
        """Whether an evaluation is the best so far. One that is not finite never is."""
        if math.isfinite(value) and (self.value is None or value < self.value):
            self.value, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False


class HeldOut:
    """The evaluations of a run. ``sources``: core.train.heldout.sources.open_held_out of its configuration."""

    def __init__(self, config: RunConfig, sources: Sequence[HeldOutSource]) -> None:
        self._config, self._eval, self._sources, self.best = config, config.eval, sources, Best()

    def evaluate(self, row: Row, stepper: Stepper, note: Callable[[str], object]) -> bool:
        """Add the figures to a step's row where an evaluation is due. True where its checkpoint is to be kept as the
        best."""
        given, step, train = self._eval, row["step"], self._config.train
        if given is None or not self._sources or (step != train.steps and (not given.every or step % given.every)):
            return False
        metrics = held_out_metrics(self._sources, stepper, train.global_batch, train.micro_batch)
        row |= metrics
        note(describe(step, metrics))
        value = judged_value(metrics, given)
        if self._compares and not math.isfinite(value):
            note(f"warning: step {step}: eval.metric {given.metric} is {value}, which is never better than another")
        return self.best.judge(value, step) and given.keep_best

    @property
    def _compares(self) -> bool:
        """Whether anything follows from a better or worse evaluation."""
        return self._eval is not None and (self._eval.keep_best or self._eval.patience > 0)

    @property
    def exhausted(self) -> bool:
        """Whether ``eval.patience`` is over."""
        return self._eval is not None and 0 < self._eval.patience <= self.best.since

    @property
    def ending(self) -> str:
        """What precedes the last line of a run that ends early."""
        if not self.exhausted:
            return ""
        if self.best.value is None:
            return f"{self.best.since} evaluations, and none with a finite eval.metric; "
        return f"{self.best.since} evaluations without a better one than that after step {self.best.step}; "

    @property
    def trainer_entries(self) -> JsonObject:
        """What a checkpoint records, for a resumed run to compare with."""
        return {} if self._eval is None else {"held_out": asdict(self.best), "held_out_data": self._digests}

    @property
    def _digests(self) -> list[str]:
        return [source.blend.digest() for source in self._sources]

    def load(self, trainer: JsonObject) -> list[str]:
        """Continue from a checkpoint's record; lines for the log. A run without one begins to compare anew, and so does
        one that judges by another metric or other rows: the numbers before would be of another thing."""
        before = Best(**trainer.get("held_out", {}))
        same = judged_by(trainer["config"]) == judged_by(self._config.to_dict())
        # Checkpoints of earlier versions do not say which contents they were judged on.
        same = same and trainer.get("held_out_data", self._digests) == self._digests
        self.best = before if same else Best()
        if same or before.value is None or not self._compares:
            return []
        return [
            f"warning: eval judges by another metric or other text than before: the best so far, {before.value:.4f} of "
            f"step {before.step}, no longer counts, and keep_best and patience begin anew"
        ]

    def settle(self, folder: Path, step: int, rank: int) -> None:
        """Let the file ``best`` of a run that goes on at ``step`` name the checkpoint that its record says. It may name
        another: of before, where a run was killed between a checkpoint and its mark, or of a later step, where it goes
        on from an earlier checkpoint, and passes that step again."""
        if self._eval is None or not self._eval.keep_best or rank:
            return
        named, best = best_name(folder), f"step-{self.best.step:08d}"
        if self.best.value is not None and (folder / best).is_dir():
            if named != best:
                write_text(folder / BEST, best + "\n")
        elif named is not None and named > f"step-{step:08d}":
            (folder / BEST).unlink()

    @staticmethod
    def mark(folder: Path, checkpoint: Path | None, rank: int) -> None:
        """Let the run's file ``best`` name the checkpoint that has just been saved; rank 0 writes it."""
        if checkpoint is not None and rank == 0:
            write_text(folder / BEST, checkpoint.name + "\n")


def judged_by(config: JsonObject) -> list[object]:
    """What the number of ``judged_value`` depends on besides the weights, in a run's configuration as it is written."""
    given = config.get("eval") or {}
    named = [source.get("name") or Path(source["path"]).name for source in given.get("sources") or []]
    rows = (given.get("batches"), config["train"]["global_batch"], config["data"]["seq_len"])
    return [given.get("metric"), named, *rows]


def judged_value(metrics: Mapping[str, float], config: EvalConfig) -> float:
    """``eval.metric`` of an evaluation: a column of one source, or ``loss``, the mean over the sources."""
    if config.metric != "loss":
        return metrics[HELD_OUT + config.metric]
    losses = [metrics[f"{HELD_OUT}{source.label}/loss"] for source in config.sources]
    return sum(losses) / len(losses)
