"""Growth steps of a model: the map of each axis from old to new sizes, and the history stored in checkpoints.

Everything here is arithmetic on sizes: which old entry each new one continues (-1: none), and in which growth it came
to be. The tensors themselves are made by convert/growth/weights.py; masks are in core/model/growth_mask.py.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.growth_mask import head_map, kv_map
from telechat_twins.core.schema import from_mapping, option
from telechat_twins.core.types import JsonObject

METHODS = ("masked", "zero")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes that growth may change."""

    vocab_size: int = option(help="V", min=1)
    hidden_size: int = option(help="E", min=1)
    ffn_hidden_size: int = option(help="F", min=1)
    num_layers: int = option(help="L", min=1)
    num_heads: int = option(help="H", min=1)
    num_kv_heads: int = option(help="K", min=1)
    head_dim: int = option(help="D", min=1)

    @property
    def heads(self) -> tuple[int, int]:
        return self.num_heads, self.num_kv_heads


SIZES = tuple(field.name for field in dataclasses.fields(Sizes))


def sizes_of(config: ModelConfig) -> Sizes:
    """What growth may change, of a model."""
    return Sizes(**{name: getattr(config, name) for name in SIZES})


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One growth step, as model.json keeps it under "grown"; the steps of a model, oldest first, are its history."""

    method: str = option(help="how the function was kept", choices=METHODS)
    step: int = option(help="training step at which the model grew", min=0)
    optimizer_steps: int = option(help="optimizer updates made before", min=0)
    seed: int = option(help="of the new entries", min=0)
    before: Sizes = option(help="sizes of the model that grew")
    after: Sizes = option(help="sizes of the grown one")
    layers: tuple[int, ...] = option(help="for each block the old block it continues or copies; -1: none", min=-1)
    new_layers: tuple[int, ...] = option((), help="blocks that are new, copies included", min=0)

    def source_layer(self, layer: int) -> int:
        """The old block that block ``layer`` was made from; -1: from none."""
        return self.layers[layer]

    def to_dict(self) -> JsonObject:
        return dataclasses.asdict(self)


def read_history(model: JsonObject, where: str) -> tuple[Growth, ...]:
    """The growth steps recorded in a checkpoint's model.json; UserError names what is wrong in it."""
    return tuple(
        from_mapping(Growth, values, f"{where}: grown[{number}]")
        for number, values in enumerate(model.get("grown", []))
    )


@functools.lru_cache(maxsize=64)
def axis_maps(before: Sizes, after: Sizes) -> dict[str, np.ndarray]:
    """For each axis of core.model.params.parameter_axes, the old index that each new one continues; -1: none.

    Old channels, neurons and vocabulary rows come first. Heads stay with their keys (core.model.growth_mask.head_map),
    and inside a head that has become k times as wide, rotary pair i is now pair k * i, which turns at the same speed.
    """
    dims = _dim_map(before.head_dim, after.head_dim)
    return {
        "V": _first(before.vocab_size, after.vocab_size),
        "E": _first(before.hidden_size, after.hidden_size),
        "F": _first(before.ffn_hidden_size, after.ffn_hidden_size),
        "H": _expand(head_map(before.heads, after.heads), dims, before.head_dim),
        "K": _expand(kv_map(before.heads, after.heads), dims, before.head_dim),
    }


def _first(old: int, new: int) -> np.ndarray:
    index = np.arange(new)
    return np.where(index < old, index, -1)


def _dim_map(old: int, new: int) -> np.ndarray:
    """Half rotation pairs dimension j with j + D/2."""
    dims = np.full((2, new // 2), -1)
    dims[:, :: new // old] = np.arange(old).reshape(2, old // 2)
    return dims.reshape(-1)


def _expand(heads: np.ndarray, dims: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a projection from its heads and the dimensions in a head."""
    known = (heads[:, None] >= 0) & (dims[None] >= 0)
    return np.where(known, heads[:, None] * head_dim + dims[None], -1).reshape(-1)
