"""A released folder to a canonical checkpoint and back, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.hf import MAX_SHARD_BYTES, HfFolder, plan_shards, recorded_shards, write_folder
from convert.names import bind
from convert.source import CanonicalSource
from core.checkpoint import MAX_FILE_BYTES, write_checkpoint
from core.errors import UserError
from core.safetensors_io import dtype_code

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

OnBytes = Callable[[int], Any]


def hf_to_canonical(
    folder: HfFolder,
    target: Path,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_bytes: OnBytes = lambda count: None,
) -> None:
    """Write ``target`` as a canonical checkpoint (step 0, no optimizer) of a release; ``dtype`` None keeps each dtype.

    model.json keeps the original config and file layout, assets/ the small files, so that the way back is exact.
    """

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in folder.logical():
            on_bytes(array.nbytes)
            yield name, cast(array, dtype, name)
            del array  # or it would stay in memory beside the next one

    write_checkpoint(
        target,
        0,
        model={"config": folder.config.to_dict(), "hf": folder.source_record()},
        weights=stream(),
        assets=folder.assets,
        max_file_bytes=max_file_bytes,
    )


def canonical_to_hf(
    source: CanonicalSource,
    target: Path,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    tokenizer: Path | None = None,
    on_bytes: OnBytes = lambda count: None,
) -> None:
    """Write ``target`` as a release.

    Files are cut as in the release the checkpoint came from, unless ``max_shard_bytes`` is given. ``tokenizer`` (a
    tokenizer.model) takes the place of the one the checkpoint carries.
    """
    checkpoint, config = source.checkpoint, source.config
    record = checkpoint.model.get("hf")
    bindings = bind(config, prefix=record["prefix"] if record else None)
    tensors = {
        name: (dtype_code(DTYPES[dtype] if dtype else checkpoint.dtype("weights", b.logical[0])), b.shape)
        for name, b in bindings.items()
    }
    shards = recorded_shards(record, tensors) if record and max_shard_bytes is None else None
    shards = shards or plan_shards(tensors, max_shard_bytes or MAX_SHARD_BYTES)

    def read(name: str) -> np.ndarray:
        binding = bindings[name]
        parts = {part: cast(source.tensor(part), dtype, part) for part in binding.logical}
        on_bytes(sum(part.nbytes for part in parts.values()))
        return binding.join(parts, config)

    # The way back of a release adds nothing to it.
    complete = record is None or tokenizer is not None
    assets = {asset.name: asset for asset in checkpoint.assets}
    if tokenizer is not None:
        described = ("tokenizer", "special_tokens_map", "added_tokens")
        assets = {name: asset for name, asset in assets.items() if not name.startswith(described)}
        assets["tokenizer.model"] = tokenizer
    write_folder(target, config, read, shards, record=record, assets=assets, complete=complete)


def weight_bytes(source: CanonicalSource, dtype: str | None = None) -> int:
    """Bytes of all weights of a checkpoint, as stored or in ``dtype``."""
    checkpoint = source.checkpoint
    return sum(
        math.prod(checkpoint.shape("weights", name))
        * (DTYPES[dtype] if dtype else checkpoint.dtype("weights", name)).itemsize
        for name in checkpoint.names("weights")
    )


def cast(array: np.ndarray, dtype: str | None, name: str) -> np.ndarray:
    """``array`` in another dtype (float32, float16, bfloat16), rounded to nearest even; None keeps it.

    UserError if a finite value becomes infinite.
    """
    if dtype is None or array.dtype == DTYPES[dtype]:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(DTYPES[dtype])
    bad = ~np.isfinite(out)
    if bad.any() and np.isfinite(array[bad]).any():
        largest = np.abs(array[bad].astype(np.float64)).max()
        raise UserError(f"{name}: value {largest:g} is beyond {dtype}'s range; convert to bfloat16 or float32")
    return out
