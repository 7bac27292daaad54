"""Low-rank adapters in generation: the base's weights stay, and each sequence of a step goes through its own adapter.

The tokens of a step belong to sequences with different adapters, or with none. A linear layer computes W x + b for all
of them at once; each adapter that the step uses then adds scale B A x to its tokens (the rows of the others are
multiplied by 0 between A and B).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from telechat_twins.core.checkpoint.adapter import A, Adapter, B

BASE = 0  # the number of no adapter; the first adapter is 1


@dataclass(frozen=True)
class Pair:
    """A [r, in] and scale B [out, r] of one linear layer, float32: what a rank holds of them."""

    a: np.ndarray
    b: np.ndarray


ReadPair = Callable[[str], Pair | None]  # by the linear's logical name, layers.3.attn.q; None: it has no adapter


def pair_reader(adapter: Adapter, boxes: Mapping[str, tuple[slice, ...]] | None = None) -> ReadPair:
    """The pairs of an adapter. ``boxes``: of each weight matrix this rank's box; columns cut A, rows cut B.

    So a layer whose rows are split needs all of A x, which every rank computes, and one whose columns are split gets a
    part of B A x from every rank, which is summed with the parts of W x.
    """

    def read(linear: str) -> Pair | None:
        module = adapter.modules.get(linear)
        if module is None:
            return None
        a, b = (adapter.read(f"{linear}.{half}").astype(np.float64) for half in (A, B))
        if boxes is not None:
            rows, columns = boxes[f"{linear}.weight"]
            a, b = a[:, columns], b[rows]
        return Pair(a.astype(np.float32), (b * module.scale).astype(np.float32))

    return read


def adapters_digest(adapters: Iterable[Adapter]) -> str | None:
    """Hex SHA-256 of the tensors of all adapters; None without any."""
    digest, some = hashlib.sha256(), False
    for adapter in adapters:
        some = True
        for name, value in adapter.tensors():
            digest.update(f"{name} {value.shape}".encode() + value.tobytes())
    return digest.hexdigest() if some else None


def used_adapters(owners: np.ndarray) -> list[tuple[int, np.ndarray | None]]:
    """``owners`` int32 [N], each token's adapter -> (number, its tokens as 1.0 of float32 [1, N, 1]) of all that
    occur; None in place of the mask where all tokens are of one adapter."""
    numbers = [int(number) for number in np.unique(owners) if number != BASE]
    if len(numbers) == 1 and (owners == numbers[0]).all():
        return [(numbers[0], None)]
    return [(number, (owners == number).astype(np.float32)[None, :, None]) for number in numbers]
