"""Choice and compatibility of the checkpoint that a run is resumed from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from telechat_twins.core.checkpoint.read import Checkpoint, open_checkpoint
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.growth import Growth
from telechat_twins.core.model.growth_mask import GrowthMask
from telechat_twins.core.model.lora import AdapterRecord, adapter_record, read_adapter
from telechat_twins.core.schema import from_mapping
from telechat_twins.core.train.metrics import require_fresh
from telechat_twins.core.train.recipe import rate_at
from telechat_twins.core.types import JsonObject
from telechat_twins.core.watching import OBSERVING


def checkpoint_to_resume(out: Path, resume: str | None, verify: bool) -> Checkpoint | None:
    """The checkpoint that ``--resume`` names (None, "auto" or a folder); None for a run that starts anew.

    UserError when ``out`` holds another run, and when the checkpoint has no training state.
    """
    if resume is None or (resume == "auto" and not (out / "latest").exists()):
        if resume is None:
            require_fresh(out)
        return None
    checkpoint = open_checkpoint(out if resume == "auto" else resume, verify)
    if checkpoint.path.resolve().parent != out.resolve():
        require_fresh(out)
    require_training_state(checkpoint)
    return checkpoint


def require_training_state(checkpoint: Checkpoint) -> None:
    """UserError for a checkpoint that holds weights only."""
    if checkpoint.trainer is None:
        way = f"start a new run from these weights with --init {checkpoint.path}"
        if checkpoint.model.get("adapter") is not None:  # which is no start of a run
            way = f"merge it into its base (tele merge BASE {checkpoint.path} DST) and start a new run with --init DST"
        raise UserError(
            f"{checkpoint.path}: holds weights but no trainer.json, so there is no training state to resume; {way}"
        )


def adopt_growth(checkpoint: Checkpoint, config: RunConfig) -> RunConfig:
    """``config`` with the masks of the model that the checkpoint holds: they are state, not configuration."""
    written = checkpoint.model["config"].get("growth")
    growth = None if written is None else from_mapping(GrowthMask, written, f"{checkpoint.path / 'model.json'}: growth")
    try:
        model = dataclasses.replace(config.model, growth=growth)
    except UserError as error:  # the masks are of a larger model than the config's
        way = _own_model(checkpoint)
        raise UserError(f"model: not the grown model of {checkpoint.path} ({error}); {way}") from None
    return dataclasses.replace(config, model=model)


def _own_model(checkpoint: Checkpoint) -> str:
    """The end of a message about another model than the checkpoint's: where to take its model from."""
    file = checkpoint.path / "assets" / "model.yaml"
    return f"use its own, --set model={file}" if file.is_file() else "use the config it was trained with"


def require_same_model(checkpoint: Checkpoint, config: RunConfig) -> None:
    """UserError, naming the fields, unless the checkpoint holds the model of ``config``."""
    written = with_defaults(load_model_config, checkpoint.model["config"])
    if written.get("vocab_tokens") is None:
        # Rows that a checkpoint does not distinguish from tokens may turn out to be padding; the log then says so.
        written = {**written, "vocab_tokens": config.model.vocab_tokens}
    differing = differences(written, config.model.to_dict())
    if differing:
        raise UserError(
            f"model: not the model of {checkpoint.path}: {'; '.join(differing[:3])}; {_own_model(checkpoint)}"
        )


def require_optimizer_state(checkpoint: Checkpoint, trained: Collection[str]) -> None:
    """UserError for a parameter that trains now and was frozen in the run that wrote the checkpoint."""
    held = set(checkpoint.names("optimizer"))
    thawed = [name for name in checkpoint.names("weights") if name in trained and f"m.{name}" not in held]
    if thawed:
        raise UserError(
            f"train.freeze: {thawed[0]} trains now and has no optimizer state in {checkpoint.path}, where it was "
            f"frozen; freeze it again, or start a new run from these weights with --init {checkpoint.path}"
        )


def describe_resumption(checkpoint: Checkpoint, config: RunConfig, history: Sequence[Growth], digest: str) -> list[str]:
    """Lines for the log: where the run goes on, and what differs from the run that wrote the checkpoint.

    ``digest`` identifies the data that the run's last step would have drawn from.
    """
    trainer = checkpoint.trainer
    assert trainer is not None  # checkpoint_to_resume refuses others
    step = int(trainer["step"])
    lines = [f"resumed from {checkpoint.path} (step {step}, written by {trainer['backend']})"]
    if config.train.init is not None and config.lora is None:
        lines.append(f"train.init {config.train.init} is not read: weights come from the checkpoint")
    if step < config.train.steps:
        lines += rate_change(trainer["config"], config, step, history)
    else:
        lines.append(f"note: train.steps is {config.train.steps}, so nothing is left to train; a larger one goes on")
    written, now = trainer.get("layout", "single"), config.parallel.name
    if written != now:
        lines.append(f"note: written at {written}, now {now}: goes on within rounding, not bit for bit")
    if trainer["data_digest"] != digest:
        lines.append("warning: the data differs from what this checkpoint was trained on")
    passed_over = OBSERVING if written == now else ("parallel.", *OBSERVING)
    for line in differences(_whole(with_defaults(run_config_from_dict, trainer["config"])), _whole(config.to_dict())):
        if not line.startswith(passed_over):
            lines.append(f"warning: changed since the checkpoint: {line}")
    return lines


def _whole(config: JsonObject) -> JsonObject:
    """A run's mapping with train.init as a whole path: --init writes one, YAML and --set need not."""
    init = config["train"].get("init")
    return config if init is None else {**config, "train": {**config["train"], "init": os.path.abspath(init)}}


def rate_change(written: JsonObject, config: RunConfig, step: int, history: Sequence[Growth]) -> list[str]:
    """A note when the next step's learning rate is another than in the run that wrote the checkpoint."""
    try:
        before = run_config_from_dict(written)
    except UserError:
        return []  # options that are not understood any more; what differs is listed anyway
    grown_at = history[-1].step if history else None
    old, new = rate_at(before, step, grown_at), rate_at(config, step, grown_at)
    if old == new:
        return []
    spans = [c.train.schedule_steps or c.train.steps for c in (before, config)]
    note = (
        f"note: the learning rate of step {step + 1} is {new:.3e}; by the checkpoint's schedule it would be {old:.3e}"
    )
    if spans[0] != spans[1] and before.optim == config.optim:
        note += (
            f" (its schedule spans {spans[0]} steps, this one {spans[1]}); --set train.schedule_steps={spans[0]} keeps "
            f"to it, at {config.optim.min_lr:.3e} beyond its end"
            if config.optim.schedule != "constant"
            else ""
        )
    return [note]


def with_defaults(build: Callable[[JsonObject], RunConfig | ModelConfig], tree: JsonObject) -> JsonObject:
    """``tree`` with the options that came into being after it was written; unchanged if it is not understood."""
    try:
        return build(tree).to_dict()
    except UserError:
        return tree


def differences(old: JsonObject, new: JsonObject, prefix: str = "") -> list[str]:
    """``path: old -> new`` for every leaf that differs between two nested mappings."""
    lines = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def require_same_adapter(checkpoint: Checkpoint, config: RunConfig) -> None:
    """UserError unless a checkpoint to resume holds the adapter of ``config``, or no adapter where it has none.

    Dropout may change, as any number of the recipe may.
    """
    where = str(checkpoint.path / "model.json")
    held, ours = read_adapter(checkpoint.model, where), config.lora
    if held is None and ours is None:
        return
    if held is None:
        raise UserError(
            f"lora: {checkpoint.path} holds a whole model, no adapter; to train an adapter on it start a new run with "
            f"--init {checkpoint.path}"
        )
    if ours is None:
        raise UserError(
            f"{checkpoint.path} holds an adapter of {held.base.path}; resume it with the `lora:` it was trained with "
            f"(rank {held.rank}, alpha {held.alpha:g}, targets {' '.join(held.targets)})"
        )
    mine = adapter_record(config.model, ours, held.base)
    if held.modules is None and mine.modules is None:
        for name in ("rank", "alpha", "targets"):
            theirs, here = getattr(held, name), getattr(mine, name)
            if theirs != here:
                raise UserError(
                    f"lora.{name}: the run has {here}, the adapter of {checkpoint.path} {theirs}; set {theirs}"
                )
        return
    theirs, here = held.adapters(config.model), mine.adapters(config.model)
    for layer in dict.fromkeys([*theirs, *here]):
        if theirs.get(layer) != here.get(layer):
            pair = here.get(layer), theirs.get(layer)
            said = [f"rank {found.rank}, alpha {found.alpha:g}" if found else "no adapter" for found in pair]
            raise UserError(
                f"lora: the run gives {layer} {said[0]}, the adapter of {checkpoint.path} {said[1]}; set lora.rank, "
                "alpha, targets, rank_pattern and alpha_pattern as they were"
            )


def require_same_base(checkpoint: Checkpoint, record: AdapterRecord) -> None:
    """UserError unless an adapter to resume was trained on the base that ``record`` describes."""
    held = read_adapter(checkpoint.model, str(checkpoint.path / "model.json"))
    assert held is not None  # require_same_adapter has seen it
    if held.base.fingerprint != record.base.fingerprint:
        raise UserError(
            f"train.init: {record.base.path} (fingerprint {record.base.fingerprint[:12]}) is not the base of the "
            f"adapter {checkpoint.path}, which was trained on {held.base.path} (fingerprint "
            f"{held.base.fingerprint[:12]}); set train.init to that model"
        )
