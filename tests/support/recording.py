"""Records of one training step taken in this process, on one rank, from random weights and a batch of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from telechat_twins.core.backends import load
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.model.lora import init_adapter, is_adapter
from telechat_twins.core.parity.record.format import Record
from telechat_twins.core.parity.record.read import open_record
from telechat_twins.core.parity.record.recorder import Recorder, step_folder
from telechat_twins.core.train.recipe import clip_factor
from telechat_twins.core.types import JsonObject

ROWS, LENGTH, RATE = 2, 24, 1e-3


def small_run(preset: str = "telechat2-tiny", precision: str = "fp32", **more: object) -> RunConfig:
    """A run of a model of two blocks; ``more``: keys of the run as ``section__key`` or whole sections."""
    tree: JsonObject = {
        "model": {**load_model_config(preset).to_dict(), "num_layers": 2, "vocab_size": 307},
        "data": {"sources": [], "seq_len": LENGTH},
        "train": {"steps": 2, "global_batch": ROWS, "micro_batch": ROWS, "precision": precision},
        "optim": {"lr": RATE, "warmup_steps": 0},
    }
    for key, value in more.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return run_config_from_dict(tree)


def random_batch(config: RunConfig, documents: bool = False) -> Batch:
    """Random tokens; ``documents``: two documents a row, kept apart."""
    ids = np.random.default_rng(1).integers(0, config.model.num_tokens, (ROWS, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    if not documents:
        return Batch(ids, shift_labels(ids), positions)
    second = (positions >= LENGTH // 3).astype(np.int32)
    return Batch(ids, shift_labels(ids), positions - second * (LENGTH // 3), second)


def record_step(
    backend: str,
    config: RunConfig,
    folder: Path,
    full: Sequence[str] = (),
    batch: Batch | None = None,
    steps: int = 1,
    weights: str = "strong",
) -> Record:
    """The record of step ``steps`` of a run with ``weights`` (strong, normal) of seed 0."""
    batch = random_batch(config) if batch is None else batch
    trainer = load(backend, "train").Trainer(config)

    def read(name: str, box: tuple[slice, ...]) -> np.ndarray:
        if config.lora is not None and is_adapter(name):
            return init_adapter(name, config.model, config.lora, 0, box, weights)
        return init_tensor(name, config.model, 0, box, weights)

    trainer.load_weights(read)
    if config.lora is not None:
        trainer.optimizer.load_masters(read)
    trainer.optimizer.refresh()
    recorder = Recorder(config, folder, at=[steps], full=full)
    for step in range(1, steps + 1):
        targets = trainer.count_targets(batch.num_terms)
        wanted = recorder.wants(step)
        if wanted:
            recorder.before(trainer, step, batch, 0, len(batch.input_ids), config.model.to_dict())
        loss = trainer.gradients(batch, targets, 1.0)
        norm = trainer.grad_norm(1.0)
        if wanted:
            recorder.computed(loss, norm, 1.0)
        trainer.update(RATE, clip_factor(norm, config.optim.clip_grad))
        if wanted:
            recorder.after({"step": step, "loss": loss, "grad_norm": norm, "lr": RATE})
    return open_record(step_folder(folder, steps))
