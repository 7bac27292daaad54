"""Conversion of a model, in whatever format it is stored, to a canonical checkpoint, a release or MindFormers' format.

One tensor is in memory at a time, wherever the files allow it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from telechat_twins.convert.hf.config import dump_config, write_config
from telechat_twins.convert.hf.folder import (
    MAX_SHARD_BYTES,
    HfFolder,
    plan_shards,
    recorded_shards,
    tensor_bytes,
    write_folder,
)
from telechat_twins.convert.mindformers.config import model_yaml
from telechat_twins.convert.mindformers.files import write_ranks, write_whole
from telechat_twins.convert.mindformers.source import ASSETS, MODEL, check_mp
from telechat_twins.convert.names import Binding, bind, mindformers_rules
from telechat_twins.convert.places import require_place
from telechat_twins.convert.rounding import rounded
from telechat_twins.convert.source import HfSource, ModelSource, PlainSource
from telechat_twins.core.checkpoint.read import MAX_FILE_BYTES, write_checkpoint
from telechat_twins.core.data.encoders.special import FILES
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import new_folder
from telechat_twins.core.files.safetensors import dtype_code
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.types import JsonObject

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

OnBytes = Callable[[int], object]


def to_canonical(
    source: ModelSource,
    target: Path,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_bytes: OnBytes = lambda count: None,
) -> None:
    """Write ``target`` as a canonical checkpoint (step 0, no optimizer); ``dtype`` None keeps each dtype.

    model.json keeps the original config and file layout of a release, assets/ its small files, so that the way back is
    exact.
    """

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in source.logical():
            array = cast(array, dtype, name)
            on_bytes(array.nbytes)
            yield name, array
            del array  # or it would stay in memory beside the next one

    write_checkpoint(
        target, 0, model=_model(source), weights=stream(), assets=source.assets, max_file_bytes=max_file_bytes
    )


def to_hf(
    source: ModelSource,
    target: Path,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    tokenizer: Path | None = None,
    on_bytes: OnBytes = lambda count: None,
    sums: bool = False,
) -> None:
    """Write ``target`` as a release.

    Files are cut as in the release the model came from, unless ``max_shard_bytes`` is given. ``tokenizer`` (a
    tokenizer.model or tokenizer.json) takes the place of the one the source carries. ``sums`` adds SHA256SUMS.
    UserError for a model the format cannot hold.
    """
    source = PlainSource(source)
    config, record = source.config, source.record
    require_place(config, "hf")
    bindings = bind(config, prefix=record["prefix"] if record else None)
    tensors = _specs(source, bindings, dtype)
    shards = recorded_shards(record, tensors) if record and max_shard_bytes is None else None
    shards = shards or plan_shards(tensors, max_shard_bytes or MAX_SHARD_BYTES)
    # The way back of a release adds nothing to it.
    complete = record is None or tokenizer is not None
    assets = {asset.name: asset for asset in source.assets}
    if tokenizer is not None:
        described = ("tokenizer", "special_tokens_map", "added_tokens", "vocab.json", "merges.txt")
        assets = {name: asset for name, asset in assets.items() if not name.startswith(described)}
        assets[tokenizer.name if tokenizer.name in FILES else FILES[0]] = tokenizer
    read = _reader(source, bindings, dtype, on_bytes)
    write_folder(target, config, read, shards, record=record, assets=assets, complete=complete, sums=sums)


def write_like(
    original: ModelSource, source: ModelSource, target: Path, sums: bool = False, on_bytes: OnBytes = lambda count: None
) -> None:
    """Write ``source`` in the form that ``original`` has: a release, or a canonical checkpoint."""
    if isinstance(original, HfSource):
        to_hf(source, target, on_bytes=on_bytes, sums=sums)
    else:
        to_canonical(source, target, on_bytes=on_bytes)


def to_mindformers(
    source: ModelSource,
    target: Path,
    form: str,
    mp: int = 1,
    *,
    whole: bool = False,
    file_format: str = "safetensors",
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_bytes: OnBytes = lambda count: None,
) -> None:
    """Write ``target`` as a MindFormers checkpoint in a form of ``MINDFORMERS_FORMS``.

    ``mp`` ranks get a file each, or with ``whole`` one checkpoint whose rows are in the order that an equal cut among
    ``mp`` ranks wants. model.json records form and ranks, so that it can be read back; the small files lie in assets/.
    UserError for a model the form cannot hold, and for ranks that the model cannot be shared among.
    """
    source = PlainSource(source)
    config = source.config
    require_place(config, form)
    check_mp(config, mp)
    bindings = bind(config, mindformers_rules(config, form, mp))
    specs = _specs(source, bindings, dtype)
    read = _reader(source, bindings, dtype, on_bytes)
    total = sum(tensor_bytes(*spec) for spec in specs.values())
    with new_folder(target, lambda: total) as building:
        if whole or mp == 1:
            write_whole(building, specs, read, file_format, max_shard_bytes)
        else:
            write_ranks(building, bindings, specs, mp, read, file_format)
        model = {**_model(source), "mindformers": {"form": form, "mp": mp, "whole": whole or mp == 1}}
        (building / MODEL).write_text(json.dumps(model, indent=1) + "\n", encoding="utf-8")
        if form.startswith("mcore"):
            (building / "config.json").write_text(dump_config(write_config(config, None, dtype)), encoding="utf-8")
        else:
            (building / "model_config.yaml").write_text(model_yaml(config, form), encoding="utf-8")
        if source.assets:
            (building / ASSETS).mkdir()
        for asset in source.assets:
            shutil.copyfile(asset, building / ASSETS / asset.name)


def hf_to_canonical(
    folder: HfFolder, target: Path, dtype: str | None = None, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """``to_canonical`` of an opened release."""
    to_canonical(HfSource(folder), target, dtype, max_file_bytes)


def canonical_to_hf(
    source: ModelSource,
    target: Path,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    tokenizer: Path | None = None,
) -> None:
    """``to_hf`` of a canonical checkpoint."""
    to_hf(source, target, dtype, max_shard_bytes, tokenizer)


def _model(source: ModelSource) -> JsonObject:
    """The description of a model in model.json: its config and, if it came from a release, that one's."""
    return {"config": source.config.to_dict(), **({"hf": source.record} if source.record else {})}


def _specs(
    source: ModelSource, bindings: Mapping[str, Binding], dtype: str | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the other format -> dtype code and shape."""
    stored = {name: DTYPES[dtype] if dtype else source.dtype(b.logical[0]) for name, b in bindings.items()}
    return {name: (dtype_code(stored[name]), binding.shape) for name, binding in bindings.items()}


def _reader(
    source: ModelSource, bindings: Mapping[str, Binding], dtype: str | None, on_bytes: OnBytes
) -> Callable[[str], np.ndarray]:
    """A function that gives a tensor under its name in the other format."""

    def read(name: str) -> np.ndarray:
        binding = bindings[name]
        parts = {part: cast(source.tensor(part), dtype, part) for part in binding.logical}
        on_bytes(sum(part.nbytes for part in parts.values()))
        return binding.join(parts, source.config)

    return read


def weight_bytes(source: ModelSource, dtype: str | None = None) -> int:
    """Bytes of all weights of a model, as stored or in ``dtype``."""
    table = parameter_table(source.config)
    return sum(spec.size * (DTYPES[dtype] if dtype else source.dtype(name)).itemsize for name, spec in table.items())


def cast(array: np.ndarray, dtype: str | None, name: str) -> np.ndarray:
    """``array`` in another dtype (float32, float16, bfloat16), rounded to nearest even; None keeps it.

    UserError if a finite value becomes infinite.
    """
    if dtype is None or array.dtype == DTYPES[dtype]:
        return array
    with np.errstate(over="ignore"):
        out = rounded(array, DTYPES[dtype]) if array.dtype == np.float64 else array.astype(DTYPES[dtype])
    bad = ~np.isfinite(out)
    if bad.any() and np.isfinite(array[bad]).any():
        largest = np.abs(array[bad].astype(np.float64)).max()
        raise UserError(f"{name}: value {largest:g} is beyond {dtype}'s range; convert to bfloat16 or float32")
    return out
