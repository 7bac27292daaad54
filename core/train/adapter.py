"""Adapter of a run (`lora`): its base, and what its checkpoints say of it."""

from __future__ import annotations

from telechat_twins.core.checkpoint.read import Checkpoint
from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.lora import AdapterRecord, read_adapter


def require_base(config: RunConfig) -> None:
    """UserError for a run with `lora` that names no base."""
    if config.lora is not None and config.train.init is None:
        raise UserError(
            "lora: adapters are trained on the weights of a model; set train.init (--init DIR) to that model, or leave "
            "`lora:` out to train a model from its initial weights"
        )


def describe_adapter(record: AdapterRecord) -> str:
    """A line for the log."""
    lora, base = record.lora, record.base
    dropout = f", dropout {lora.dropout:g}" if lora.dropout else ""
    return (
        f"trains adapters of rank {lora.rank}, alpha {lora.alpha:g}{dropout}, on {' '.join(lora.targets)} of "
        f"{base.path} (fingerprint {base.fingerprint[:12]}), which is frozen"
    )


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
    for name in ("rank", "alpha", "targets"):
        theirs, mine = getattr(held, name), getattr(ours, name)
        if theirs != mine:
            raise UserError(f"lora.{name}: the run has {mine}, the adapter of {checkpoint.path} {theirs}; set {theirs}")


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
