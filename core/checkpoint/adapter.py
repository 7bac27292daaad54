"""Adapter of a model: its linears, scales and tensors, whatever file they come from, and the canonical form of it.

A canonical adapter checkpoint is a step folder that holds lora_a and lora_b only, in float32; model.json has the
base's config and the entry ``adapter`` (core.model.lora.AdapterRecord). Other formats are opened by convert.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from telechat_twins.core.checkpoint.fingerprint import fingerprint
from telechat_twins.core.checkpoint.read import Checkpoint, check_shapes, open_checkpoint, write_checkpoint
from telechat_twins.core.checkpoint.source import ReadBox
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.lora import TARGETS, AdapterBase, AdapterModule, AdapterRecord, read_adapter
from telechat_twins.core.model.params import ParamSpec, block_table, parameter_table
from telechat_twins.core.schema import from_mapping
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

A, B = "lora_a", "lora_b"
# Settings that a run chooses freely: an adapter fits the model with any value of them.
_OF_A_RUN = ("table_dtype", "max_seqlen", "end_token_ids", "init_std", "matrix_init_std")
_OF_ROWS = ("vocab_size", "vocab_tokens")  # padding may be cut off or added; no adapter touches the vocabulary


@dataclass(frozen=True)
class Adapter:
    """An opened adapter.

    ``modules``: by logical name of the linear layer, in the model's order. ``read(name)``: a tensor in its stored
    dtype, layers.3.attn.q.lora_a [rank, in] or lora_b [out, rank]. ``base``: the fingerprint is empty where the format
    records none. ``record`` and ``assets``: what a canonical checkpoint keeps so that the way back to the other format
    is exact.
    """

    path: Path
    config: ModelConfig
    modules: Mapping[str, AdapterModule]
    dropout: float
    base: AdapterBase
    read: Callable[[str], np.ndarray]
    notes: tuple[str, ...] = ()
    record: JsonObject | None = None
    assets: Sequence[Path] = ()

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, float32 array) of every A and B in the model's order."""
        for module in self.modules:
            for half in (A, B):
                yield f"{module}.{half}", self.read(f"{module}.{half}").astype(np.float32)

    def entry(self) -> AdapterRecord:
        """The entry ``adapter`` of model.json that describes this adapter."""
        modules = list(self.modules.values())
        common = Counter((module.rank, module.alpha) for module in modules).most_common(1)[0][0]
        short = [name for name in TARGETS if any(module.name.endswith(f".{name}") for module in modules)]
        like = {(module.rank, module.alpha) for module in modules} == {common}
        everywhere = len(modules) == len(short) * self.config.num_layers
        return AdapterRecord(
            rank=common[0],
            alpha=common[1],
            dropout=self.dropout,
            targets=short,
            base=self.base,
            modules=None if like and everywhere else modules,
        )


def adapter_shapes(config: ModelConfig, modules: Mapping[str, AdapterModule]) -> dict[str, ParamSpec]:
    """Name -> shape of the tensors of these adapters."""
    table = parameter_table(config)
    shapes = {}
    for name, module in modules.items():
        rows, columns = table[f"{name}.weight"].shape
        shapes[f"{name}.{A}"] = ParamSpec((module.rank, columns), "adapter")
        shapes[f"{name}.{B}"] = ParamSpec((rows, module.rank), "adapter")
    return shapes


def linear_names(config: ModelConfig) -> list[str]:
    """Logical names of every linear that can have an adapter, in the model's order."""
    names = [n.removesuffix(".weight") for n, spec in block_table(config).items() if spec.kind == "matrix"]
    return [f"layers.{i}.{name}" for i in range(config.num_layers) for name in names]


def open_adapter(path: str | Path, verify: bool = True) -> Adapter:
    """Open a canonical adapter checkpoint, or a run folder through its ``latest``.

    UserError for a folder that holds a whole model, and for names, shapes, ranks or scales that do not fit.
    """
    checkpoint = open_checkpoint(path, verify)
    where = str(checkpoint.path / "model.json")
    entry = read_adapter(checkpoint.model, where)
    if entry is None:
        raise UserError(f"{checkpoint.path}: holds a whole model, not an adapter; give it as the checkpoint")
    values = checkpoint.model.get("config")
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold the base's config under 'config', found none; restore the file")
    config = from_mapping(ModelConfig, values, f"{where}: config")
    modules = _modules(entry, config, where)
    found = {name: checkpoint.shape("weights", name) for name in checkpoint.names("weights")}
    check_shapes(adapter_shapes(config, modules), found, str(checkpoint.path))
    peft = checkpoint.model.get("peft")
    return Adapter(
        path=checkpoint.path,
        config=config,
        modules=modules,
        dropout=entry.dropout,
        base=entry.base,
        read=_reader(checkpoint),
        record=peft if isinstance(peft, dict) else None,
        assets=checkpoint.assets,
    )


def _modules(entry: AdapterRecord, config: ModelConfig, where: str) -> dict[str, AdapterModule]:
    names = linear_names(config)
    given = list(entry.adapters(config).values()) if entry.modules is None else entry.modules
    listed = {module.name: module for module in given}
    if unknown := next((name for name in listed if name not in names), None):
        raise UserError(
            f"{where}: adapter.modules: must name linear layers of this model, found '{unknown}'; restore the file"
        )
    if not listed or len(listed) < len(given):
        raise UserError(
            f"{where}: adapter: names {len(given)} layers, {len(listed)} of them different; restore the file"
        )
    return {name: listed[name] for name in names if name in listed}


def _reader(checkpoint: Checkpoint) -> Callable[[str], np.ndarray]:
    return lambda name: checkpoint.read("weights", name)


def write_adapter(target: Path, adapter: Adapter) -> None:
    """Write ``target`` as a canonical adapter checkpoint (step 0, no optimizer)."""
    model: JsonObject = {"config": adapter.config.to_dict(), "adapter": adapter.entry().to_dict()}
    if adapter.record is not None:
        model["peft"] = adapter.record
    write_checkpoint(target, 0, model=model, weights=adapter.tensors(), assets=adapter.assets)


def check_base(adapter: Adapter, config: ModelConfig, read: ReadBox, where: str | Path) -> tuple[str, ...]:
    """Hold an adapter against the model at ``where`` that it is to be used with: config, then fingerprint.

    Notes on what could not be checked. UserError names the field that differs, or both fingerprints.
    """
    mine, theirs = adapter.config.to_dict(), config.to_dict()
    for name, value in theirs.items():
        if name not in (*_OF_A_RUN, *_OF_ROWS) and mine.get(name) != value:
            raise UserError(
                f"{adapter.path}: belongs to a model with {name} {mine.get(name)}, and {where} has {value}; give the "
                f"adapter's own base{f' ({adapter.base.path})' if adapter.base.path else ''}"
            )
    if not adapter.base.fingerprint:
        named = f", but the name {shown(adapter.base.path)}" if adapter.base.path else ""
        return (
            f"{adapter.path} does not record the weights it was trained on{named}; that {where} is its base is not "
            "checked",
        )
    # Rows of padding that one of the two lacks would be another model to the digest, and are the same to the adapter.
    if any(mine.get(name) != theirs.get(name) for name in _OF_ROWS):
        return (f"{where} has other rows of padding than the base of {adapter.path}; its weights are not compared",)
    if (found := fingerprint(config, read)) != adapter.base.fingerprint:
        raise UserError(
            f"{adapter.path}: was trained on {adapter.base.path or 'a base'} with fingerprint "
            f"{adapter.base.fingerprint[:16]}, and {where} has {found[:16]}: other weights, on which its result would "
            "be wrong; give its own base"
        )
    return ()


def with_base(adapter: Adapter, config: ModelConfig, read: ReadBox, path: str | Path) -> Adapter:
    """The adapter that records the model at ``path`` as its base."""
    base = AdapterBase(path=str(path), fingerprint=fingerprint(config, read))
    return dataclasses.replace(adapter, config=config, base=base)


def is_adapter_checkpoint(path: str | Path) -> bool:
    """Whether a canonical step folder, or a run's latest, holds an adapter. UserError if it is neither."""
    return open_checkpoint(path, verify=False).model.get("adapter") is not None
