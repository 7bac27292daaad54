"""Low-rank adapters with random numbers in them, for the golden models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from telechat_twins.convert.source import ModelSource
from telechat_twins.core.checkpoint.adapter import Adapter, adapter_shapes, linear_names
from telechat_twins.core.checkpoint.fingerprint import fingerprint
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.lora import TARGETS, AdapterBase, AdapterModule
from tests.support.frameworks import golden_source

FAMILIES = ("telechat2_gqa", "teleflm", "telechat52b_like", "flm101b_like")


def golden_model(case: str) -> ModelSource:
    return golden_source(f"{case}/weights.safetensors", f"{case}/config.json")


def modules(
    config: ModelConfig, targets: tuple[str, ...] = TARGETS, rank: int = 2, alpha: float = 6.0
) -> dict[str, AdapterModule]:
    """One rank and alpha for the layers of ``targets``."""
    names = [name for name in linear_names(config) if name.rpartition(".")[2] in targets]
    return {name: AdapterModule(name=name, rank=rank, alpha=alpha) for name in names}


def random_adapter(source: ModelSource, chosen: Mapping[str, AdapterModule], seed: int = 0) -> Adapter:
    """An adapter in memory, with float32 numbers large enough to change every logit."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(0, 0.3, spec.shape).astype(np.float32)
        for name, spec in adapter_shapes(source.config, chosen).items()
    }
    return Adapter(
        path=Path("adapter"),
        config=source.config,
        modules=dict(chosen),
        dropout=0.05,
        base=AdapterBase(path="base", fingerprint=fingerprint(source.config, source.read)),
        read=tensors.__getitem__,
    )


def tensors(adapter: Adapter) -> dict[str, bytes]:
    """Everything in an adapter, as bytes: what must come back from another format."""
    return {name: array.tobytes() + repr(array.shape).encode() for name, array in adapter.tensors()}


def deltas(adapter: Adapter) -> dict[str, np.ndarray]:
    """Weight's name -> scale B A in float64: what an adapter does, however it is packed."""
    return {
        f"{name}.weight": module.scale
        * (adapter.read(f"{name}.lora_b").astype(np.float64) @ adapter.read(f"{name}.lora_a").astype(np.float64))
        for name, module in adapter.modules.items()
    }


def adapted(get: Callable[[str], np.ndarray], adapter: Adapter) -> Callable[[str], np.ndarray]:
    """The weights of a model with the adapter in them, in float64."""
    added = deltas(adapter)
    return lambda name: get(name).astype(np.float64) + added[name] if name in added else get(name)
