"""Growing models in memory, for tests: tiny members of each family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from telechat_twins.convert.growth.plan import Options, plan_growth
from telechat_twins.convert.growth.weights import grow_weights
from telechat_twins.core.backends import load
from telechat_twins.core.checkpoint.read import TensorPiece
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.init import init_weights

TINY = ModelConfig(
    vocab_size=53, hidden_size=24, ffn_hidden_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
    norm_eps=1e-5, training_seqlen=64, base_seqlen=64, max_seqlen=64, input_mult=1.3, logit_mult=0.7,
)  # fmt: skip
FLM: dict[str, Any] = dict(
    family="flm", norm="layernorm", activation="gelu", biases="all", position="xpos", num_kv_heads=4
)
FAMILIES = {
    "telechat2": TINY,
    "teleflm": replace(TINY, family="teleflm", biases="none", position="rope", num_kv_heads=4),
    "flm": replace(TINY, **FLM),
    "flm-tied": replace(TINY, **FLM, tied_embeddings=True),
}


def grow(source: ModelConfig, target: ModelConfig, weights: Mapping[str, np.ndarray], **options: Any) -> Any:
    """(plan, grown weights): new entries strong, so that one that shows is seen."""
    plan = plan_growth(source, target, Options(**{"scheme": "strong", "seed": 5, **options}), 7, 7)
    return plan, assemble(grow_weights(plan, lambda name, box: weights[name][box]))


def assemble(pieces: Iterable[TensorPiece]) -> dict[str, np.ndarray]:
    """Whole tensors from pieces that must make them up, each element once."""
    tensors: dict[str, np.ndarray] = {}
    written: dict[str, np.ndarray] = {}
    for piece in pieces:
        whole = tensors.setdefault(piece.name, np.zeros(piece.shape, piece.array.dtype))
        count = written.setdefault(piece.name, np.zeros(piece.shape, np.int8))
        box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.array.shape, strict=True))
        assert whole.dtype == piece.array.dtype
        whole[box] = piece.array
        count[box] += 1
    assert all((count == 1).all() for count in written.values())
    return tensors


def strong(config: ModelConfig, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {name: array.astype(dtype) for name, array in init_weights(config, 3, "strong").items()}


def batch(config: ModelConfig, length: int = 13, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    ids, targets = random.integers(0, config.num_tokens, (2, 2, length)).astype(np.int32)
    return Batch(ids, targets, np.tile(np.arange(length, dtype=np.int32), (2, 1)))


def run(backend: str, config: ModelConfig, weights: Mapping[str, np.ndarray], precision: str, given: Batch) -> Any:
    """``tele forward``'s result with gradients."""
    return load(backend, "forward").run(config, lambda name: weights[name], given, precision, True)
