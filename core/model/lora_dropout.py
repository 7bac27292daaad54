"""Dropout masks of adapters, a pure function of an element: seed, step, sample, layer, input, place and channel.

Whoever holds an element, after whatever split of batch, sequence or channels, in either framework and again in a
recomputed forward pass, finds the same mask. The layers that read one input (q, k and v; gate and up) share its mask.

The generator is splitmix64's output function (Steele, Lea and Flood, 2014) over counters. Its 64 bits decide four
neighbouring channels, so a rate is a multiple of 2^-16: 0.05 is 3277/65536. What is kept is multiplied by
1 / (1 - rate) of that rate, so the expectation is exact.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

INPUTS = {"q": 0, "o": 1, "up": 2, "down": 3}  # the inputs of a block, by a layer that reads each
_LEVELS = 1 << 16
_LANES = 4  # channels decided by one 64-bit number
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)), (31, np.uint64(1)))


@dataclass(frozen=True, eq=False)
class LoraDropout:
    """The masks of one micro-batch on one rank. rate in [0, 1); samples [B]: numbers of its rows in the global batch;
    places [B or 1, s]: places in the whole row of the positions held."""

    rate: float
    seed: int
    step: int
    samples: np.ndarray
    places: np.ndarray

    @property
    def threshold(self) -> int:
        """An element is dropped where its 16 bits are below this."""
        return round(self.rate * _LEVELS)

    @property
    def factor(self) -> float:
        """What a kept element is multiplied by."""
        return _LEVELS / (_LEVELS - self.threshold)

    def block(self, layer: int, hidden_size: int, columns: tuple[slice, slice]) -> BlockDropout:
        """The masks of one block, of whose o and down matrices this rank holds ``columns``."""
        return BlockDropout(
            self, layer, {"q": slice(0, hidden_size), "up": slice(0, hidden_size), "o": columns[0], "down": columns[1]}
        )

    def keep(self, layer: int, target: str, channels: slice) -> np.ndarray:
        """bool [B, s, n]: which elements of the input of ``target`` (INPUTS) in block ``layer`` are kept, for the
        channels ``channels`` (start and stop) of it."""
        word = hashlib.sha256(f"dropout/{self.seed}/{self.step}/{layer}/{INPUTS[target]}".encode()).digest()
        key = np.uint64(int.from_bytes(word[:8], "little"))
        rows = (self.samples.astype(np.uint64)[:, None] << np.uint64(32)) | self.places.astype(np.uint64)
        first, last = channels.start // _LANES, -(-channels.stop // _LANES)
        groups = np.arange(first, last, dtype=np.uint64)
        # Rows are hashed before the channels are counted from them, so that no two rows share counters.
        bits = _mixed(_mixed(rows + key)[..., None] + groups).astype("<u8", copy=False)
        lanes = bits.view("<u2")
        start = channels.start - first * _LANES
        return lanes[..., start : start + channels.stop - channels.start] >= np.uint16(self.threshold)


@dataclass(frozen=True, eq=False)
class BlockDropout:
    """The masks of one block; ``channels``: what of each input this rank holds."""

    masks: LoraDropout
    layer: int
    channels: dict[str, slice]

    @property
    def factor(self) -> float:
        """What a kept element is multiplied by."""
        return self.masks.factor

    def keep(self, target: str) -> np.ndarray:
        """bool [B, s, n] of the input that ``target`` (INPUTS) reads."""
        return self.masks.keep(self.layer, target, self.channels[target])


def _mixed(counter: np.ndarray) -> np.ndarray:
    """splitmix64's output for each counter, uint64 of its shape; ``counter`` is used up."""
    with np.errstate(over="ignore"):
        counter *= _GOLDEN
        shifted = np.empty_like(counter)
        for shift, factor in _MIX:
            np.right_shift(counter, np.uint64(shift), out=shifted)
            counter ^= shifted
            if factor != 1:
                counter *= factor
    return counter
