"""Train with PyTorch: ``tele train --backend pt``, or torchrun on this file. The loop itself is core.train.loop."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch

from telechat_twins.core.checkpoint.read import Checkpoint, TensorPiece
from telechat_twins.core.config import RunConfig
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.growth import read_history
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.parallel.sequence import split_batch
from telechat_twins.core.train.loop import main
from telechat_twins.kernels.pytorch import ops as kernels
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.collectives import agree
from telechat_twins.pt_reference.mesh import leave
from telechat_twins.pt_reference.model import named_weights
from telechat_twins.pt_reference.optim import AdamW
from telechat_twins.pt_reference.parallelize import open_mesh, parallelize
from telechat_twins.pt_reference.pipeline import Pipeline


class Trainer:
    """core.train.stepper.Stepper in PyTorch."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        kernels.select(dataclasses.asdict(config.kernels))
        self.mesh = open_mesh(config.model, config.parallel)
        self.stages, self.table = parallelize(config.model, self.mesh, config.train.precision, config.train.recompute)
        self.pipeline = Pipeline(self.stages, self.mesh)
        weights = {name: weight for stage in self.stages for name, weight in named_weights(stage).items()}
        self.optimizer = AdamW(weights, self.table, config.optim, self.stages[0].dtypes.master, self.mesh)
        self.optimizer.load_masters(lambda name, box: init_tensor(name, config.model, config.train.seed, box))

    @property
    def rank(self) -> int:
        return self.mesh.rank

    @property
    def world(self) -> int:
        return self.mesh.layout.world

    def share(self, global_batch: int) -> tuple[int, int]:
        count = global_batch // self.mesh.layout.dp
        return self.mesh.coord.dp * count, count

    def count_targets(self, num_targets: int) -> int:
        return round(agree([num_targets], self.mesh.dp, "sum")[0])

    def agree(self, values: list[float], op: str) -> list[float]:
        return agree(values, self.mesh.world, op)

    def gradients(self, batch: Batch, num_targets: int, loss_scale: float, **options: Any) -> float:
        """core.train.stepper.Stepper.gradients; ``options`` are those of Pipeline.run."""
        self.optimizer.refresh()
        size = self.config.train.micro_batch
        pieces = [
            split_batch(batch.rows(first, first + size), self.mesh.layout, self.mesh.coord.cp)
            for first in range(0, len(batch.input_ids), size)
        ]
        self.optimizer.gradients.expect(len(pieces))
        loss = self.pipeline.run(pieces, num_targets, loss_scale, **options)
        if options.get("backward", True):
            self.optimizer.reduce()
        # Tensor ranks computed the same sum; the ranks before the head computed none.
        return self.agree([loss if self.mesh.coord.tp == 0 else 0.0], "sum")[0]

    def set_mask(self, c: float | None) -> None:
        for stage in self.stages:
            stage.set_mask(c)

    def grad_norm(self, loss_scale: float) -> float:
        return self.optimizer.grad_norm() / loss_scale

    def update(self, lr: float, grad_scale: float) -> None:
        self.optimizer.step(lr, grad_scale)

    def discard(self) -> None:
        self.optimizer.discard()

    def weights(self) -> Iterator[TensorPiece]:
        return self.optimizer.export_masters()

    def optimizer_state(self) -> Iterator[TensorPiece]:
        return self.optimizer.export_state()

    def load(self, checkpoint: Checkpoint, optimizer: bool) -> None:
        self.optimizer.load_masters(lambda name, box: checkpoint.read("weights", name, box))
        if optimizer:
            assert checkpoint.trainer is not None  # a step folder of a run, which the caller has checked
            steps = checkpoint.trainer["optimizer_steps"]
            history = read_history(checkpoint.model, str(checkpoint.path / "model.json"))
            self.optimizer.load_state(lambda key, box: checkpoint.read("optimizer", key, box), steps, history)

    @property
    def step(self) -> int:
        return self.optimizer.step_count

    def implementation(self) -> dict[str, str]:
        return {
            "backend": f"PyTorch {torch.__version__}",
            "device": torch.cuda.get_device_name() if ops.device().type == "cuda" else "cpu",
            "operators": "; ".join(kernels.described(self.stages[0].dtypes.master)),
        }


if __name__ == "__main__":
    code = main(Trainer)
    leave()  # after an error the connections stay open until the process ends, lest the others seem to fail first
    sys.exit(code)
