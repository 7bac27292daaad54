"""Frozen and trainable parameters of a run (`train.freeze`).

A frozen parameter takes part in the forward pass and in checkpoints; it has no gradient, no optimizer state and no
weight decay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.lora import is_adapter, lora_table
from telechat_twins.core.model.params import ParamSpec, parameter_table
from telechat_twins.core.near import nearest
from telechat_twins.core.parallel.layout import stage_layers

T = TypeVar("T")


def trainable(table: Mapping[str, T], config: RunConfig) -> dict[str, T]:
    """The entries of ``table`` (by logical name: a whole model's, or one rank's part) that the optimizer updates: with
    ``lora`` adapters alone.

    ``train.freeze`` holds glob patterns on logical names (`*` also matches dots), e.g. ``embed.weight``,
    ``layers.[0-3].*``, ``*.bias``.
    """
    patterns = config.train.freeze
    return {
        name: entry
        for name, entry in table.items()
        if (config.lora is None or is_adapter(name)) and not is_frozen(name, patterns)
    }


def run_table(config: RunConfig) -> dict[str, ParamSpec]:
    """The parameters of a run's model, its adapters included."""
    adapters = {} if config.lora is None else lora_table(config.model, config.lora)
    return parameter_table(config.model) | adapters


def first_trained_stage(config: RunConfig) -> int:
    """The first of the pipeline's stages that holds a trainable parameter: those before it run forward only, and no
    gradient travels to them."""
    stages = stage_layers(config.parallel, config.model)
    home = {layer: number for number, layers in enumerate(stages) for layer in layers}

    def stage_of(name: str) -> int:
        if name == "embed.weight":
            return 0
        return home[int(name.split(".")[1])] if name.startswith("layers.") else len(stages) - 1

    return min(map(stage_of, trainable(run_table(config), config)), default=0)


def constant_names(table: Collection[str], config: RunConfig) -> list[str]:
    """The names of ``table`` that the optimizer does not update."""
    updated = trainable(dict.fromkeys(table), config)
    return [name for name in table if name not in updated]


def is_frozen(name: str, patterns: Iterable[str]) -> bool:
    """Whether a logical name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_freeze(names: Iterable[str], config: RunConfig) -> None:
    """UserError for a pattern that matches none of the model's ``names``, and where nothing is left to train."""
    known = list(names)
    for number, pattern in enumerate(config.train.freeze):
        if not any(fnmatchcase(name, pattern) for name in known):
            near = nearest(pattern, known)
            hint = f"did you mean '{near}'?" if near else "names are listed in docs/checkpoints.md"
            raise UserError(f"train.freeze[{number}]: '{pattern}' matches no parameter of the model; {hint}")
    if known and not trainable(dict.fromkeys(known), config):
        raise UserError("train.freeze: matches every parameter; leave at least one to train")
