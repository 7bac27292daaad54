"""The safetensors files of a released folder, and which tensor is read from which of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from telechat_twins.convert.names import is_derived
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import SafetensorsFile, load_json
from telechat_twins.core.shown import shown

INDEX = "model.safetensors.index.json"
_LONGEST = 255  # bytes of a file's name
# weights.safetensors is the name of the golden model folders.
_SINGLE = ("model.safetensors", "weights.safetensors")


@dataclass
class Shards:
    """``indexed``: whether there is an index; ``files``: file name -> open file; ``home``: tensor -> file name, without
    what is passed over; ``notes`` on that."""

    indexed: bool
    files: dict[str, SafetensorsFile]
    home: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def tensors(self, file: str) -> list[str]:
        """The tensors that are read from a file, in its order."""
        return [name for name in self.files[file].tensors if self.home.get(name) == file]


def open_shards(folder: Path, repeated: Collection[str] = ()) -> Shards:
    """Open the one file, or those that the index names.

    The index decides where a tensor is read: a copy of it in another file is passed over. Buffers that released code
    computes from the config are passed over as well. UserError for a missing file or tensor, and for a tensor that the
    index does not know. ``repeated``: tensors that the model has under another name, so that index and files need not
    agree on them.
    """
    shards = _indexed(folder, repeated) if (folder / INDEX).is_file() else _single(folder)
    derived = [name for name, file in shards.home.items() if is_derived(name, shards.files[file].tensors[name].shape)]
    for name in derived:
        del shards.home[name]
    if derived:
        shards.notes.append(f"buffers that follow from the config are not read: {_listed(derived)}")
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in shards.files)
    if others:
        which = f"that {INDEX} does not name" if shards.indexed else f"beside {next(iter(shards.files))}"
        shards.notes.append(f"files {which} are not read: {_listed(others)}")
    return shards


def plain_name(name: str, where: str) -> str:
    """A file name without a path. Only the name is judged: files of a hub cache are links that rightly lead away."""
    size = len(name.encode())
    if not 0 < size <= _LONGEST:
        raise UserError(f"{where}: file {shown(name)} points outside the folder: a name has 1 to {_LONGEST} bytes")
    if name in (".", "..") or any(mark in name for mark in "/\\\0"):
        below = not any(mark in name for mark in "\\\0") and {"", ".."}.isdisjoint(name.split("/"))
        what = "lies in another folder" if below else "points outside the folder"
        raise UserError(
            f"{where}: file {shown(name)} {what}; only plain file names are read: put all files into one folder, and "
            "name them without a path"
        )
    return name


def _single(folder: Path) -> Shards:
    for name in _SINGLE:
        if (folder / name).is_file():
            file = SafetensorsFile(folder / name)
            return Shards(False, {name: file}, dict.fromkeys(file.tensors, name))
    pickled = [p.name for s in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in sorted(folder.glob(s))]
    if pickled:
        raise UserError(
            f"{folder / pickled[0]}: pickled weights are not read (they can run code); convert them to safetensors "
            "with the publisher's tools"
        )
    others = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(".safetensors"))
    raise UserError(f"{folder}: holds neither model.safetensors nor {INDEX}{_way_out(folder, others)}")


def _way_out(folder: Path, others: Sequence[str]) -> str:
    """What to do about a folder that has its tensors in ``others``, or in no file at all."""
    found = sorted(path.name for path in folder.iterdir() if ".index." in path.name and path.suffix == ".json")
    if found and any(name.startswith("pytorch_model") for name in found):
        return f"; {found[0]} is that of pickled files, which are not read: convert them to safetensors"
    if found:
        return f"; {found[0]} is that of a variant: rename it to {INDEX}"
    if len(others) == 1:
        return f"; if {others[0]} is the whole model, rename it to model.safetensors"
    if others:
        return f"; there are {_listed(others)}, of which the index belongs to the release: download it too"
    partial = sorted(path.name for path in folder.iterdir() if path.suffix in (".incomplete", ".part", ".aria2"))
    return (
        f"; {partial[0]} is a download that was cut off: finish it" if partial else "; download the release's weights"
    )


def _indexed(folder: Path, repeated: Collection[str]) -> Shards:
    where = folder / INDEX
    weight_map = load_json(where, "a checkpoint index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{where}: damaged, weight_map must say which file holds each tensor")
    files = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / plain_name(name, str(where))).is_file():
            raise UserError(f"{folder / name}: missing; {where.name} says it holds part of the model")
        files[name] = SafetensorsFile(folder / name)
    home = {}
    for tensor, name in weight_map.items():
        if tensor in files[name].tensors:
            home[tensor] = name
        elif not is_derived(tensor) and tensor not in repeated:
            raise UserError(f"{folder / name}: lacks tensor '{tensor}', which {where.name} says it holds")
    copies = []
    for name, file in files.items():
        for tensor, info in file.tensors.items():
            if tensor not in home and (is_derived(tensor, info.shape) or tensor in repeated):
                home[tensor] = name
            elif tensor not in home:
                raise UserError(f"{folder / name}: holds tensor '{tensor}', which {where.name} does not place there")
            elif home[tensor] != name:
                copies.append(f"{tensor} in {name}")
    shards = Shards(True, files, home)
    if copies:
        shards.notes.append(f"copies of tensors that {where.name} places elsewhere are not read: {_listed(copies)}")
    return shards


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
