"""Training entry point in PyTorch: ``tele train --backend pt``, or torchrun on this file.

The loop is core.train.loop, most of the Stepper core.train.trainer.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import torch

from telechat_twins.convert.initial import open_initial
from telechat_twins.core.config import RunConfig
from telechat_twins.core.parity.record.recorder import open_recorder
from telechat_twins.core.parity.record.sums import provide_sums
from telechat_twins.core.train.script import main
from telechat_twins.core.train.trainable import first_trained_stage, trainable
from telechat_twins.core.train.trainer import BaseTrainer, See
from telechat_twins.kernels.pytorch import ops as kernels
from telechat_twins.kernels.pytorch.room import keep_freed
from telechat_twins.kernels.sums import open_sums
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.collectives import agree
from telechat_twins.pt_reference.mesh import leave
from telechat_twins.pt_reference.model import Decoder
from telechat_twins.pt_reference.observe import observed
from telechat_twins.pt_reference.optim import AdamW
from telechat_twins.pt_reference.parallelize import open_mesh, parallelize
from telechat_twins.pt_reference.pipeline import Pipeline
from telechat_twins.pt_reference.weights import named_weights


class Trainer(BaseTrainer[Decoder]):
    """core.train.stepper.Stepper in PyTorch."""

    def __init__(self, config: RunConfig) -> None:
        kernels.select(dataclasses.asdict(config.kernels))
        on_cpu = ops.device().type == "cpu"
        provide_sums(partial(open_sums, "torch" if on_cpu else ""))
        if on_cpu:
            keep_freed()
        mesh = open_mesh(config.model, config.parallel)
        stages, table = parallelize(
            config.model,
            mesh,
            config.train.precision,
            config.train.recompute,
            config.lora,
            lambda here: trainable(here, config),
        )
        updated = trainable(table, config)
        weights = {n: weight for stage in stages for n, weight in named_weights(stage).items() if n in updated}
        optimizer = AdamW(weights, updated, config.optim, stages[0].dtypes.master, mesh)
        pipeline = Pipeline(stages, mesh, first_trained_stage(config))
        super().__init__(config, mesh, stages, table, pipeline, optimizer, agree)

    def observed(self, see: See) -> AbstractContextManager[None]:
        return observed(self.stages, see)

    def device_peak(self) -> int:
        return torch.cuda.max_memory_allocated() if ops.device().type == "cuda" else 0

    @contextmanager
    def profiled(self, folder: Path, steps: int) -> Iterator[Callable[[], object]]:
        activities = torch.profiler.supported_activities()
        with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
            yield profiler.step
        profiler.export_chrome_trace(str(folder / f"rank-{self.rank}.json"))

    def implementation(self) -> dict[str, str]:
        return {
            "backend": f"PyTorch {torch.__version__}",
            "device": torch.cuda.get_device_name() if ops.device().type == "cuda" else "cpu",
            "operators": "; ".join(kernels.described(self.stages[0].dtypes.master)),
        }


if __name__ == "__main__":
    code = main(Trainer, open_initial=open_initial, open_recorder=open_recorder)
    leave()  # not after an error: closed connections would make other ranks fail first
    sys.exit(code)
