"""Every parameter of a model, by logical name: the one list that models, checkpoints, initialisation and recipe share.

Names do not depend on layout or backend. A matrix is stored [out, in]; keys and values are de-interleaved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.config import ModelConfig


@dataclass(frozen=True)
class ParamSpec:
    """Shape and class of one parameter. ``kind``: embedding | matrix | head | norm | bias."""

    shape: tuple[int, ...]
    kind: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        """Weight decay acts on everything with two dimensions, embedding and head included (released recipe)."""
        return len(self.shape) == 2


def parameter_table(config: ModelConfig) -> dict[str, ParamSpec]:
    """Logical name -> spec, in forward order. Biases only on attention output and ffn output (TeleChat2)."""
    E, F, V = config.hidden_size, config.ffn_hidden_size, config.vocab_size
    HD, KD = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    table = {"embed.weight": ParamSpec((V, E), "embedding")}
    for i in range(config.num_layers):
        block = {
            "attn_norm.weight": ParamSpec((E,), "norm"),
            "attn.q.weight": ParamSpec((HD, E), "matrix"),
            "attn.k.weight": ParamSpec((KD, E), "matrix"),
            "attn.v.weight": ParamSpec((KD, E), "matrix"),
            "attn.o.weight": ParamSpec((E, HD), "matrix"),
            "attn.o.bias": ParamSpec((E,), "bias"),
            "ffn_norm.weight": ParamSpec((E,), "norm"),
            "ffn.gate.weight": ParamSpec((F, E), "matrix"),
            "ffn.up.weight": ParamSpec((F, E), "matrix"),
            "ffn.down.weight": ParamSpec((E, F), "matrix"),
            "ffn.down.bias": ParamSpec((E,), "bias"),
        }
        table.update({f"layers.{i}.{name}": spec for name, spec in block.items()})
    table["norm.weight"] = ParamSpec((E,), "norm")
    if not config.tied_embeddings:
        table["head.weight"] = ParamSpec((V, E), "head")
    return table


def count_parameters(config: ModelConfig) -> int:
    return sum(spec.size for spec in parameter_table(config).values())
