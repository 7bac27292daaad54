"""Checkpoints of a run: what is in them, when there is one already, which one to go on from after a stop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from telechat_twins.core.checkpoint.read import SaveRanks
from telechat_twins.core.checkpoint.save import Asset, Contents
from telechat_twins.core.train.agreement import meet
from telechat_twins.core.train.run.state import Run
from telechat_twins.core.types import JsonObject


def save(run: Run, asynchronous: bool) -> None:
    """A checkpoint of the present state under ``out``; ``asynchronous``: written while training goes on."""
    state, stepper = run.state, run.stepper
    trainer: JsonObject = {
        **dataclasses.asdict(state),
        "optimizer_steps": stepper.step,
        "data_digest": run.digest(),
        "loss_scale": run.loss_scale.to_dict() if run.loss_scale else None,
        "health": run.health.to_dict(),
        **run.held_out.trainer_entries,
        # All randomness (initial weights, order of the data, dropout of adapters) is a function of this seed and of
        # counters.
        "seed": run.config.train.seed,
        "backend": stepper.implementation().get("backend", "unknown"),
        "layout": run.config.parallel.name,
        **run.lineage.trainer_entries,
        "config": {**run.config.to_dict(), "model": run.model_config()},
    }
    tokenizer = Asset(run.data.first.tokenizer_name, run.data.first.tokenizer())
    contents = Contents(
        model={
            "config": run.model_config(),
            **({"grown": [growth.to_dict() for growth in run.history]} if run.history else {}),
            **run.lineage.model_entries,
            **({} if run.adapter is None else {"adapter": run.adapter.to_dict()}),
        },
        weights=stepper.weights(),
        optimizer=stepper.optimizer_state(),
        trainer=trainer,
        assets=[tokenizer, *(asset for asset in run.lineage.assets if asset.name != tokenizer.name)],
        ranks=SaveRanks(stepper.rank, stepper.world, lambda: meet(stepper)),
    )
    keep_last = run.config.checkpoint.keep_last
    run.saver.save(run.out, state.step, contents, keep_last=keep_last, asynchronous=asynchronous)


def step_folder(run: Run) -> Path:
    """Folder of the present step's checkpoint."""
    return run.out / f"step-{run.state.step:08d}"


def save_unless_saved(run: Run) -> bool:
    """A checkpoint of the present state, unless the last one is of this step; whether it was saved now."""
    run.saver.wait()
    if run.saver.last is not None and run.saver.last.name == step_folder(run).name:
        return False
    save(run, asynchronous=False)
    return True


def way_back(run: Run) -> str:
    """A sentence for the user: the checkpoint that a stopped run can go on from."""
    every = run.config.checkpoint.every
    if run.saver.last is not None:
        return f"The last checkpoint is intact: {run.saver.last}"
    if run.origin is not None:
        return f"No checkpoint had been saved since; the one this run went on from is intact: {run.origin}"
    if every:
        return f"No checkpoint had been saved: the first would have come after step {every} (checkpoint.every)"
    return "No checkpoint had been saved (set checkpoint.every)"
