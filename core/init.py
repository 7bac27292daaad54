"""Initial weights that do not depend on backend, layout or order.

Element i of parameter ``name`` is a pure function of (seed, name, i), so any slice can be made without the whole and
two ranks, or two frameworks, make the same numbers. The counter-based generator is splitmix64's output function
(Steele, Lea and Flood, 2014) over consecutive counters; two 32-bit halves give one normal by Box and Muller in float64.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from core.config import ModelConfig
from core.params import MATRIX, ParamSpec, parameter_table

_CHUNK = 1 << 20  # elements made at once: a table of any size costs a few tens of MB on top of itself


def init_tensor(
    name: str, config: ModelConfig, seed: int, index: tuple[slice, ...] | None = None, scheme: str = "normal"
) -> np.ndarray:
    """float32 initial value of a parameter, or of the slice ``index`` of it.

    ``normal``: N(0, matrix_init_std) for matrix-like parameters and N(0, init_std) for embedding and head, gains 1,
    biases 0 (released initialisation; without matrix_init_std all have init_std). ``strong``: weights for tests,
    large and with random gains and biases, so that a missed bias or a wrong packing changes the logits visibly.
    Raises KeyError for a name that the model does not have.
    """
    spec = parameter_table(config)[name]
    mean, std = _moments(spec, config, scheme)
    starts, shape = _extent(spec.shape, index)
    if std == 0.0:
        return np.full(shape, mean, np.float32)
    out = np.empty(shape, np.float32)
    flat = out.reshape(-1)
    key = _key(seed, name)
    for begin in range(0, flat.size, _CHUNK):
        local = np.arange(begin, min(begin + _CHUNK, flat.size), dtype=np.int64)
        counter = _global_index(local, shape, spec.shape, starts)
        flat[begin : begin + local.size] = mean + std * _normal(key, counter)
    if scheme == "strong" and spec.kind == "norm":
        np.clip(out, 0.6, 1.4, out=out)
    return out


def init_weights(config: ModelConfig, seed: int, scheme: str = "normal") -> dict[str, np.ndarray]:
    """All initial weights of a model by logical name, float32."""
    return {name: init_tensor(name, config, seed, scheme=scheme) for name in parameter_table(config)}


def _moments(spec: ParamSpec, config: ModelConfig, scheme: str) -> tuple[float, float]:
    if scheme == "normal":
        own = config.matrix_init_std if spec.mup_class == MATRIX else None
        std = config.init_std if own is None else own
        return {"norm": (1.0, 0.0), "bias": (0.0, 0.0)}.get(spec.kind, (0.0, std))
    fan_in = spec.shape[-1]
    # The embedding stays small so that the norm's epsilon is visible; the head spreads the logits to about 3.
    strong = {"norm": (1.0, 0.23), "bias": (0.0, 0.3), "embedding": (0.0, 0.02), "head": (0.0, 3.0 / math.sqrt(fan_in))}
    return strong.get(spec.kind, (0.0, 1.15 / math.sqrt(fan_in)))


def _key(seed: int, name: str) -> np.uint64:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def _extent(shape: tuple[int, ...], index: tuple[slice, ...] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and length per axis of a slice with unit steps."""
    bounds = [s.indices(n) for s, n in zip(index or (slice(None),) * len(shape), shape, strict=True)]
    if any(step != 1 for _, _, step in bounds):
        raise ValueError("initial weights are sliced with unit steps only")
    return tuple(b[0] for b in bounds), tuple(max(b[1] - b[0], 0) for b in bounds)


def _global_index(
    local: np.ndarray, shape: tuple[int, ...], whole: tuple[int, ...], starts: tuple[int, ...]
) -> np.ndarray:
    """Flat index in the whole tensor of each flat index of the slice."""
    if shape == whole:
        return local
    axes = np.unravel_index(local, shape)
    return np.ravel_multi_index(tuple(a + s for a, s in zip(axes, starts, strict=True)), whole)


def _normal(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = key + (counter.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    # (n + 0.5) / 2^32 lies strictly inside (0, 1), so the logarithm is finite.
    high = ((z >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    low = ((z & np.uint64(0xFFFFFFFF)).astype(np.float64) + 0.5) * 2.0**-32
    return np.sqrt(-2.0 * np.log(high)) * np.cos(2.0 * np.pi * low)
