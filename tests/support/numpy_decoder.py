"""TeleChat2's decoder in numpy and float64, from the published formulas: what packing and names are judged by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from telechat_twins.core.model.config import ModelConfig


def logits(
    config: ModelConfig,
    get: Callable[[str], np.ndarray],
    ids: np.ndarray,
    dtype: type = np.float64,
    more: Callable[[str, np.ndarray], np.ndarray | float] = lambda name, x: 0.0,
) -> np.ndarray:
    """TeleChat2's logits [B, S, V] in float64, written from the published formulas (S within the trained length).

    In complex128 the imaginary parts carry a derivative: every step is analytic. ``more(name, x)`` is added to the
    product of x with the matrix ``name``.
    """
    length, dim, heads, groups = ids.shape[1], config.head_dim, config.num_heads, config.num_kv_heads
    angle = np.arange(length)[:, None] * config.rope_theta ** (-np.arange(0, dim, 2) / dim)
    cos, sin = np.tile(np.cos(angle), 2), np.tile(np.sin(angle), 2)
    hidden_from = np.triu(np.full((length, length), -np.inf), 1)

    def weight(name):
        return get(name).astype(dtype)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight(name)

    def product(x, name):
        return x @ weight(name).T + more(name, x)

    def project(x, name):
        return product(x, name).reshape(*x.shape[:2], -1, dim).transpose(0, 2, 1, 3)

    def rotate(x):
        return x * cos + np.concatenate([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin

    x = weight("embed.weight")[ids]
    for i in range(config.num_layers):
        at = f"layers.{i}."
        h = norm(x, at + "attn_norm.weight")
        q, k, v = (project(h, f"{at}attn.{part}.weight") for part in "qkv")
        k, v = (np.repeat(part, heads // groups, axis=1) for part in (k, v))
        scores = rotate(q) @ rotate(k).swapaxes(-1, -2) / np.sqrt(dim) + hidden_from
        scores = np.exp(scores - scores.real.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        x = x + product(mixed, at + "attn.o.weight") + weight(at + "attn.o.bias")
        h = norm(x, at + "ffn_norm.weight")
        gate, up = product(h, at + "ffn.gate.weight"), product(h, at + "ffn.up.weight")
        x = x + product(gate / (1 + np.exp(-gate)) * up, at + "ffn.down.weight") + weight(at + "ffn.down.bias")
    return norm(x, "norm.weight") @ weight("head.weight").T
