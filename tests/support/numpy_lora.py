"""Adapters in numpy and float64: what training them is judged by. The decoder is tests/support/numpy_decoder.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatch

import numpy as np

from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.lora import LoraConfig
from telechat_twins.core.model.lora_dropout import INPUTS, BlockDropout, LoraDropout
from tests.support.numpy_decoder import logits

SHARED = {"k": "q", "v": "q", "gate": "up"}  # layers that read the input of another
STEP = 1e-30  # imaginary: every step of the decoder is analytic, so no digit is lost


def loss(
    config: ModelConfig,
    lora: LoraConfig,
    weights: Mapping[str, np.ndarray],
    batch: Batch,
    dropout: LoraDropout | None = None,
) -> np.complex128:
    """Mean token loss of base and adapters ``weights``; y = W x + b + (alpha / r) B A dropout(x),
    alpha / sqrt(r) with use_rslora."""
    columns = slice(0, config.num_heads * config.head_dim), slice(0, config.ffn_hidden_size)

    def adapted(name: str, x: np.ndarray) -> np.ndarray:
        at = name.removesuffix(".weight")
        if f"{at}.lora_a" not in weights:
            return 0.0
        if dropout is not None:
            _, layer, _, target, _ = name.split(".")
            block: BlockDropout = dropout.block(int(layer), config.hidden_size, columns)
            source = target if target in INPUTS else SHARED[target]
            x = np.where(block.keep(source), x / (1.0 - dropout.threshold / 65536), 0.0)
        rank, alpha = (
            next((value for name, value in patterns.items() if fnmatch(at, f"*{name}")), usual)
            for patterns, usual in ((lora.rank_pattern, lora.rank), (lora.alpha_pattern, lora.alpha))
        )
        scale = alpha / np.sqrt(rank) if lora.use_rslora else alpha / rank
        return scale * (x @ weights[f"{at}.lora_a"].T @ weights[f"{at}.lora_b"].T)

    found = logits(config, weights.__getitem__, batch.input_ids, np.complex128, adapted)
    # The imaginary part is so small that the largest real part is the largest.
    top = found.real.max(-1, keepdims=True)
    log_probs = found - top - np.log(np.exp(found - top).sum(-1, keepdims=True))
    counted = batch.targets != IGNORE
    picked = np.take_along_axis(log_probs, np.where(counted, batch.targets, 0)[..., None], -1)[..., 0]
    return -(picked * counted).sum() / counted.sum()


def gradients(
    config: ModelConfig,
    lora: LoraConfig,
    weights: Mapping[str, np.ndarray],
    batch: Batch,
    dropout: LoraDropout | None = None,
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict,
) -> dict[str, np.ndarray]:
    """d loss / d every adapter's element, float64, one complex step an element. ``change``: a planted mistake in what
    the weights are taken for."""
    held = {name: value.astype(np.complex128) for name, value in weights.items()}
    found = {}
    for name in (n for n in weights if n.endswith(("lora_a", "lora_b"))):
        gradient = np.empty(weights[name].shape)
        for at in np.ndindex(*gradient.shape):
            held[name][at] += 1j * STEP
            gradient[at] = loss(config, lora, change(held), batch, dropout).imag / STEP
            held[name][at] = weights[name][at]
        found[name] = gradient
    return found
