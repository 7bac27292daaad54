"""Memory of generation on a device: weights in bf16 or int8, the paged cache of keys and values, and temporaries."""

from __future__ import annotations

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.sharding import padded_rows

PAGE = 16  # tokens (core.inference.pages)
WIDTH = 2  # bytes of bf16
FACTOR = 4  # bytes of an int8 row's factor


def weight_bytes(config: ModelConfig, tp: int, pp: int, quantize: str = "none") -> int:
    """Weights of the fullest rank: its layers, and the larger of the embedding and the head (with both on one stage).

    int8: matrices of linear layers and the head (core.model.quantize); embedding, norms and biases stay in bf16.
    """
    E, F = config.hidden_size, config.ffn_hidden_size // tp
    HD, KD = config.num_heads * config.head_dim // tp, max(config.num_kv_heads // tp, 1) * config.head_dim
    inputs = 2 if config.activation == "swiglu" else 1
    rows = HD + 2 * KD + E + inputs * F + E  # q, k and v, o, gate and up, down
    matrices = E * (2 * HD + 2 * KD + (inputs + 1) * F)
    vectors = {"none": 0, "outputs": 2 * E, "all": HD + 2 * KD + 2 * E + inputs * F}[config.biases]
    vectors += 2 * E * (2 if config.norm == "layernorm" else 1)
    table = padded_rows(config.vocab_size, tp) * E
    layers = -(-config.num_layers // pp)
    if quantize == "int8":
        block = matrices + FACTOR * rows + WIDTH * vectors
        head = table + FACTOR * padded_rows(config.vocab_size, tp)
    else:
        block, head = WIDTH * (matrices + vectors), WIDTH * table
    embedding = WIDTH * table
    ends = embedding if config.tied_embeddings else embedding + head if pp == 1 else max(embedding, head)
    return layers * block + ends


def cache_bytes(config: ModelConfig, tp: int, tokens: int, layers: int | None = None) -> int:
    """Keys and values of one sequence of ``tokens`` on a tensor rank, in whole pages; of ``layers``, by default all."""
    pages = -(-tokens // PAGE)
    heads = max(config.num_kv_heads // tp, 1)
    return 2 * (config.num_layers if layers is None else layers) * pages * PAGE * heads * config.head_dim * WIDTH


def working_bytes(config: ModelConfig, tp: int, rows: int) -> int:
    """Temporaries of ``rows`` tokens in a step: stream, normed stream, projections, gate and up, and float32 logits of
    the last token."""
    F, HD = config.ffn_hidden_size // tp, config.num_heads * config.head_dim // tp
    return rows * WIDTH * (3 * config.hidden_size + 3 * HD + 3 * F) + 4 * config.vocab_size
