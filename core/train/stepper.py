"""The protocol between the training loop and a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from telechat_twins.core.checkpoint.read import Checkpoint, TensorPiece
from telechat_twins.core.checkpoint.source import ReadBox
from telechat_twins.core.config import RunConfig
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.types import JsonObject


class Stepper(Protocol):
    """A backend on one rank, as the loop drives it: its part of the model, of the gradients and of the optimizer.

    Gradients accumulate over ``gradients`` calls until ``update`` or ``discard``. Weights change in ``update`` and
    ``load`` only. Names are logical parameter names; arrays are passed as numpy. With several ranks, all call the
    same methods in the same order, and every returned number is the same on all of them.
    """

    micro_batch: int
    """Rows of a forward pass, at first ``train.micro_batch``; the loop changes it between steps."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        ...

    @property
    def world(self) -> int:
        """Number of ranks of the training run; 1 for a single process."""
        ...

    def agree(self, values: list[float], op: str) -> list[float]:
        """The "max", "sum" or "min" of each number over all ranks, exact in float64; the values, for one process."""
        ...

    def share(self, global_batch: int) -> tuple[int, int]:
        """(first, count) of the rows of a global batch that this rank must load; for a single process, all of them."""
        ...

    def count_targets(self, num_targets: int) -> int:
        """Sum of the targets of the rows of each data-parallel rank: those of the global batch."""
        ...

    def gradients(self, batch: Batch, num_targets: int, loss_scale: float) -> float:
        """Forward and backward of this rank's rows of a global batch, in micro-batches.

        Adds the gradient of ``loss_scale * loss`` to the fp32 accumulators and returns the loss over the *global*
        batch, unscaled: sum(weight * token loss) / num_targets, or with preference pairs sum(pair loss) / num_targets.
        ``num_targets``: ``Batch.num_terms`` of the global batch.
        """
        ...

    @property
    def preference_metrics(self) -> dict[str, float]:
        """Of the last ``gradients`` of preference pairs, means over the global batch: ``reward_margin`` and
        ``reward_accuracy`` (share of pairs whose chosen answer has the higher reward)."""
        ...

    def log_probs(self, batch: Batch, base: bool = False) -> list[float]:
        """Log-probability (nats) of each row's targets under the present weights, of this rank's rows.

        base: under the base of a run with ``lora``, without its adapters. Dropout is off in either case. Returns those
        of all data-parallel ranks' rows, which must be equally many, one rank's after another's.
        """
        ...

    def held_out_loss(self, batch: Batch, num_targets: int) -> float:
        """Mean token loss of a global batch under the present weights, of which this rank gives its rows; forward only,
        without dropout. ``num_targets``: of the global batch."""
        ...

    def set_mask(self, c: float | None) -> None:
        """Mask value of a growing model (``config.model.growth``) from now on; None removes the masks."""
        ...

    def grad_norm(self, loss_scale: float) -> float:
        """Global L2 norm of the accumulated gradients divided by ``loss_scale``; not finite if any of them is not."""
        ...

    def update(self, lr: float, grad_scale: float) -> None:
        """One AdamW step on the fp32 masters with gradients times ``grad_scale``; then gradients are forgotten.

        ``lr`` is that of vector-like parameters; core.train.recipe.class_rate has that of the others.
        """
        ...

    def discard(self) -> None:
        """Zero the accumulated gradients without a step."""
        ...

    def weights(self) -> Iterator[TensorPiece]:
        """The fp32 masters that this rank owns; every element of the model is owned by exactly one rank."""
        ...

    def optimizer_state(self) -> Iterator[TensorPiece]:
        """``m.<name>`` and ``v.<name>`` of what this rank owns."""
        ...

    def load_weights(self, read: ReadBox) -> None:
        """Take weights from ``read(name, box)``, of what this rank holds; optimizer and step stay new."""
        ...

    def load(self, checkpoint: Checkpoint, optimizer: bool) -> None:
        """Load weights, and with ``optimizer`` also m, v and ``step`` (trainer.json's ``optimizer_steps``); only this
        rank's part is read."""
        ...

    @property
    def step(self) -> int:
        """Updates made so far, for Adam's bias correction. Skipped steps do not count."""
        ...

    def device_peak(self) -> int:
        """Most bytes that tensors have taken on this rank's accelerator so far; 0 on a CPU."""
        ...

    def profiled(self, folder: Path, steps: int) -> AbstractContextManager[Callable[[], object]]:
        """The framework's profiler over ``steps`` steps, each of which ends with a call of what this yields. On leaving
        it writes the trace of this rank into ``folder``."""
        ...

    def implementation(self) -> dict[str, str]:
        """Entries for the log: ``backend`` and ``device``, then operator -> implementation."""
        ...


@dataclass
class TrainState:
    """Progress of a run, besides weights and optimizer."""

    step: int = 0  # batches drawn, skipped ones included; drives the schedule
    samples: int = 0
    tokens: int = 0


class StepRecorder(Protocol):
    """Recorder of what chosen steps of a run compute (core.parity.record.recorder); all ranks call it alike, in every
    step.

    ``last``: the step after which the run ends, without a checkpoint; None: it ends as any run does.
    """

    last: int | None

    def before(self, stepper: Stepper, step: int, batch: Batch, first: int, rows: int, model: JsonObject) -> None:
        """A step, from 1, begins: this rank's rows of its batch, the first of them number ``first`` of ``rows``; the
        model's config with its present masks."""
        ...

    def computed(self, loss: float, norm: float, loss_scale: float) -> None:
        """Loss and gradients are known, and the gradients still accumulated, times ``loss_scale``."""
        ...

    def after(self, row: JsonObject) -> str | None:
        """The step has ended with this row of metrics; a line for the user, if there is anything to say."""
        ...


class OpenRecorder(Protocol):
    """Opens the recorder of a run in the folder ``out``; None where nothing is recorded."""

    def __call__(self, config: RunConfig, out: Path) -> StepRecorder | None: ...
