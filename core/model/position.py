"""Rotary position tables in numpy, one source for both backends: plain, with length scaling, YaRN, and xPos.

TeleChat2, past the trained length two things change, in training and in inference alike (released modeling_telechat.py,
RotaryEmbedding): the rotary base grows in steps (NTK-aware), and cos and sin are multiplied by an attention scale, so
that attention logits grow by its square. In TeleChat-52B the base grows by the same steps without TeleChat2's exponent,
and nothing else. Other models rotate plainly at any length.

YaRN (Peng et al., arXiv 2309.00071) stretches positions once and for all lengths: channels that turn often within
base_seqlen stay, slow ones turn yarn_factor times slower, those between are mixed. cos and sin are multiplied by
yarn_mscale * ln(yarn_factor) + 1, where TeleChat3 has 0.07 in place of the paper's 0.1.

xPos (Sun et al., arXiv 2212.10554) lets a channel of the product of query m and key n decay as zeta^((m - n) / base).
The released FLM code centres the exponents on the keys at hand, which cancels in the product; here their origin is
fixed, so that keys in a cache or on another rank never have to be scaled again.
"""

from __future__ import annotations

import math

import numpy as np

from telechat_twins.core.model.config import ModelConfig


def ntk_alpha(seq_len: int, training_seqlen: int, base_seqlen: int) -> float:
    """max(2^ceil(log2(S / base_seqlen) + 1) - 1, 1) with S = max(seq_len, training_seqlen)."""
    table_len = max(seq_len, training_seqlen)
    return max(2.0 ** math.ceil(math.log2(table_len / base_seqlen) + 1.0) - 1.0, 1.0)


def scaled_base(config: ModelConfig, seq_len: int) -> float:
    """ntk: theta * alpha^(D / (D - 2)), the base whose slowest channel is interpolated alpha times; ntk-theta: theta *
    alpha; else theta."""
    if not config.position.startswith("ntk"):
        return config.rope_theta
    alpha = ntk_alpha(seq_len, config.training_seqlen, config.base_seqlen)
    if config.position == "ntk-theta":
        return config.rope_theta * alpha
    dim = config.head_dim
    return config.rope_theta * alpha ** (dim / (dim - 2)) if dim > 2 else config.rope_theta


def attention_scale(config: ModelConfig, seq_len: int) -> float:
    """The released ``mscale``. ntk: 0.1 * ln(S / training_seqlen) + 1 beyond the trained length, else 1; yarn: the same
    at every length; else 1."""
    if config.position == "yarn":
        return config.yarn_mscale * math.log(config.yarn_factor) + 1.0
    if config.position != "ntk":
        return 1.0
    ratio = max(seq_len, config.training_seqlen) / config.training_seqlen
    return 0.1 * math.log(ratio) + 1.0 if ratio > 1.0 else 1.0


def rope_tables(
    config: ModelConfig, positions: np.ndarray, seq_len: int, dtype: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin of shape ``positions.shape + (D // 2,)`` for half rotation, attention scale included.

    ``seq_len`` is the length that decides the scaling (the whole row, cached tokens included), not the number of
    positions asked for. Frequencies and angles are float32 as released; ``dtype=np.float64`` computes all of it in
    float64 for reference runs. ``config.table_dtype == "float16"`` reproduces the release's rounding:
    cos to float16, then times the scale, rounded to float16 again.
    """
    cos, sin = _circle(config, positions, scaled_base(config, seq_len), dtype)
    scale = attention_scale(config, seq_len)
    return _scaled(cos, scale, config), _scaled(sin, scale, config)


def _circle(config: ModelConfig, positions: np.ndarray, base: float, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """cos, sin of a rotary base, without attention scale."""
    exponent = np.arange(0, config.head_dim, 2).astype(dtype) / dtype(config.head_dim)
    # Powers and cosines are taken in float64 and rounded once: the same bits on every processor, while the rounding
    # steps (power, reciprocal, angle) stay where the released float32 code has them.
    period = (base ** exponent.astype(np.float64)).astype(dtype)
    frequency = dtype(1) / period  # [D/2]
    if config.position == "yarn":
        kept = yarn_kept(config, base, dtype)
        frequency = dtype(1) / (dtype(config.yarn_factor) * period) * (1 - kept) + frequency * kept
    angle = (np.asarray(positions).astype(dtype)[..., None] * frequency).astype(np.float64)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def yarn_kept(config: ModelConfig, base: float, dtype: type = np.float32) -> np.ndarray:
    """How far each channel keeps its frequency under YaRN: [D/2] from 1 (fast) down to 0 (stretched in full).

    Channel i turns base_seqlen / (2 pi base^(2i/D)) times within base_seqlen, so n turns belong to channel
    D ln(base_seqlen / (2 pi n)) / (2 ln base). Between the channels of yarn_fast and yarn_slow turns, rounded outwards,
    the share falls linearly.
    """
    dim = config.head_dim

    def channel(turns: float) -> float:
        return dim * math.log(config.base_seqlen / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(channel(config.yarn_fast)), 0)
    high = min(math.ceil(channel(config.yarn_slow)), dim - 1)
    # The published code widens an empty range by 0.001.
    ramp = (np.arange(dim // 2).astype(dtype) - dtype(low)) / dtype(high - low or 0.001)
    return dtype(1) - np.clip(ramp, 0, 1)


def xpos_scales(
    config: ModelConfig, positions: np.ndarray, dtype: type = np.float32
) -> tuple[np.ndarray, np.ndarray] | None:
    """What xPos multiplies rotated queries and keys by: two tables like those of ``rope_tables``; None without xPos.

    zeta_j^(+-p / xpos_scale_base) with zeta_j = (2j + 0.4 D) / (1.4 D) and p counted from the middle of ``max_seqlen``,
    where the two ends of the range are equally far from 1 (at 2048 tokens 0.08 and 12).
    """
    if config.position != "xpos":
        return None
    dim = config.head_dim
    zeta = (np.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)
    power = (np.asarray(positions)[..., None] - config.max_seqlen // 2) / config.xpos_scale_base
    return (zeta**power).astype(dtype), (zeta**-power).astype(dtype)


class RotaryRows:
    """Rows of ``rope_tables`` and ``xpos_scales``, bit for bit, for tokens that each have a length of their own.

    Cosines are kept by rotary base: there are few bases, the base grows in powers of two. The attention scale, which
    differs from length to length, is multiplied on afterwards, as there.
    """

    def __init__(self, config: ModelConfig, dtype: type = np.float32) -> None:
        self._config, self._dtype = config, dtype
        self._scalings: dict[int, tuple[float, float]] = {}
        self._circles: dict[float, tuple[np.ndarray, np.ndarray]] = {}
        self._decays: tuple[np.ndarray, ...] = ()

    def scaling(self, seq_len: int) -> tuple[float, float]:
        """Rotary base and attention scale of a row of ``seq_len`` tokens."""
        if seq_len not in self._scalings:
            if len(self._scalings) >= _MOST_LENGTHS:
                self._scalings.clear()
            self._scalings[seq_len] = scaled_base(self._config, seq_len), attention_scale(self._config, seq_len)
        return self._scalings[seq_len]

    def rows(self, positions: np.ndarray, seq_lens: np.ndarray) -> tuple[np.ndarray, ...]:
        """cos, sin and, with xPos, the scales of queries and keys: each [N, D/2] for positions and lengths [N]."""
        room = -(-(int(positions.max()) + 1) // _ROWS) * _ROWS
        distinct, which = np.unique(seq_lens, return_inverse=True)
        bases, scales = np.array([self.scaling(int(length)) for length in distinct]).T
        if (bases == bases[0]).all():
            found = [table[positions] for table in self._circle(float(bases[0]), room)]
        else:
            found = [np.empty((len(positions), self._config.head_dim // 2), self._dtype) for _ in range(2)]
            for base in np.unique(bases):
                mine = np.flatnonzero(bases[which] == base)
                for out, table in zip(found, self._circle(float(base), room), strict=True):
                    out[mine] = table[positions[mine]]
        tables = [_scaled(table, scales[which][:, None], self._config) for table in found]
        if self._config.position != "xpos":
            return tuple(tables)
        if not self._decays or len(self._decays[0]) < room:
            self._decays = xpos_scales(self._config, np.arange(room), self._dtype) or ()
        return *tables, *(table[positions] for table in self._decays)

    def _circle(self, base: float, room: int) -> tuple[np.ndarray, np.ndarray]:
        if base not in self._circles or len(self._circles[base][0]) < room:
            self._circles[base] = _circle(self._config, np.arange(room), base, self._dtype)
        return self._circles[base]


_ROWS = 1024  # positions by which kept tables grow
_MOST_LENGTHS = 4096  # whose scaling is kept


def _scaled(table: np.ndarray, scale: float | np.ndarray, config: ModelConfig) -> np.ndarray:
    if config.table_dtype == "float16":
        rounded = table.astype(np.float16).astype(np.float32)
        return (rounded * np.float32(scale)).astype(np.float16).astype(table.dtype)
    return table * np.asarray(scale, table.dtype)
