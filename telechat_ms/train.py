"""Training entry point in MindSpore: ``tele train --backend ms``, or msrun on this file.

The loop is core.train.loop, most of the Stepper core.train.trainer.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import telechat_twins.telechat_ms  # isort: skip  # noqa: F401  (prepares the process; must come before mindspore)
import mindspore as ms
from mindspore import profiler

from telechat_twins.convert.initial import open_initial
from telechat_twins.core.config import RunConfig
from telechat_twins.core.parity.record.recorder import open_recorder
from telechat_twins.core.parity.record.sums import provide_sums
from telechat_twins.core.train.script import main
from telechat_twins.core.train.trainable import first_trained_stage, trainable
from telechat_twins.core.train.trainer import BaseTrainer, See
from telechat_twins.core.train.watch.profile import convert_trace
from telechat_twins.kernels.mindspore import ops as kernels
from telechat_twins.kernels.mindspore.settings import keep_threads
from telechat_twins.kernels.sums import open_sums
from telechat_twins.telechat_ms.collectives import agree
from telechat_twins.telechat_ms.mesh import join, leave
from telechat_twins.telechat_ms.model import Decoder
from telechat_twins.telechat_ms.observe import observed
from telechat_twins.telechat_ms.optim import AdamW
from telechat_twins.telechat_ms.parallelize import open_mesh, parallelize
from telechat_twins.telechat_ms.pipeline import Pipeline
from telechat_twins.telechat_ms.weights import named_weights


class Trainer(BaseTrainer[Decoder]):
    """core.train.stepper.Stepper in MindSpore."""

    def __init__(self, config: RunConfig) -> None:
        kernels.select(dataclasses.asdict(config.kernels))
        on_cpu = ms.get_context("device_target") == "CPU"
        provide_sums(partial(open_sums, "mindspore" if on_cpu else ""))
        mesh = open_mesh(config.model, config.parallel)
        if mesh.layout.world == 1 and _in_cpp(config.train.precision):
            # Its own threads would only call sched_yield, on cores that the C++ operators need.
            keep_threads(1)
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
        pipeline = Pipeline(stages, mesh, optimizer.gradients.add, first_trained_stage(config))
        super().__init__(config, mesh, stages, table, pipeline, optimizer, agree)

    def observed(self, see: See) -> AbstractContextManager[None]:
        return observed(self.stages, see)

    def device_peak(self) -> int:
        return 0 if ms.get_context("device_target") == "CPU" else ms.runtime.max_memory_allocated()

    @contextmanager
    def profiled(self, folder: Path, steps: int) -> Iterator[Callable[[], object]]:
        kinds = profiler.ProfilerActivity
        activities = [kinds.CPU] if ms.get_context("device_target") == "CPU" else [kinds.CPU, kinds.NPU]
        raw = folder / f"mindspore-rank-{self.rank}"
        ready = profiler.tensorboard_trace_handler(str(raw))
        with profiler.profile(activities=activities, on_trace_ready=ready, start_profile=False) as recording:
            yield recording.step
        convert_trace(raw, folder / f"rank-{self.rank}.json")

    def implementation(self) -> dict[str, str]:
        return {
            "backend": f"MindSpore {ms.__version__}",
            "device": str(ms.get_context("device_target")),
            "operators": "; ".join(kernels.described(self.stages[0].dtypes.master)),
        }


def _in_cpp(precision: str) -> bool:
    """Whether products are computed by the C++ operators, which have threads of their own; they serve no float64."""
    return precision != "fp64" and kernels.choices()["linear"].implementation in ("cpp", "amx")


if __name__ == "__main__":
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        join()  # msrun runs this file as its scheduler too, which stays in there until the workers have left
    else:
        code = main(Trainer, open_initial=open_initial, open_recorder=open_recorder)
        leave()  # not after an error: closed connections would make other ranks fail first
        sys.exit(code)
