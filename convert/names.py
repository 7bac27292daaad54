"""Names and packing of released checkpoints: one table a format, read in both directions.

A rule ties one released tensor to the logical tensors packed in it. ``{i}`` stands for the layer number. A further
format is a further table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from core.config import ModelConfig
from core.errors import UserError
from core.params import ParamSpec, parameter_table


class Transform(Protocol):
    """How logical tensors are packed into a released one."""

    def join(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        """Logical tensors -> released tensor."""
        ...

    def split(self, whole: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
        """Released tensor -> logical tensors (views where possible); the inverse of join."""
        ...

    def joined_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of the released tensor."""
        ...


class Same:
    """One logical tensor, unchanged."""

    def join(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        return parts[0]

    def split(self, whole: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
        return [whole]

    def joined_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return shapes[0]


class InterleavedKeyValue:
    """k, v [K*D, E] <-> [2*K*D, E] whose rows are, for each key/value head in turn, D rows of k then D rows of v.

    Not [all k; all v]: taken that way every head but the first and the last mixes keys with values, shapes still fit.
    """

    def join(self, parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
        heads = [part.reshape(config.num_kv_heads, 1, config.head_dim, *part.shape[1:]) for part in parts]
        return np.concatenate(heads, axis=1).reshape(-1, *parts[0].shape[1:])

    def split(self, whole: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
        heads = whole.reshape(config.num_kv_heads, 2, config.head_dim, *whole.shape[1:])
        return [heads[:, j].reshape(-1, *whole.shape[1:]) for j in range(2)]

    def joined_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return (shapes[0][0] + shapes[1][0], *shapes[0][1:])


@dataclass(frozen=True)
class Rule:
    """One line of a table: the released name, the logical names packed in it, and how."""

    released: str
    logical: tuple[str, ...]
    transform: Transform


def rule(released: str, *logical: str, transform: Transform | None = None) -> Rule:
    """A line of a table; without a transform the one logical tensor is stored unchanged."""
    return Rule(released, logical, transform or Same())


# The Hugging Face release. Some copies lack the leading "transformer." (names(..., prefix="")).
TELECHAT2_HF = (
    rule("transformer.word_embeddings.weight", "embed.weight"),
    rule("transformer.h.{i}.input_layernorm.weight", "layers.{i}.attn_norm.weight"),
    rule("transformer.h.{i}.self_attention.query.weight", "layers.{i}.attn.q.weight"),
    rule(
        "transformer.h.{i}.self_attention.key_value.weight",
        "layers.{i}.attn.k.weight",
        "layers.{i}.attn.v.weight",
        transform=InterleavedKeyValue(),
    ),
    rule("transformer.h.{i}.self_attention.dense.weight", "layers.{i}.attn.o.weight"),
    rule("transformer.h.{i}.self_attention.dense.bias", "layers.{i}.attn.o.bias"),
    rule("transformer.h.{i}.post_attention_layernorm.weight", "layers.{i}.ffn_norm.weight"),
    rule("transformer.h.{i}.mlp.gate_proj.weight", "layers.{i}.ffn.gate.weight"),
    rule("transformer.h.{i}.mlp.up_proj.weight", "layers.{i}.ffn.up.weight"),
    rule("transformer.h.{i}.mlp.down_proj.weight", "layers.{i}.ffn.down.weight"),
    rule("transformer.h.{i}.mlp.down_proj.bias", "layers.{i}.ffn.down.bias"),
    rule("transformer.ln_f.weight", "norm.weight"),
    rule("lm_head.weight", "head.weight"),
)
HF_PREFIX = "transformer."


@dataclass(frozen=True)
class Binding:
    """A rule filled in for one layer of one model."""

    released: str
    logical: tuple[str, ...]
    transform: Transform
    shape: tuple[int, ...]

    def split(self, whole: np.ndarray, config: ModelConfig) -> dict[str, np.ndarray]:
        """The released tensor -> {logical name: tensor}."""
        return dict(zip(self.logical, self.transform.split(whole, config), strict=True))

    def join(self, tensors: Mapping[str, np.ndarray], config: ModelConfig) -> np.ndarray:
        """Logical tensors by name -> the released tensor; UserError if parts of one pack differ in dtype."""
        parts = [tensors[name] for name in self.logical]
        if len({part.dtype for part in parts}) > 1:
            found = ", ".join(f"{name} {part.dtype}" for name, part in zip(self.logical, parts, strict=True))
            raise UserError(f"{self.released}: its parts differ in dtype ({found}); give --dtype to make them one")
        return self.transform.join(parts, config)


def bind(config: ModelConfig, rules: Sequence[Rule] = TELECHAT2_HF, prefix: str = HF_PREFIX) -> dict[str, Binding]:
    """Released name -> binding for a whole model, in the model's forward order.

    ``prefix`` replaces the leading "transformer." of the table ("" for copies without it).
    """
    table = parameter_table(config)
    bindings: dict[str, Binding] = {}
    blocks = [r for r in rules if "{i}" in r.released]
    first = rules.index(blocks[0])
    lines = [(r, "") for r in rules[:first]]
    lines += [(r, str(i)) for i in range(config.num_layers) for r in blocks]
    lines += [(r, "") for r in rules[first:] if "{i}" not in r.released]
    for line, layer in lines:
        name = line.released.replace("{i}", layer)
        if name.startswith(HF_PREFIX):
            name = prefix + name.removeprefix(HF_PREFIX)
        logical = tuple(pattern.replace("{i}", layer) for pattern in line.logical)
        shape = line.transform.joined_shape([table[part].shape for part in logical])
        bindings[name] = Binding(name, logical, line.transform, shape)
    return bindings


def released_table(bindings: Mapping[str, Binding], config: ModelConfig) -> dict[str, ParamSpec]:
    """Released name -> shape and kind, as check_shapes wants it."""
    kinds = parameter_table(config)
    return {name: ParamSpec(b.shape, kinds[b.logical[0]].kind) for name, b in bindings.items()}
