"""Benchmark sizes of operators and their minimal cost: bytes moved and floating-point operations.

Every input is read once and every output written once, at the size of its dtype (4 bytes for float32 statistics and
optimizer states). An implementation that moves more reaches a smaller fraction of the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Size:
    """One row of ``tokens`` tokens in a model of these widths; ``parameters``: length of the optimizer's vectors."""

    tokens: int
    hidden: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int


SIZES = {
    "tiny": Size(32, 64, 176, 512, 4, 2, 16, 10_000),
    "mini": Size(1024, 512, 1408, 8192, 8, 2, 64, 31_000_000),
    "large": Size(4096, 2048, 5632, 16384, 16, 4, 128, 64_000_000),
    "gpu": Size(8192, 3072, 6144, 131072, 24, 24, 128, 400_000_000),
    "gpu-gqa": Size(8192, 8192, 21824, 131072, 64, 8, 128, 400_000_000),
}

OPERATORS = (
    "linear",
    "embedding",
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "rope",
    "swiglu",
    "gelu",
    "attention",
    "merge_blocks",
    "cross_entropy",
    "adamw",
)


class OperatorCost(NamedTuple):
    """Minimal cost of an operator: bytes read and written, and floating-point operations."""

    read: float  # bytes
    written: float  # bytes
    flops: float = 0.0

    @property
    def bytes(self) -> float:
        return self.read + self.written


def work(operator: str, size: Size, itemsize: int) -> dict[str, OperatorCost]:
    """Cost of an operator by direction: "forward", and where it has a gradient, "backward" and "both" together."""
    N, E, V = size.tokens, size.hidden, size.vocab
    stream, inner, columns = (N * width * itemsize for width in (E, size.ffn, V))
    heads = N * (size.heads + size.kv_heads) * size.head_dim * itemsize
    out = N * size.heads * size.head_dim
    product = 2.0 * N * E * size.ffn
    scores = 2.0 * 2.0 * N * N / 2 * size.heads * size.head_dim  # two products over the half below the diagonal
    table: dict[str, tuple[OperatorCost, OperatorCost | None]] = {
        "linear": (
            OperatorCost(stream + E * size.ffn * itemsize, inner, product),
            OperatorCost(2 * inner + stream, stream, 2 * product),
        ),
        "embedding": (OperatorCost(stream, stream), OperatorCost(stream, V * E * 4)),
        "rms_norm": (OperatorCost(stream, stream), OperatorCost(2 * stream, stream)),
        "add_rms_norm": (OperatorCost(2 * stream, 2 * stream), OperatorCost(3 * stream, stream)),
        "layer_norm": (OperatorCost(stream, stream), OperatorCost(2 * stream, stream)),
        "rope": (OperatorCost(heads, heads), OperatorCost(heads, heads)),
        "swiglu": (OperatorCost(2 * inner, inner), OperatorCost(3 * inner, 2 * inner)),
        "gelu": (OperatorCost(inner, inner), OperatorCost(2 * inner, inner)),
        "attention": (OperatorCost(heads, heads, scores), OperatorCost(2 * heads, 2 * heads, 2.5 * scores)),
        "merge_blocks": (OperatorCost(2 * out * 4, out * 4), None),
        "cross_entropy": (OperatorCost(columns, 0), OperatorCost(columns, columns)),
        "adamw": (OperatorCost(4 * 4 * size.parameters, 3 * 4 * size.parameters), None),
    }
    forward, backward = table[operator]
    found = {"forward": forward}
    if backward is not None:
        found |= {"backward": backward, "both": OperatorCost(*map(sum, zip(forward, backward, strict=True)))}
    return found
