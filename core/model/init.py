"""Counter-based weight initialisation, independent of backend, layout and order.

Element i of parameter ``name`` is a pure function of (seed, name, i), so any slice can be made without the whole and
two ranks, or two frameworks, make the same numbers. The counter-based generator is splitmix64's output function
(Steele, Lea and Flood, 2014) over consecutive counters; two 32-bit halves give one normal by Box and Muller in float64.
The cosine is a polynomial of products and sums, which every processor rounds alike.
"""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.params import MATRIX, ParamSpec, parameter_table

_CHUNK = 1 << 15  # elements made at once: few enough for a processor's cache


def init_tensor(
    name: str,
    config: ModelConfig,
    seed: int,
    index: tuple[slice, ...] | None = None,
    scheme: str = "normal",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """float32 initial value of a parameter, or of the slice ``index`` of it; written to ``out`` where it is given.

    ``normal``: N(0, matrix_init_std) for matrix-like parameters and N(0, init_std) for embedding and head, gains 1,
    biases 0 (released initialisation; without matrix_init_std all have init_std). ``strong``: weights for tests,
    large and with random gains and biases, so that a missed bias or a wrong packing changes the logits visibly.
    Raises KeyError for a name that the model does not have.
    """
    spec = parameter_table(config)[name]
    mean, std = _moments(spec, config, scheme)
    limits = (0.6, 1.4) if scheme == "strong" and spec.kind == "norm" else None
    return draw_normal(name, spec.shape, seed, mean, std, index, out, limits)


def draw_normal(
    name: str,
    shape: tuple[int, ...],
    seed: int,
    mean: float,
    std: float,
    index: tuple[slice, ...] | None = None,
    out: np.ndarray | None = None,
    limits: tuple[float, float] | None = None,
) -> np.ndarray:
    """float32 N(mean, std) for a vector or matrix of ``shape``, or for the slice ``index`` of it; element i depends on
    (seed, name, i) alone. ``limits``: values beyond are set to them."""
    starts, extent = _extent(shape, index)
    out = np.empty(extent, np.float32) if out is None else out
    if std == 0.0:
        out[...] = mean
        return out
    key = _key(seed, name)
    table, first_row = (out, starts[0]) if len(extent) == 2 else (out[None], 0)
    rows, columns = table.shape
    width = max(1, min(columns, _CHUNK))
    for row, column in itertools.product(range(0, rows, height := max(1, _CHUNK // width)), range(0, columns, width)):
        part = table[row : row + height, column : column + width]
        down = np.arange(part.shape[0], dtype=np.uint64) + np.uint64(first_row + row)
        across = np.arange(part.shape[1], dtype=np.uint64) + np.uint64(starts[-1] + column)
        values = _normal(key, down[:, None] * np.uint64(shape[-1]) + across)
        values *= std
        values += mean
        if limits is not None:
            np.clip(values, *limits, out=values)
        part[...] = values.astype(np.float32)  # rounded to it first, whatever ``out`` holds
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


# sin(2 pi y) / y in powers of y^2, to 3e-16 where |y| <= 1/4; the highest power first.
_SINE = [(-1) ** k * (2.0 * math.pi) ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(9, -1, -1)]


def _normal(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """float64 of the shape of ``counter`` (uint64), which is used up."""
    z, shifted = counter, np.empty_like(counter)
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
    high = shifted.view(np.int64).astype(np.float64)  # below 2^32, and signed numbers convert in half the time
    z &= np.uint64(0xFFFFFFFF)
    low = z.view(np.int64).astype(np.float64)
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
