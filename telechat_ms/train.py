"""Train with MindSpore: ``tele train --backend ms``, or msrun on this file. The loop itself is core.loop."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import telechat_ms  # isort: skip  # noqa: F401  (prepares the process; must come before mindspore)
import mindspore as ms
import numpy as np
from mindspore.communication import init

from core.batch import Batch
from core.checkpoint import Checkpoint
from core.config import RunConfig
from core.init import init_tensor
from core.loop import main
from core.params import parameter_table
from telechat_ms.forward import batch_logits, batch_loss
from telechat_ms.model import Decoder, named_weights
from telechat_ms.optim import AdamW


class Trainer:
    """core.loop.Stepper in MindSpore."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model = Decoder(config.model, config.train.precision, config.train.recompute).set_train()
        self.optimizer = AdamW(
            named_weights(self.model), parameter_table(config.model), config.optim, self.model.dtypes.master
        )
        self.optimizer.load_masters(lambda name: init_tensor(name, config.model, config.train.seed))
        weights = list(self.optimizer.weights.values())
        self._gradients = ms.value_and_grad(self._scaled_loss, None, weights, has_aux=True)

    def _scaled_loss(self, batch: Batch, num_targets: int, loss_scale: float) -> tuple[ms.Tensor, ms.Tensor]:
        loss = batch_loss(batch_logits(self.model, batch), batch, num_targets)
        return loss * loss_scale, loss

    def micro_step(self, batch: Batch, num_targets: int, loss_scale: float) -> float:
        (_, loss), gradients = self._gradients(batch, num_targets, loss_scale)
        self.optimizer.accumulate(gradients)
        return float(loss.asnumpy())

    def grad_norm(self, loss_scale: float) -> float:
        return self.optimizer.grad_norm() / loss_scale

    def update(self, lr: float, grad_scale: float) -> None:
        self.optimizer.step(lr, grad_scale)

    def discard(self) -> None:
        self.optimizer.discard()

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        return self.optimizer.export_masters()

    def optimizer_state(self) -> Iterator[tuple[str, np.ndarray]]:
        return self.optimizer.export_state()

    def load(self, checkpoint: Checkpoint, optimizer: bool) -> None:
        self.optimizer.load_masters(lambda name: checkpoint.read("weights", name))
        if optimizer:
            steps = checkpoint.trainer["optimizer_steps"]
            self.optimizer.load_state(lambda key: checkpoint.read("optimizer", key), steps)

    @property
    def step(self) -> int:
        return self.optimizer.step_count

    def implementation(self) -> dict[str, str]:
        return {
            "backend": f"MindSpore {ms.__version__}",
            "device": str(ms.get_context("device_target")),
            "attention": "matrix products and softmax",
            "adamw": "mindspore.ops.Adam on flat masters",
        }


def _join_cluster() -> None:
    """Meet the other processes of msrun. Its scheduler runs this file too and stays inside ``init`` until the end."""
    if "MS_ROLE" in os.environ:
        init()


if __name__ == "__main__":
    _join_cluster()
    sys.exit(main(Trainer))
