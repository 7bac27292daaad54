"""A model as the Llama that computes the same, for readers that have no class for its family.

Biases that the model lacks are zeros, the muP multipliers are folded into embedding and head (each value rounded once
to its dtype; powers of two are exact), and a rotation that follows the length is plain within the trained one. What a
Llama cannot say (LayerNorm, gelu, xPos, growth masks) is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from telechat_twins.convert.places import require_place
from telechat_twins.convert.rounding import rounded
from telechat_twins.convert.source import ModelSource
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.types import JsonObject

_TEXT = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "chat_template",
    "vocab.json",
    "merges.txt",
    "generation_config",
)


class LlamaSource(ModelSource):
    """``source`` under a Llama's config (family telechat3). UserError for a model that no Llama computes."""

    def __init__(self, source: ModelSource) -> None:
        self.source, self.path, self.tokenizer_path = source, source.path, source.tokenizer_path
        self.assets = tuple(asset for asset in source.assets if asset.name.startswith(_TEXT))
        self.config, changes = as_llama(source.config)
        require_place(self.config, "hf")
        self.notes = (*source.notes, *changes)
        self._shapes = parameter_table(self.config)
        self._held = set(source.names())

    def dtype(self, name: str) -> np.dtype:
        return self.source.dtype(self._origin(name))

    def tensor(self, name: str) -> np.ndarray:
        origin = self._origin(name)
        if origin != name and name != "head.weight":  # a bias that the model lacks
            return np.zeros(self._shapes[name].shape, self.source.dtype(origin))
        array = self.source.tensor(origin)
        config = self.source.config
        factor = {"embed.weight": config.input_mult, "head.weight": config.logit_mult}.get(name, 1.0)
        return array if factor == 1.0 else rounded(array.astype(np.float64) * factor, array.dtype)

    def _origin(self, name: str) -> str:
        """The tensor of the model that ``name`` is made of, or whose dtype it has."""
        if name in self._held:
            return name
        return "embed.weight" if name == "head.weight" else name.removesuffix("bias") + "weight"

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        self.source.verify(share)

    def export(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(tensors)

    def files(self) -> list[Path]:
        return self.source.files()


def as_llama(config: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """The config of the Llama, and what changes; UserError naming the field for a model that no Llama computes."""
    for field, value in (("norm", "rmsnorm"), ("activation", "swiglu"), ("growth", None)):
        if getattr(config, field) != value:
            raise UserError(f"model.{field}: {getattr(config, field)} has no place in a Llama; leave --llama out")
    if config.position == "xpos":
        raise UserError("model.position: xpos has no place in a Llama; leave --llama out")
    changes: JsonObject = {"family": "telechat3"}
    told: list[str] = []
    if config.biases == "outputs":
        changes["biases"] = "all"
        told.append("biases that the model lacks are written as zeros")
    if config.position.startswith("ntk"):
        length = min(config.max_seqlen, config.training_seqlen, config.base_seqlen)
        lengths = dict.fromkeys(("max_seqlen", "training_seqlen", "base_seqlen"), length)
        changes |= {"position": "rope", **lengths}
        told.append(f"the rotary base does not grow in a Llama: stay within {length} tokens")
    elif config.position == "rope":
        changes |= {"training_seqlen": config.max_seqlen, "base_seqlen": config.max_seqlen}
    for field, matrix in (("input_mult", "the embedding"), ("logit_mult", "the head")):
        if getattr(config, field) != 1.0:
            changes[field] = 1.0
            told.append(f"{field} {getattr(config, field):g} is folded into {matrix}")
    if config.tied_embeddings and config.input_mult != config.logit_mult:
        changes["tied_embeddings"] = False
        told.append("embedding and head are no longer tied: their multipliers differ")
    return dataclasses.replace(config, **changes), told
