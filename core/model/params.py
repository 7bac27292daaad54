"""Parameter table of a model by logical name, shared by models, checkpoints, initialisation and recipe.

Names do not depend on layout or backend. A matrix is stored [out, in]; keys and values are de-interleaved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from telechat_twins.core.model.config import ModelConfig

# muP's classes (Yang et al., arXiv 2203.03466, table 8). As the width grows both sides of a matrix-like parameter grow,
# one side of the others.
VECTOR, MATRIX, OUTPUT = "vector", "matrix", "output"


@dataclass(frozen=True)
class ParamSpec:
    """Shape and class of one parameter. ``kind``: embedding | matrix | head | norm | bias | adapter."""

    shape: tuple[int, ...]
    kind: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def index(self) -> tuple[slice, ...]:
        """The whole tensor, as core.parallel.sharding.Shard names its part."""
        return tuple(slice(0, n) for n in self.shape)

    @property
    def mup_class(self) -> str:
        """matrix (q, k, v, o, gate, up, down) | output (an untied head) | vector (all others, a tied table too)."""
        return {"matrix": MATRIX, "head": OUTPUT}.get(self.kind, VECTOR)

    @property
    def decays(self) -> bool:
        """Weight decay acts on everything with two dimensions, embedding and head included (released recipe)."""
        return len(self.shape) == 2


def parameter_table(config: ModelConfig, layers: Iterable[int] | None = None) -> dict[str, ParamSpec]:
    """Logical name -> spec, in forward order; the config decides which linears and norms have a bias and a gate.

    ``layers``: only these blocks, beside what belongs to no block; all by default.
    """
    E, V = config.hidden_size, config.vocab_size
    block = block_table(config)
    table = {"embed.weight": ParamSpec((V, E), "embedding")}
    for i in range(config.num_layers) if layers is None else sorted(layers):
        table.update({f"layers.{i}.{name}": spec for name, spec in block.items()})
    table.update(_norm("norm", config))
    if not config.tied_embeddings:
        table["head.weight"] = ParamSpec((V, E), "head")
    return table


def block_table(config: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters of one block, by their names inside it: all blocks are alike."""
    E, F = config.hidden_size, config.ffn_hidden_size
    HD, KD = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inputs = {"gate": F, "up": F} if config.activation == "swiglu" else {"up": F}
    return {
        **_norm("attn_norm", config),
        **_linears("attn", {"q": HD, "k": KD, "v": KD}, E, config.biases == "all"),
        **_linears("attn", {"o": E}, HD, config.biases != "none"),
        **_norm("ffn_norm", config),
        **_linears("ffn", inputs, E, config.biases == "all"),
        **_linears("ffn", {"down": E}, F, config.biases != "none"),
    }


def parameter_axes(name: str) -> tuple[str, ...]:
    """What each axis of a parameter counts: V vocabulary rows, E channels, H query heads * D, K kv heads * D, F ffn."""
    *_, module, kind = name.split(".")
    rows = {"embed": "V", "head": "V", "q": "H", "k": "K", "v": "K", "gate": "F", "up": "F"}.get(module, "E")
    if kind == "bias" or module in ("norm", "attn_norm", "ffn_norm"):
        return (rows,)
    return rows, {"o": "H", "down": "F"}.get(module, "E")


def _norm(name: str, config: ModelConfig) -> dict[str, ParamSpec]:
    size = (config.hidden_size,)
    bias = {f"{name}.bias": ParamSpec(size, "bias")} if config.norm == "layernorm" else {}
    return {f"{name}.weight": ParamSpec(size, "norm"), **bias}


def _linears(module: str, rows: dict[str, int], columns: int, bias: bool) -> dict[str, ParamSpec]:
    """Matrices that read the same input: first their weights, then their biases."""
    weights = {f"{module}.{name}.weight": ParamSpec((out, columns), "matrix") for name, out in rows.items()}
    biases = {f"{module}.{name}.bias": ParamSpec((out,), "bias") for name, out in rows.items()} if bias else {}
    return {**weights, **biases}


def count_parameters(config: ModelConfig) -> int:
    """Number of entries of all parameters, rows of the vocabulary that pad included; a tied head counts once."""
    return sum(spec.size for spec in parameter_table(config).values())
