"""Train with PyTorch: ``tele train --backend pt``, or torchrun on this file. The loop itself is core.loop."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch

from core.batch import Batch
from core.checkpoint import Checkpoint
from core.config import RunConfig
from core.init import init_tensor
from core.loop import main
from core.params import parameter_table
from pt_reference import ops
from pt_reference.forward import batch_logits, batch_loss
from pt_reference.model import Decoder, named_weights
from pt_reference.optim import AdamW


class Trainer:
    """core.loop.Stepper in PyTorch."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model = Decoder(config.model, config.train.precision, config.train.recompute).to(ops.device()).train()
        self.optimizer = AdamW(
            named_weights(self.model), parameter_table(config.model), config.optim, self.model.dtypes.master
        )
        self.optimizer.load_masters(lambda name: init_tensor(name, config.model, config.train.seed))

    def micro_step(self, batch: Batch, num_targets: int, loss_scale: float) -> float:
        loss = batch_loss(batch_logits(self.model, batch), batch, num_targets)
        (loss * loss_scale).backward()
        self.optimizer.accumulate()
        return loss.item()

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
            "backend": f"PyTorch {torch.__version__}",
            "device": torch.cuda.get_device_name() if ops.device().type == "cuda" else "cpu",
            "attention": "torch.nn.functional.scaled_dot_product_attention",
            "adamw": "torch.optim.AdamW(fused=True)",
        }


if __name__ == "__main__":
    sys.exit(main(Trainer))
