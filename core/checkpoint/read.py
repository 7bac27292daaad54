"""Reader of canonical checkpoints: folders of safetensors and JSON that both backends read, in any layout.

``manifest.json`` lists the pieces of every logical tensor (file, key, offset, extent) and the size and SHA-256 of every
file. A checkpoint becomes visible when it is complete, and of a tensor only the requested bytes are read. The format is
described in docs/checkpoints.md.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from telechat_twins.core.checkpoint.pieces import (
    FORMAT,
    KINDS,
    MAX_FILE_BYTES,
    VERSION,
    PieceWriter,
    TensorPiece,
    manifest_digest,
    tiling_fault,
    whole,
    write_manifest,
)
from telechat_twins.core.checkpoint.retention import STEP_FOLDER
from telechat_twins.core.checkpoint.save import (
    ALONE,
    Contents,
    Saver,
    SaveRanks,
    begin_save,
    save_checkpoint,
    write_checkpoint,
)
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import standing
from telechat_twins.core.files.foreign import MIB, load_json, read_text
from telechat_twins.core.files.safetensors import DTYPES, MAX_DIMENSIONS, Index, SafetensorsFile, box, file_sha256
from telechat_twins.core.model.params import ParamSpec
from telechat_twins.core.near import near_path
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

# Other rooms import everything about checkpoints from this module.
__all__ = [
    "ALONE",
    "FORMAT",
    "KINDS",
    "MAX_FILE_BYTES",
    "VERSION",
    "Checkpoint",
    "Contents",
    "Entry",
    "Piece",
    "PieceWriter",
    "SaveRanks",
    "Saver",
    "TensorPiece",
    "begin_save",
    "check_shapes",
    "manifest_digest",
    "open_checkpoint",
    "save_checkpoint",
    "whole",
    "write_checkpoint",
    "write_manifest",
]

MAX_MANIFEST_BYTES = 128 * MIB  # a piece takes about 150 bytes, and 512 ranks save about 150,000 pieces
MAX_MANIFEST_VALUES = 4_000_000
MAX_PIECES = 65_536  # of one tensor
MAX_POINTER_BYTES = 4_096  # of the file ``latest``


def open_checkpoint(path: str | Path, verify: bool = True) -> Checkpoint:
    """Open a step folder, or a run folder through its ``latest``.

    Always checks the manifest and the presence and size of every file. ``verify`` also hashes every file, which reads
    all of them once; turn it off for very large checkpoints that were verified before. UserError names the fault.
    """
    checkpoint = Checkpoint(_find(Path(path)))
    if verify:
        checkpoint.verify()
    return checkpoint


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: ``key`` in ``file`` holds the elements from ``offset`` on, ``extent`` along each axis."""

    file: str
    key: str
    offset: tuple[int, ...]
    extent: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A logical tensor as the manifest describes it; ``code`` is the safetensors name of its dtype."""

    shape: tuple[int, ...]
    code: str
    pieces: tuple[Piece, ...]


class Checkpoint:
    """An opened checkpoint; create it with open_checkpoint.

    ``path``: the step folder. ``step``: its number. ``model``: model.json. ``trainer``: trainer.json, or None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = load_json(path / "manifest.json", "a checkpoint manifest", MAX_MANIFEST_BYTES, MAX_MANIFEST_VALUES)
        where = path / "manifest.json"
        if manifest.get("format") != FORMAT:
            raise UserError(f"{where}: format {shown(manifest.get('format'))} is not {FORMAT!r}; give another folder")
        if manifest.get("version") != VERSION:
            raise UserError(
                f"{where}: format version {shown(manifest.get('version'))} is unknown; this program reads version "
                f"{VERSION}, use the one that wrote it"
            )
        found = manifest.pop("digest", None)
        if found != (expected := manifest_digest(manifest)):
            raise UserError(
                f"{where}: altered: its digest is {shown(found)}, of its content {expected}; use another checkpoint"
            )
        try:
            self.step = int(manifest["step"])
            self._sizes = {name: (int(f["size"]), str(f["sha256"])) for name, f in manifest["files"].items()}
            self._entries = {
                kind: {name: _entry(item) for name, item in manifest["tensors"][kind].items()} for kind in KINDS
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: damaged, {type(error).__name__} {error}") from None
        self._files: dict[str, SafetensorsFile] = {}
        self._found: dict[tuple[str, str], _Places] = {}
        self._check_files()
        self.model = load_json(self._inside("model.json"), "a model description")
        self.trainer: JsonObject | None = None
        if "trainer.json" in self._sizes:
            self.trainer = load_json(self._inside("trainer.json"), "a trainer state")

    @property
    def assets(self) -> list[Path]:
        """The asset files (tokenizer) of the checkpoint."""
        return [self.path / name for name in self._sizes if name.startswith("assets/")]

    @property
    def files(self) -> list[Path]:
        """Every file of the checkpoint, the manifest included."""
        return [self.path / "manifest.json", *(self.path / name for name in self._sizes)]

    @property
    def nbytes(self) -> int:
        """Total bytes of all files."""
        return sum(size for size, _ in self._sizes.values())

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of ``kind`` ("weights" or "optimizer"), in the order of saving."""
        return list(self._entries[kind])

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Global shape; UserError if there is no such tensor."""
        return self._entry(kind, name).shape

    def dtype(self, kind: str, name: str) -> np.dtype:
        """Stored dtype (bfloat16 is ml_dtypes.bfloat16); UserError if there is no such tensor."""
        return DTYPES[self._entry(kind, name).code]

    def read(self, kind: str, name: str, index: Index | None = None) -> np.ndarray:
        """The tensor, or its box ``index`` (slices without step), in the stored dtype.

        Reads only the bytes of the box. UserError if the tensor is missing or its pieces differ from the manifest.
        """
        entry = self._entry(kind, name)
        starts, extents = box(entry.shape, index)
        out: np.ndarray | None = None
        for piece in self._places(kind, name, entry).meeting(starts, extents):
            low = [max(s, o) for s, o in zip(starts, piece.offset, strict=True)]
            high = [min(s + n, o + m) for s, n, o, m in zip(starts, extents, piece.offset, piece.extent, strict=True)]
            local = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, piece.offset, strict=True))
            part = self._file(piece, entry).read(piece.key, local)
            if part.shape == extents:
                return part
            if out is None:
                out = np.empty(extents, DTYPES[entry.code])
            out[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, starts, strict=True))] = part
        return np.empty(extents, DTYPES[entry.code]) if out is None else out

    def verify(self, on_bytes: Callable[[int], object] | None = None, share: tuple[int, int] = (0, 1)) -> None:
        """Hash every file and check every header against the manifest; ``on_bytes`` is called with the bytes hashed.

        ``share`` = (rank, ranks): verify only this rank's part of the files; the parts of all ranks are about equal in
        bytes and together complete. UserError names the file, with the expected and the found hash.
        """
        names = sorted(self._sizes, key=lambda name: (self._sizes[name][0], name))[share[0] :: share[1]]
        self._check_hashes(names, on_bytes)
        own = set(names)
        for kind in KINDS:
            for name, entry in self._entries[kind].items():
                self._places(kind, name, entry)
                for piece in entry.pieces:
                    if piece.file in own:
                        self._file(piece, entry)

    def _check_hashes(self, names: Sequence[str], on_bytes: Callable[[int], object] | None) -> None:
        """Hash the files, each in a thread; hashlib and reading let others run. There are two threads for a processor:
        one hashes while the other waits for the disk."""
        lock = threading.Lock()

        def count(size: int) -> None:
            if on_bytes:
                with lock:
                    on_bytes(size)

        with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0)), "verify") as pool:
            # The largest file first, so that no thread begins it when the others have ended.
            found = {name: pool.submit(file_sha256, self._inside(name), count) for name in reversed(names)}
            try:
                for name in names:
                    if (digest := found[name].result()) != (expected := self._sizes[name][1]):
                        raise UserError(
                            f"{self.path / name}: altered: SHA-256 should be {expected}, found {digest}; "
                            "use another checkpoint or restore this file"
                        )
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _entry(self, kind: str, name: str) -> Entry:
        if name not in self._entries[kind]:
            raise UserError(
                f"{self.path}: has no {kind} tensor '{name}' among {len(self._entries[kind])}; the model's config does "
                "not fit this checkpoint, or tensors were left out when it was made"
            )
        return self._entries[kind][name]

    def _inside(self, name: str) -> Path:
        path = self.path / name
        if "\0" in name or not path.resolve().is_relative_to(self.path.resolve()):
            raise UserError(
                f"{self.path / 'manifest.json'}: files must stay inside the checkpoint folder, found '{name}'; "
                "use another checkpoint"
            )
        return path

    def _check_files(self) -> None:
        if "model.json" not in self._sizes:
            raise UserError(
                f"{self.path / 'manifest.json'}: must list model.json and does not; the checkpoint is incomplete, use "
                "another one"
            )
        for name, (size, expected) in self._sizes.items():
            path = self._inside(name)
            if not path.is_file():
                raise UserError(f"{path}: missing; the manifest lists it with {size} bytes, SHA-256 {expected}")
            if (found := path.stat().st_size) != size:
                word = "truncated" if found < size else "altered"
                raise UserError(
                    f"{path}: {word}: {size} bytes with SHA-256 {expected} were saved, {found} bytes with SHA-256 "
                    f"{file_sha256(path)} found; use another checkpoint or restore this file"
                )
        for piece in (p for entries in self._entries.values() for e in entries.values() for p in e.pieces):
            if piece.file not in self._sizes:
                raise UserError(
                    f"{self.path / 'manifest.json'}: must list the file of every piece, and that of piece "
                    f"'{piece.key}', '{piece.file}', is not listed; use another checkpoint"
                )

    def _file(self, piece: Piece, entry: Entry) -> SafetensorsFile:
        """The opened file of a piece, after a check of its header against the manifest."""
        if piece.file not in self._files:
            self._files[piece.file] = SafetensorsFile(self._inside(piece.file))
        file = self._files[piece.file]
        info = file.info(piece.key)
        if (info.code, info.shape) != (entry.code, piece.extent):
            raise UserError(
                f"{file.path}: tensor '{piece.key}': expected {entry.code} {list(piece.extent)} by the manifest, "
                f"found {info.code} {list(info.shape)}"
            )
        return file

    def _places(self, kind: str, name: str, entry: Entry) -> _Places:
        """The pieces of a tensor for lookup, after a check that they cover each element exactly once."""
        if (kind, name) not in self._found:
            if fault := tiling_fault(entry.shape, [(piece.offset, piece.extent) for piece in entry.pieces]):
                where = self.path / "manifest.json"
                raise UserError(f"{where}: the {len(entry.pieces)} pieces of {kind} '{name}' {fault}")
            self._found[kind, name] = _Places(entry.pieces)
        return self._found[kind, name]


class _Places:
    """Lookup of one tensor's pieces by position: sorted along the first axis, so that a box examines few of them."""

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        self._pieces = sorted(pieces, key=lambda piece: piece.offset[:1])
        self._low = np.array([piece.offset for piece in self._pieces], np.int64)
        self._high = self._low + np.array([piece.extent for piece in self._pieces], np.int64)
        # Largest end along the first axis among the pieces up to each one: it never decreases, so it can be bisected.
        self._reach = np.maximum.accumulate(self._high[:, 0]) if self._low.size else self._low

    def meeting(self, starts: tuple[int, ...], extents: tuple[int, ...]) -> list[Piece]:
        """The pieces that share an element with the box at ``starts`` of size ``extents``."""
        if not starts or not self._pieces:
            return self._pieces
        low, high = np.array(starts), np.array(starts) + extents
        first = int(np.searchsorted(self._reach, low[0], "right"))
        last = int(np.searchsorted(self._low[:, 0], high[0], "left"))
        met = np.maximum(self._low[first:last], low) < np.minimum(self._high[first:last], high)
        return [self._pieces[first + i] for i in np.nonzero(met.all(axis=1))[0]]


def check_shapes(
    table: Mapping[str, ParamSpec], names_and_shapes: Mapping[str, tuple[int, ...]], where: str = "checkpoint"
) -> None:
    """Check names and shapes of tensors against the model's parameter table.

    UserError, starting with ``where``, lists the first missing and unexpected names, or the first tensor of another
    shape, with the expected and the found one.
    """
    missing = [name for name in table if name not in names_and_shapes]
    unexpected = [name for name in names_and_shapes if name not in table]
    if missing or unexpected:
        found = (("missing", missing), ("unexpected", unexpected))
        parts = [f"{word} {_first(names)}" for word, names in found if names]
        raise UserError(f"{where}: tensors do not fit the model: {'; '.join(parts)}")
    for name, spec in table.items():
        if tuple(names_and_shapes[name]) != tuple(spec.shape):
            raise UserError(
                f"{where}: tensor '{name}': expected {list(spec.shape)} by the model's config, "
                f"found {list(names_and_shapes[name])}"
            )


def _find(path: Path) -> Path:
    """The step folder at ``path``, or the one that ``path``'s ``latest`` names."""
    if not standing(path).is_dir():
        raise UserError(f"{path}: no such folder; expected a checkpoint or a run that saved one{near_path(path)}")
    path = standing(path)
    if (path / "manifest.json").is_file():
        return path
    pointer = path / "latest"
    if not pointer.is_file():
        raise UserError(f"{path}: has neither manifest.json nor latest; give a checkpoint or a run that saved one")
    name = read_text(pointer, MAX_POINTER_BYTES).strip()
    if not STEP_FOLDER.fullmatch(name):
        raise UserError(
            f"{pointer}: damaged, {name[:80]!r} is not the name of a step folder; give the step folder itself"
        )
    if not standing(path / name).is_dir():
        raise UserError(f"{pointer}: names '{name}', which is missing; give another step folder of {path}")
    return standing(path / name)


def _entry(item: JsonObject) -> Entry:
    shape, code = _naturals(item["shape"]), item["dtype"]
    if code not in DTYPES:
        raise ValueError(f"unknown dtype {shown(code)}")
    pieces = tuple(
        Piece(str(p["file"]), str(p["key"]), _naturals(p["offset"]), _naturals(p["extent"])) for p in item["pieces"]
    )
    if len(pieces) > MAX_PIECES or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions in {len(pieces)} pieces")
    if any(len(p.offset) != len(shape) or len(p.extent) != len(shape) for p in pieces):
        raise ValueError(f"a piece of a {list(shape)} tensor has another number of dimensions")
    return Entry(shape, code, pieces)


def _naturals(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError(f"{shown(values)} is not a list of sizes")
    return tuple(values)


def _first(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" for name in names[:limit]) + more
