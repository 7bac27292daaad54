"""Keyed permutation of 0..n-1, one place at a time: stateless, without memory, identical on every machine.

A balanced Feistel network permutes the next power of four; places that fall outside 0..n-1 walk on until they fall
inside. Integer arithmetic only, so no library's random generator can change the order of a run.
"""

from __future__ import annotations

import hashlib

_MASK = (1 << 64) - 1
_ROUNDS = 8


class Permutation:
    """A bijection of range(n) chosen by ``key``: call it with an index."""

    def __init__(self, n: int, *key: int | str):
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, found {n}")
        self.n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(repr((n, *key)).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(index)
        low = (1 << self._half) - 1
        while True:
            left, right = index >> self._half, index & low
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & low)
            index = left << self._half | right
            if index < self.n:
                return index


def _mix(x: int) -> int:
    """SplitMix64's finaliser: every input bit reaches every output bit."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
