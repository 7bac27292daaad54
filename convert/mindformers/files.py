"""The files of a MindFormers checkpoint: one whole, in one file or cut by size, or one part for each rank.

    DST/model.safetensors                      whole (or model-00001-of-0000N.safetensors and param_name_map.json)
    DST/rank_0/checkpoint_0.safetensors ...    a folder a rank, as MindFormers' own tools name them

Both may be .ckpt instead. Tensors are read one at a time from safetensors; a .ckpt is in memory as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np

from telechat_twins.convert.hf.folder import MAX_SHARD_BYTES, plan_shards
from telechat_twins.convert.mindformers.ckpt import CkptFile, save_ckpt
from telechat_twins.convert.names import Binding
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import Index, SafetensorsFile, SafetensorsWriter, TensorInfo, header_room

NAME_MAP = "param_name_map.json"  # MindSpore's own name for it
_METADATA = {"format": "ms"}
_NO_WEIGHTS = ("hyper_param.safetensors",)  # the optimizer's counters
_PICKLED = (".bin", ".pt", ".pth")

Spec = tuple[str, tuple[int, ...]]  # dtype code, shape
Read = Callable[[str], np.ndarray]


class TensorFile(Protocol):
    """An opened file of tensors."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A tensor, or the box ``index`` of it, in its stored dtype."""
        ...


Home = dict[str, TensorFile]  # tensor -> the file that holds it


def open_ranks(path: str | Path) -> list[Home]:
    """Open a file, a folder of files that make up one checkpoint, or a folder of rank folders: a Home for each rank.

    UserError for a missing rank, a folder whose files are not one checkpoint, and pickled files.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a MindFormers checkpoint")
    if path.is_file():
        return [_home([path])]
    named = ((p, re.fullmatch(r"rank_([0-9]+)", p.name)) for p in path.iterdir() if p.is_dir())
    found = {int(match[1]): p for p, match in named if match}
    if not found:
        return [_home(_weight_files(path))]
    if len(found) <= max(found):
        missing = next(rank for rank in range(len(found) + 1) if rank not in found)
        raise UserError(
            f"{path / f'rank_{missing}'}: missing; the folders of all ranks are needed, rank_0 to rank_{max(found)}"
        )
    return [_home(_weight_files(found[rank])) for rank in sorted(found)]


def write_whole(
    folder: Path, specs: Mapping[str, Spec], read: Read, file_format: str, max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write whole tensors: safetensors of at most ``max_bytes`` each (a larger tensor has its own), or one .ckpt."""
    if file_format == "ckpt":
        save_ckpt(folder / "model.ckpt", {name: read(name) for name in specs})
        return
    shards = plan_shards(specs, max_bytes)
    for shard in shards:
        with SafetensorsWriter(folder / shard.file, header_room(shard.tensors, _METADATA), _METADATA) as writer:
            for name in shard.tensors:
                writer.add(name, read(name))
    if len(shards) > 1:
        names = {name: shard.file for shard in shards for name in shard.tensors}
        (folder / NAME_MAP).write_text(json.dumps(names, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_ranks(
    folder: Path, bindings: Mapping[str, Binding], specs: Mapping[str, Spec], mp: int, read: Read, file_format: str
) -> None:
    """Write ``rank_R/checkpoint_R`` for each of ``mp`` ranks: equal slices along each binding's axis.

    Safetensors of all ranks are written side by side, so each tensor is read once; a .ckpt is made rank by rank.
    """
    for rank in range(mp):
        (folder / f"rank_{rank}").mkdir()
    parts = [folder / f"rank_{rank}" / f"checkpoint_{rank}.{file_format}" for rank in range(mp)]
    if file_format == "ckpt":
        for rank, part in enumerate(parts):
            save_ckpt(part, {name: slices(read(name), shared_axis(bindings[name], mp), mp)[rank] for name in specs})
        return
    local = {
        name: (code, slice_shape(shape, shared_axis(bindings[name], mp), mp)) for name, (code, shape) in specs.items()
    }
    room = header_room(local, _METADATA)
    with ExitStack() as stack:
        writers = [stack.enter_context(SafetensorsWriter(part, room, _METADATA)) for part in parts]
        for name in specs:
            for writer, part_of in zip(writers, slices(read(name), shared_axis(bindings[name], mp), mp), strict=True):
                writer.add(name, part_of)


def shared_axis(binding: Binding, mp: int) -> int | None:
    """The dimension that ``mp`` ranks share. As MindFormers does, a vocabulary they cannot share is whole on each."""
    return binding.axis if binding.axis is not None and binding.shape[binding.axis] % mp == 0 else None


def slice_shape(shape: tuple[int, ...], axis: int | None, mp: int) -> tuple[int, ...]:
    """Shape of one rank's part."""
    return tuple(size // mp if dimension == axis else size for dimension, size in enumerate(shape))


def slices(whole: np.ndarray, axis: int | None, mp: int) -> list[np.ndarray]:
    """The ranks' parts of a tensor."""
    return [whole] * mp if axis is None else np.split(whole, mp, axis)


def _weight_files(folder: Path) -> list[Path]:
    """The files of one checkpoint in a folder."""
    tensors = sorted(p for p in folder.glob("*.safetensors") if p.name not in _NO_WEIGHTS)
    ckpts = sorted(folder.glob("*.ckpt"))
    if len(ckpts) > 1 or (ckpts and tensors):
        names = ", ".join(p.name for p in [*ckpts, *tensors][:4])
        raise UserError(f"{folder}: holds more than one checkpoint ({names}); leave the one to be read in the folder")
    if ckpts or tensors:
        return ckpts or tensors
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
    if pickled:
        raise UserError(
            f"{folder / pickled[0]}: pickled weights are not read (they can run code); convert them to safetensors "
            "with the tools that wrote them"
        )
    raise UserError(f"{folder}: holds no .safetensors and no .ckpt")


def _home(files: list[Path]) -> Home:
    home: Home = {}
    for path in files:
        if path.suffix not in (".safetensors", ".ckpt"):
            raise UserError(f"{path}: is neither a .safetensors nor a .ckpt file")
        file: TensorFile = SafetensorsFile(path) if path.suffix == ".safetensors" else CkptFile(path)
        for name in file.tensors:
            if name in home:
                raise UserError(
                    f"{path}: holds tensor '{name}', as does {home[name].path.name}; leave one checkpoint in the folder"
                )
            home[name] = file
    return home
