"""Sites: the places of a model whose activations are recorded, by logical name, in the order of the forward pass.

A site's tensor is that of the whole global batch, [B, S, ...]: B the row of the global batch, S the position in the
sequence, heads flattened into H * D. Growth masks are part of the operator before them: ``attn.core`` and ``ffn.act``
are what ``attn.o`` and ``ffn.down`` read, and ``layers.i`` of a new block is the masked sum. Layouts, padding and
recomputation do not show in a site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.lora import LoraConfig, lora_table
from telechat_twins.core.model.params import block_table, parameter_table

SCALARS = ("loss", "grad_norm")


@dataclass(frozen=True)
class Site:
    """One place. ``operator``: embedding, rms_norm, layer_norm, linear, rope, attention, add, swiglu, gelu,
    cross_entropy, norm (of all gradients). ``inputs``: names of the sites, then of the weights that it reads; the first
    norm reads ``embed``. ``width``: of the last axis; None for a scalar."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    width: int | None

    def shape(self, rows: int, seq_len: int) -> tuple[int, ...]:
        """Of the whole tensor, for B = ``rows`` and S = ``seq_len``."""
        return () if self.width is None else (rows, seq_len, self.width)

    @property
    def layer(self) -> int | None:
        """The block that the site belongs to."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None


def sites(config: ModelConfig, lora: LoraConfig | None = None) -> list[Site]:
    """All sites of a model in the order of the forward pass; ``loss`` and ``grad_norm`` last."""
    E = config.hidden_size
    norm = "layer_norm" if config.norm == "layernorm" else "rms_norm"
    top = parameter_table(config, [])
    found = [Site("embed", "embedding", ("embed.weight",), E)]
    for layer in range(config.num_layers):
        found += _block(config, lora, layer, norm, "embed" if layer == 0 else f"layers.{layer - 1}")
    last = f"layers.{config.num_layers - 1}"
    head = "embed.weight" if config.tied_embeddings else "head.weight"
    return [
        *found,
        Site("norm", norm, (last, *(name for name in top if name.startswith("norm."))), E),
        # Columns of the vocabulary that only pad it are left out.
        Site("logits", "linear", ("norm", head), config.num_tokens),
        Site("loss", "cross_entropy", ("logits",), None),
        Site("grad_norm", "norm", (), None),
    ]


def _block(config: ModelConfig, lora: LoraConfig | None, layer: int, norm: str, stream: str) -> Iterator[Site]:
    """The sites of one block, which reads the site ``stream``."""
    at = f"layers.{layer}"
    E, F, D = config.hidden_size, config.ffn_hidden_size, config.head_dim
    H, K = config.num_heads * D, config.num_kv_heads * D
    names = [f"{at}.{name}" for name in block_table(config)]
    names += [] if lora is None else list(lora_table(config, lora, [layer]))
    gated = config.activation == "swiglu"

    def site(name: str, operator: str, inputs: tuple[str, ...], width: int) -> Site:
        """``inputs`` by their names in the block; the weights of the same name follow."""
        weights = (weight for weight in names if weight.rpartition(".")[0] == f"{at}.{name}")
        return Site(f"{at}.{name}", operator, (*(f"{at}.{i}" for i in inputs), *weights), width)

    first = site("attn_norm", norm, (), E)
    yield Site(first.name, norm, (stream, *first.inputs), E)
    for name, width in (("q", H), ("k", K), ("v", K)):
        yield site(f"attn.{name}", "linear", ("attn_norm",), width)
    for name, width in (("q", H), ("k", K)):
        yield site(f"attn.rope_{name}", "rope", (f"attn.{name}",), width)
    yield site("attn.core", "attention", ("attn.rope_q", "attn.rope_k", "attn.v"), H)
    yield site("attn.o", "linear", ("attn.core",), E)
    yield Site(f"{at}.attn_sum", "add", (stream, f"{at}.attn.o"), E)
    yield site("ffn_norm", norm, ("attn_sum",), E)
    for name in ("gate", "up") if gated else ("up",):
        yield site(f"ffn.{name}", "linear", ("ffn_norm",), F)
    yield site("ffn.act", "swiglu" if gated else "gelu", ("ffn.gate", "ffn.up") if gated else ("ffn.up",), F)
    yield site("ffn.down", "linear", ("ffn.act",), E)
    masked = config.growth is not None and layer in config.growth.new_layers
    yield Site(at, "add", (f"{at}.attn_sum", f"{at}.ffn.down", *((stream,) if masked else ())), E)
