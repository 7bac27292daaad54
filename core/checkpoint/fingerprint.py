"""Fingerprint of a model's weights, by which an adapter knows its base.

A SHA-256 over samples of every tensor: cheap for a model of any size, and the same for every file format, layout and
backend that holds the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np

from telechat_twins.core.checkpoint.source import ReadBox
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.params import parameter_table

SAMPLE = 4096  # elements at either end of a tensor


def fingerprint(config: ModelConfig, read: ReadBox) -> str:
    """Hex digest of the model whose weights ``read(name, box)`` returns.

    Per logical name, in the order of core.model.params.parameter_table: name, shape, and the first and the last SAMPLE
    elements (all of them, twice, of a smaller tensor) as little-endian float32 in row-major order.
    """
    digest = hashlib.sha256()
    for name, spec in parameter_table(config).items():
        digest.update(f"{name} {list(spec.shape)}\n".encode())
        for last in (False, True):
            digest.update(_end(name, spec.shape, read, last).astype("<f4").tobytes())
    return digest.hexdigest()


def _end(name: str, shape: tuple[int, ...], read: ReadBox, last: bool) -> np.ndarray:
    """The first or the last SAMPLE elements of a vector or matrix, of which only the rows that hold them are read."""
    rows, width = shape[0], shape[1] if len(shape) == 2 else 1
    count = min(rows, -(-SAMPLE // width))
    taken = slice(rows - count, rows) if last else slice(0, count)
    flat = np.asarray(read(name, (taken, slice(0, width)) if len(shape) == 2 else (taken,))).reshape(-1)
    return flat[-SAMPLE:] if last else flat[:SAMPLE]
