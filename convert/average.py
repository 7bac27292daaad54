"""Weighted average of models: the sum in float64 of every tensor, rounded once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from telechat_twins.convert.adapter import BLOCK
from telechat_twins.convert.copy import DTYPES
from telechat_twins.convert.rounding import rounded
from telechat_twins.convert.source import ModelSource
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.params import parameter_table


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """The share of each of ``count`` models: ``weights`` over their sum, or 1 / count. UserError for weights that are
    no average's."""
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise UserError(f"--weights: {len(weights)} for {count} checkpoints; give one for each, in their order")
    if not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
        said = " ".join(f"{weight:g}" for weight in weights)
        raise UserError(f"--weights: must be 0 or more, and their sum above 0 and finite, found {said}")
    return [weight / math.fsum(weights) for weight in weights]


class AverageSource(ModelSource):
    """The weighted average of models of one config, read tensor by tensor. What is not a weight is the first's."""

    def __init__(self, sources: Sequence[ModelSource], weights: Sequence[float], dtype: str | None = None) -> None:
        """``dtype``: in which the averages are stored, where the models differ. UserError for models of different
        configs, or dtypes without one."""
        self._sources, self._weights = list(sources), list(weights)
        self._to = dtype
        first = sources[0]
        self.config = first.config
        self.path, self.tokenizer_path = first.path, first.tokenizer_path
        self.notes, self.assets = first.notes, first.assets
        for other in sources[1:]:
            _check(first, other, dtype)
        self.record = first.record

    def dtype(self, name: str) -> np.dtype:
        return DTYPES[self._to] if self._to else self._sources[0].dtype(name)

    def tensor(self, name: str) -> np.ndarray:
        shape, dtype = parameter_table(self.config)[name].shape, self.dtype(name)
        out = np.empty(shape, dtype)
        rows = max(1, BLOCK // (shape[1] if len(shape) == 2 else 1))
        for start in range(0, shape[0], rows):
            box = (slice(start, min(start + rows, shape[0])), *(slice(0, size) for size in shape[1:]))
            total = np.zeros(out[box].shape, np.float64)
            for weight, source in zip(self._weights, self._sources, strict=True):
                if weight:
                    part = source.read(name, box)
                    if not np.isfinite(part).all():
                        raise UserError(f"{source.path}: {name} has a value that is not finite; leave this one out")
                    total += weight * part.astype(np.float64)
            out[box] = rounded(total, dtype)
        if not np.isfinite(out).all():
            raise UserError(f"{name}: the average is beyond the range of {dtype}; give --dtype float32")
        return out

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        for source in self._sources:
            source.verify(share)

    def export(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._sources[0].export(tensors)

    def files(self) -> list[Path]:
        return [file for source in self._sources for file in source.files()]


def _check(first: ModelSource, other: ModelSource, dtype: str | None) -> None:
    mine, theirs = first.config.to_dict(), other.config.to_dict()
    for field, value in mine.items():
        if theirs[field] != value:
            raise UserError(
                f"{other.path}: {field} is {theirs[field]}, and {value} in {first.path}; only checkpoints of one "
                "config have an average"
            )
    if dtype is not None:
        return
    for name in first.names():
        if first.dtype(name) != other.dtype(name):
            raise UserError(
                f"{other.path}: {name} is {other.dtype(name)}, and {first.dtype(name)} in {first.path}; say with "
                "--dtype in which the average is to be stored"
            )
