"""State of a training run on one rank, and how it begins: anew, from another model's weights, or from a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from telechat_twins.core.checkpoint.read import Checkpoint, Saver
from telechat_twins.core.checkpoint.source import WeightSource
from telechat_twins.core.config import RunConfig
from telechat_twins.core.model.growth import Growth, read_history
from telechat_twins.core.model.lora import AdapterBase, AdapterRecord, adapter_record
from telechat_twins.core.model.xpos_range import check_xpos_range
from telechat_twins.core.train.health import Health
from telechat_twins.core.train.heldout.due import unfinished_note, was_due
from telechat_twins.core.train.heldout.evaluate import HeldOut
from telechat_twins.core.train.loss_scale import DynamicLossScale
from telechat_twins.core.train.resume import describe_resumption, require_same_base
from telechat_twins.core.train.run.hooks import Hook
from telechat_twins.core.train.stages import Stage, StagedData, plan_stages, require_same_samples, stage_of
from telechat_twins.core.train.start import (
    Lineage,
    added_note,
    describe_adapter,
    describe_start,
    lineage_of,
    start_reader,
    start_record,
    tokenizer_note,
)
from telechat_twins.core.train.stepper import Stepper, StepRecorder, TrainState
from telechat_twins.core.train.watch.meter import Meter
from telechat_twins.core.train.watch.profile import passed_note
from telechat_twins.core.types import JsonObject


class Run:
    """One training run on one rank: the loop's state."""

    def __init__(self, stepper: Stepper, config: RunConfig, out: Path, data: StagedData, held_out: HeldOut) -> None:
        self.stepper, self.config, self.out, self.data, self.held_out = stepper, config, out, data, held_out
        self.stages = plan_stages(config)
        self.stage: Stage | None = None  # that of the last step made
        self.state = TrainState()
        self.health = Health(config.health)
        self.loss_scale = DynamicLossScale() if config.train.precision == "fp16" else None
        self.saver = Saver()
        self.origin: Path | None = None  # the checkpoint of another folder that this run went on from
        self.due = False  # whether the checkpoint that it goes on from was to be evaluated
        longest = max(stage.data.seq_len for stage in self.stages)
        warning = check_xpos_range(config.model, config.train.precision, longest)
        self.notes: list[str] = [] if warning is None else [f"warning: {warning}"]
        self.history: tuple[Growth, ...] = ()
        self.lineage = Lineage()
        # Whether the reference of preference pairs is the adapters' base, evaluated with each batch.
        self.live = config.preference is not None and config.preference.reference == "live"
        self.adapter: AdapterRecord | None = None  # with its base, once that is read
        self.growth = config.model.growth  # None once its masks have done their work
        self.recorder: StepRecorder | None = None
        self.hooks: list[Hook] = []
        self.meter = Meter(config, stepper)

    def start(self, source: WeightSource, anew: bool = True) -> None:
        """Begin with the weights of another model; ``anew``: no checkpoint of an adapter of it follows."""
        self.stepper.load_weights(start_reader(source, self.config.model))
        record = start_record(source)
        if self.config.lora is not None:
            self.adapter = adapter_record(self.config.model, self.config.lora, AdapterBase(**record))
            self.notes.append(describe_adapter(self.adapter))
        self.lineage = lineage_of(source, self.stepper.rank == 0, record)
        if anew:
            self.notes += describe_start(source, self.config.model, record["fingerprint"])
            data = self.data.first
            self.notes += tokenizer_note(source, data.tokenizer_name, data.tokenizer())
            self.notes += added_note(source, self.config.model)

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue where ``checkpoint`` was taken; notes for the log say what differs from the run that wrote it."""
        trainer = checkpoint.trainer
        assert trainer is not None  # checkpoint_to_resume refuses others
        if self.adapter is not None:
            require_same_base(checkpoint, self.adapter)
        self.stepper.load(checkpoint, optimizer=True)
        if self.stepper.step != trainer["optimizer_steps"]:
            raise RuntimeError(f"stepper is at update {self.stepper.step}, checkpoint at {trainer['optimizer_steps']}")
        self.state = TrainState(trainer["step"], trainer["samples"], trainer["tokens"])
        self.health.load(trainer["health"])
        self.notes += self.held_out.load(trainer)
        self.due = was_due(trainer)
        self.lineage = lineage_of(checkpoint, self.stepper.rank == 0)
        self.history = read_history(checkpoint.model, str(checkpoint.path / "model.json"))
        if self.loss_scale is not None and trainer["loss_scale"] is not None:
            self.loss_scale = DynamicLossScale.from_dict(trainer["loss_scale"])
        require_same_samples(self.stages, self.state)
        self.notes += describe_resumption(checkpoint, self.config, self.history, self.digest())
        self.notes += passed_note(self.config, self.state.step)
        if checkpoint.path.resolve().parent == self.out.resolve():
            self.saver.last = checkpoint.path
            self.held_out.settle(self.out, self.state.step, self.stepper.rank)
        else:
            self.origin = checkpoint.path
            self.notes += unfinished_note(checkpoint.path, self.due)

    def digest(self) -> str:
        """Digest of the data that the last step was drawn from."""
        return self.data.of(stage_of(self.stages, max(self.state.step - 1, 0))).digest()

    def model_config(self) -> JsonObject:
        """The model as it is for the next step, the state of its masks included."""
        c = None if self.growth is None else self.growth.at_step(self.state.step)
        growth = None if self.growth is None or c is None else dataclasses.replace(self.growth, mask=c)
        return dataclasses.replace(self.config.model, growth=growth).to_dict()
