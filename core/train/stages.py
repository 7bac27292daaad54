"""Length stages of a run (`train.stages`): row length, batch and sources per range of steps, in one training run.

    train:
      stages:
        - {steps: 9000, seq_len: 8192, global_batch: 64, micro_batch: 1}
        - {steps: 1000, seq_len: 32768, global_batch: 16, sources: [{path: ../../data/long}]}

What a stage leaves out is the run's own (`data`, `train`). Weights, optimizer, schedule and step count go on; the
rotary base and the attention scale follow from the row length by the model's own rule (core.model.position).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from telechat_twins.core.config import DataConfig, RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.layout import check_layout

if TYPE_CHECKING:  # `tele plan` reads stages without a data set or a checkpoint
    from telechat_twins.core.data.blend import Blend
    from telechat_twins.core.train.stepper import TrainState

OpenBlend: TypeAlias = "Callable[[DataConfig, int, int, int], Blend]"  # core.data.blend.open_blend


@dataclass(frozen=True)
class Stage:
    """Steps ``begin`` + 1 to ``end`` of a run, as number ``number`` (from 1) of its stages.

    ``data`` has the row length and the sources. Stages one after another with equal ``data`` draw from one order:
    ``order`` counts the orders from 0, ``drawn`` the samples of the run before the order's first.
    """

    number: int
    begin: int
    end: int
    global_batch: int
    micro_batch: int
    data: DataConfig
    order: int
    drawn: int

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.global_batch * self.data.seq_len

    @property
    def label(self) -> str:
        return f"{self.global_batch} x {self.data.seq_len} tokens"


def plan_stages(config: RunConfig) -> list[Stage]:
    """The stages of a run; one for a run without ``train.stages``, without an end where the steps are not known."""
    train, data = config.train, config.data
    if not train.stages:
        return [Stage(1, 0, train.steps, train.global_batch, train.micro_batch, data, 0, 0)]
    stages: list[Stage] = []
    begin = samples = 0
    for number, given in enumerate(train.stages, 1):
        seq_len = data.seq_len if given.seq_len is None else given.seq_len
        own = dataclasses.replace(
            data, seq_len=seq_len, sources=data.sources if given.sources is None else given.sources
        )
        before = stages[-1] if stages else None
        order, drawn = (before.order, before.drawn) if before else (0, 0)
        if before is not None and before.data != own:
            order, drawn = before.order + 1, samples
        batch = given.global_batch or train.global_batch
        micro = given.micro_batch or train.micro_batch
        stages.append(Stage(number, begin, begin + given.steps, batch, micro, own, order, drawn))
        begin += given.steps
        samples += given.steps * batch
    return stages


def check_stages(config: RunConfig, world: int | None = None) -> None:
    """core.parallel.layout.check_layout for every stage; UserError names the stage. With held-out text also for the
    run's own batch, in which that is evaluated whatever the stages' are."""
    stages = plan_stages(config)
    batches = [
        (f"train.stages[{stage.number - 1}]: " if len(stages) > 1 else "", stage.global_batch, stage.micro_batch)
        + (stage.data.seq_len,)
        for stage in stages
    ]
    if config.eval is not None and config.eval.sources:
        batches.append(("", config.train.global_batch, config.train.micro_batch, config.data.seq_len))
    for where, global_batch, micro_batch, seq_len in batches:
        try:
            check_layout(
                config.parallel,
                config.model,
                world=world,
                global_batch=global_batch,
                micro_batch=micro_batch,
                seq_len=seq_len,
            )
        except UserError as error:
            raise UserError(f"{where}{error}") from None


class StagedData:
    """The data of every stage, opened. ``first`` is the first stage's blend."""

    def __init__(self, config: RunConfig, open_blend: OpenBlend) -> None:
        model, seed = config.model, config.train.seed
        self.blends: list[Blend] = []
        for stage in plan_stages(config):
            if stage.order == len(self.blends):
                # Another order for each, or a source that two stages share would begin with the same samples.
                try:
                    blend = open_blend(stage.data, seed + stage.order, model.num_tokens, model.filler_id)
                except UserError as error:
                    own = config.train.stages is not None and config.train.stages[stage.number - 1].sources is not None
                    where = f"train.stages[{stage.number - 1}].sources" if own else "data.sources"
                    raise UserError(re.sub(r"^data\.sources", where, str(error))) from None
                self.blends.append(blend)
        self.first = self.blends[0]
        if any(blend.tokenizer() != self.first.tokenizer() for blend in self.blends[1:]):
            raise UserError("train.stages: their sources were made by different tokenizers; pack all with one")

    @property
    def rows_of_a_pass(self) -> int:
        """Rows of one pass over the sources; a preference pair is two."""
        return self.first.num_rows

    def of(self, stage: Stage) -> Blend:
        return self.blends[stage.order]


def stage_of(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that the step after ``step`` steps belongs to; past the end, the last."""
    return next((stage for stage in stages if step < stage.end), stages[-1])


def samples_at(stages: Sequence[Stage], step: int) -> int:
    """Samples that a run has drawn after ``step`` steps."""
    return sum((min(step, stage.end) - stage.begin) * stage.global_batch for stage in stages if step > stage.begin)


def require_same_samples(stages: Sequence[Stage], state: TrainState) -> None:
    """UserError where a checkpoint has drawn other samples than these stages would have by its step."""
    expected = samples_at(stages, state.step)
    if len(stages) > 1 and expected != state.samples:
        raise UserError(
            f"train.stages: the checkpoint has drawn {state.samples} samples in {state.step} steps, these stages draw "
            f"{expected}; leave what lies before step {state.step} as it was"
        )


def describe_stage(stage: Stage, stages: Sequence[Stage], model: ModelConfig) -> str:
    """A line for the log, when a stage begins."""
    line = (
        f"stage {stage.number} of {len(stages)}, steps {stage.begin + 1} to {stage.end}: {stage.label} in "
        f"micro-batches of {stage.micro_batch}"
    )
    from telechat_twins.core.model.position import attention_scale, scaled_base

    base, scale = scaled_base(model, stage.data.seq_len), attention_scale(model, stage.data.seq_len)
    if model.position.startswith("ntk"):
        line += f"; rotary base {base:,.0f}, attention scale {scale:.4g}"
    return line


def marks(stages: Sequence[Stage]) -> dict[int, str]:
    """Lines of the loss plot: first step of each stage -> its label; none for a run without stages."""
    return {stage.begin + 1: stage.label for stage in stages} if len(stages) > 1 else {}
