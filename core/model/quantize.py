"""int8 quantisation of weights for generation, in numpy, so that both backends hold identical weights.

Only matrices of linear layers, the head included, are quantised: they are what a step of decoding reads. Each output
channel has a factor of its own, its largest weight over 127; zero stays zero. Norms, biases, embeddings, keys and
values stay as they are. A CPU with compiled operators multiplies in integers and rounds the rows that meet these
matrices too (kernels/int8.py); elsewhere products are taken of whole numbers that became floating-point ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.params import parameter_table

QUANTIZATIONS = ("none", "int8")
LEVELS = 127
LINEAR = ("matrix", "head")  # kinds of core.model.params that are multiplied with


class Int8Matrix(NamedTuple):
    """values int8 [out, in] times factors float32 [out]."""

    values: np.ndarray
    factors: np.ndarray


def quantize(weight: np.ndarray) -> Int8Matrix:
    """A matrix [out, in] of any floating type. A weight is off by at most half a factor, 1/254 of its row's largest."""
    wide = np.asarray(weight).astype(np.float32)
    factors = np.abs(wide).max(1, initial=0.0) / np.float32(LEVELS)
    divisor = np.where(factors > 0.0, factors, np.float32(1.0))
    # The division may come out a hair above 127 where the row's largest weight is met.
    values = np.clip(np.rint(wide / divisor[:, None]), -LEVELS, LEVELS)
    return Int8Matrix(values.astype(np.int8), factors)


def quantizing(config: ModelConfig, get: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray | Int8Matrix]:
    """``get`` with the matrices of linear layers quantised as they are read, one at a time."""
    kinds = {name: spec.kind for name, spec in parameter_table(config).items()}
    return lambda name: quantize(get(name)) if kinds[name] in LINEAR else get(name)
