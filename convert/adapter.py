"""Adapters opened from any folder, and models with an adapter merged into their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from telechat_twins.convert.copy import DTYPES, cast
from telechat_twins.convert.hf.peft import check_adapter_folder, is_peft, open_peft
from telechat_twins.convert.rounding import rounded
from telechat_twins.convert.source import ModelSource, open_model
from telechat_twins.core.checkpoint.adapter import A, Adapter, B, check_base, open_adapter
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import standing
from telechat_twins.core.model.config import ModelConfig

BLOCK = 1 << 22  # elements of a matrix that are in float64 at once


def open_any_adapter(path: str | Path, source: ModelSource, verify: bool = True) -> Adapter:
    """An adapter of ours or of PEFT's, held against the model it is to be used with; notes on what was assumed.

    UserError for a folder that is neither, and for an adapter of another model.
    """
    config, model = source.config, source.path
    folder = standing(Path(path))
    if is_peft(folder):
        adapter = open_peft(folder, config)
    elif (folder / "config.json").is_file():
        raise UserError(f"{folder}: is a released model, not an adapter; give a folder with adapter_config.json")
    else:
        check_adapter_folder(folder)
        adapter = open_adapter(folder, verify)
    notes = check_base(adapter, config, source.read, model)
    return dataclasses.replace(adapter, notes=(*adapter.notes, *notes))


def adapter_of(model: str, path: str) -> Adapter:
    """The adapter at ``path`` of the model at ``model``, for a rank that needs parts; both were verified."""
    return open_any_adapter(path, open_model(model, verify=False), verify=False)


def merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, dtype: np.dtype) -> np.ndarray:
    """weight [out, in] + scale b [out, r] a [r, in], in float64, rounded once to ``dtype``."""
    out = np.empty(weight.shape, dtype)
    wide = a.astype(np.float64) * scale
    rows = max(1, BLOCK // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        out[part] = rounded(weight[part].astype(np.float64) + b[part].astype(np.float64) @ wide, dtype)
    return out


class MergedSource(ModelSource):
    """A model whose weights have an adapter added to them, as they are read."""

    def __init__(self, source: ModelSource, adapter: Adapter, dtype: str | None = None) -> None:
        """``dtype``: what all weights are stored in; None keeps each one's own."""
        self.source, self.adapter, self._to = source, adapter, dtype
        self.config: ModelConfig = source.config
        self.path, self.tokenizer_path = source.path, source.tokenizer_path
        self.record, self.assets = source.record, source.assets
        self.notes = (*source.notes, *adapter.notes)

    def dtype(self, name: str) -> np.dtype:
        return DTYPES[self._to] if self._to else self.source.dtype(name)

    def tensor(self, name: str) -> np.ndarray:
        weight = self.source.tensor(name)
        module = self.adapter.modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if module is None:
            return cast(weight, self._to, name)
        a, b = (self.adapter.read(f"{module.name}.{half}") for half in (A, B))
        for half, array in ((A, a), (B, b)):
            if not np.isfinite(array).all():
                raise UserError(f"{self.adapter.path}: {module.name}.{half}: holds values that are not finite")
        out = merged(weight, a, b, module.scale, self.dtype(name))
        if not np.isfinite(out).all() and np.isfinite(weight).all():
            raise UserError(
                f"{self.adapter.path}: {name}: with the adapter a value is not finite in {out.dtype}; give --dtype "
                "float32 or bfloat16"
            )
        return out

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        self.source.verify(share)

    def export(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.source.export(tensors)

    def files(self) -> list[Path]:
        return self.source.files()
