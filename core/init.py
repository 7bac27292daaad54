"""Initial weights that do not depend on backend, layout or order.

Element i of parameter ``name`` is a pure function of (seed, name, i), so any slice can be made without the whole and
two ranks, or two frameworks, make the same numbers. The counter-based generator is splitmix64's output function
(Steele, Lea and Flood, 2014) over consecutive counters; two 32-bit halves give one normal by Box and Muller in float64.
The cosine is a polynomial of products and sums, which every processor rounds alike.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from core.config import ModelConfig
from core.params import MATRIX, ParamSpec, parameter_table

_CHUNK = 1 << 15  # elements made at once: few enough for a processor's cache


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
    """Flat index in the whole tensor of each flat index of the slice; tensors have one or two axes."""
    if len(shape) == 1:
        return local + starts[0]
    if shape[1] == whole[1]:
        return local + starts[0] * whole[1]
    row, column = np.divmod(local, shape[1])
    return (row + starts[0]) * whole[1] + (column + starts[1])


# sin(2 pi y) / y in powers of y^2, to 3e-16 where |y| <= 1/4; the highest power first.
_SINE = [(-1) ** k * (2.0 * math.pi) ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(9, -1, -1)]


def _normal(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """float64 of the shape of ``counter`` (int64, at least 0)."""
    z = counter.astype(np.uint64)
    shifted = np.empty_like(z)
    with np.errstate(over="ignore"):
        z += np.uint64(1)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z += key
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            np.right_shift(z, np.uint64(shift), out=shifted)
            z ^= shifted
            z *= np.uint64(factor)
    # (n + 0.5) / 2^32 lies strictly inside (0, 1), so the logarithm is finite.
    np.right_shift(z, np.uint64(32), out=shifted)
    high = shifted.astype(np.float64)
    z &= np.uint64(0xFFFFFFFF)
    low = z.astype(np.float64)
    for half in (high, low):
        half += 0.5
        half *= 2.0**-32
    np.log(high, out=high)
    high *= -2.0
    np.sqrt(high, out=high)
    # cos(2 pi u) = -sin(2 pi y) with y = 1/4 - |u - 1/2|.
    low -= 0.5
    np.abs(low, out=low)
    np.subtract(0.25, low, out=low)
    square = low * low
    cosine = np.full_like(square, _SINE[0])
    for coefficient in _SINE[1:]:
        cosine *= square
        cosine += coefficient
    cosine *= low
    cosine *= high
    return np.negative(cosine, out=cosine)
