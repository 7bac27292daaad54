"""The canonical checkpoint: one folder of safetensors and JSON that either backend, in any layout, can read.

``manifest.json`` says of every logical tensor which pieces (file, key, offset, extent) make it up, and of every file
its size and SHA-256. A save is invisible until it is complete; a reader reads only the bytes it asks for. The format
is described in docs/checkpoints.md.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.atomic import new_folder, remove_folder, standing, write_text
from core.errors import UserError
from core.params import ParamSpec
from core.safetensors_io import (
    DTYPES,
    Index,
    SafetensorsFile,
    SafetensorsWriter,
    box,
    dtype_code,
    file_sha256,
    load_json,
)

FORMAT = "tele-checkpoint"
VERSION = 1
KINDS = ("weights", "optimizer")
MAX_FILE_BYTES = 4 << 30

Tensors = Iterable[tuple[str, np.ndarray]]

# Room for some hundreds of header entries, known before the tensors are; the data then starts on a 64 KiB boundary.
_HEADER_ROOM = (64 << 10) - 8
_STEP = re.compile(r"step-(\d{8,})")
_log = logging.getLogger(__name__)


def save_checkpoint(
    root: str | Path,
    step: int,
    *,
    model: dict[str, Any],
    weights: Tensors,
    optimizer: Tensors,
    trainer: dict[str, Any] | None,
    keep_last: int,
    assets: Iterable[Path] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write ``root/step-00000100`` so that it appears complete or not at all, then move ``root/latest`` to it.

    ``weights`` and ``optimizer`` are taken one tensor at a time; each is on its way to disk before the next is asked
    for. ``model`` and ``trainer`` are JSON values. ``assets`` are small files (tokenizer) kept with the checkpoint.
    Saving a step again replaces it. Afterwards only the ``keep_last`` newest checkpoints stay, this one always.
    Returns the new folder. UserError, with the space needed, when the disk is full: the checkpoints before are intact.
    """
    root = Path(root)
    folder = root / f"step-{step:08d}"
    write_checkpoint(
        folder,
        step,
        model=model,
        weights=weights,
        optimizer=optimizer,
        trainer=trainer,
        assets=assets,
        max_file_bytes=max_file_bytes,
    )
    write_text(root / "latest", folder.name + "\n")
    _prune(root, folder, keep_last)
    return folder


def write_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: dict[str, Any],
    weights: Tensors,
    optimizer: Tensors = (),
    trainer: dict[str, Any] | None = None,
    assets: Iterable[Path] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write one checkpoint folder atomically, without ``latest`` and pruning; arguments as in save_checkpoint."""
    folder = Path(folder)
    texts = {"model.json": _json(model)}
    if trainer is not None:
        texts["trainer.json"] = _json(trainer)
    streams = {"weights": _Counted(weights), "optimizer": _Counted(optimizer)}

    def needed() -> int:
        # The disk is full and nothing will be saved; asking for the remaining tensors tells how much room it takes.
        return sum(stream.drain() for stream in streams.values()) + sum(map(len, texts.values()))

    with new_folder(folder, needed) as building, PieceWriter(building, step, max_file_bytes) as writer:
        for kind, stream in streams.items():
            for name, array in stream:
                writer.add(kind, name, array)
                del array  # or it would stay in memory while the next one is made
        for name, text in texts.items():
            (building / name).write_text(text, encoding="utf-8")
        for asset in assets:
            (building / "assets").mkdir(exist_ok=True)
            shutil.copyfile(asset, building / "assets" / Path(asset).name)
    return folder


class PieceWriter:
    """Writes pieces of tensors into a folder; on a clean exit, manifest.json over every file then in the folder.

    The folder takes its final name by the caller's doing (core.atomic). A file is closed when ``max_file_bytes`` is
    reached; a single larger tensor gets a file of its own.
    """

    def __init__(self, folder: Path, step: int, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.folder = folder
        self.step = step
        self.max_file_bytes = max_file_bytes
        self._tensors: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
        self._file: SafetensorsWriter | None = None
        self._kind = ""
        self._counts = dict.fromkeys(KINDS, 0)
        self._hashes: dict[str, str] = {}

    def add(
        self,
        kind: str,
        name: str,
        array: np.ndarray,
        *,
        offset: tuple[int, ...] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """Write ``array``: the whole tensor, or the piece at ``offset`` of a tensor of global ``shape``.

        ValueError if pieces of one tensor disagree in shape or dtype, or a whole tensor is given twice.
        """
        offset = offset if offset is not None else (0,) * array.ndim
        shape = tuple(shape) if shape is not None else array.shape
        code = dtype_code(array.dtype)
        entry = self._tensors[kind].setdefault(name, {"shape": list(shape), "dtype": code, "pieces": []})
        if entry["shape"] != list(shape) or entry["dtype"] != code:
            raise ValueError(f"{kind} '{name}': piece of a {code} {shape} tensor, before it was {entry}")
        if entry["pieces"] and array.shape == shape:
            raise ValueError(f"{kind} '{name}' was given twice")
        key = name if array.shape == shape else f"{name}@{'.'.join(map(str, offset))}"
        file = self._open(kind, key, array)
        file.add(key, array)
        entry["pieces"].append(
            {"file": file.path.name, "key": key, "offset": list(offset), "extent": list(array.shape)}
        )

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._close(kind, error, trace)
        if kind is None:
            self._write_manifest()

    def _write_manifest(self) -> None:
        paths = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "files": {
                path: {
                    "size": (self.folder / path).stat().st_size,
                    "sha256": self._hashes.get(path) or file_sha256(self.folder / path),
                }
                for path in paths
            },
            "tensors": self._tensors,
        }
        text = _lines({**manifest, "digest": _digest(manifest)}) + "\n"
        (self.folder / "manifest.json").write_text(text, encoding="utf-8")

    def _open(self, kind: str, key: str, array: np.ndarray) -> SafetensorsWriter:
        file = self._file
        if file and (
            kind != self._kind
            or not file.fits(key, array)
            or (file.size > 8 + file.header_room and file.size + array.nbytes > self.max_file_bytes)
        ):
            self._close()
        if self._file is None:
            self._counts[kind] += 1
            self._kind = kind
            self._file = SafetensorsWriter(self.folder / f"{kind}-{self._counts[kind]:05d}.safetensors", _HEADER_ROOM)
        return self._file

    def _close(self, kind: Any = None, error: Any = None, trace: Any = None) -> None:
        if self._file is None:
            return
        self._file.__exit__(kind, error, trace)
        if kind is None:
            # The header lies before the data but is known last, so the hash is taken now, from the file cache.
            self._hashes[self._file.path.name] = file_sha256(self._file.path)
        self._file = None


def open_checkpoint(path: str | Path, verify: bool = True) -> Checkpoint:
    """Open a step folder, or a run folder through its ``latest``.

    Always checks the manifest, the presence and size of every file. ``verify`` also hashes every file, which reads
    all of it once; leave it out for very large checkpoints that were verified before. UserError names what is wrong.
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
    """A readable checkpoint; use open_checkpoint.

    ``path`` the step folder, ``step``, ``model`` (model.json), ``trainer`` (trainer.json or None).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = load_json(path / "manifest.json", "a checkpoint manifest")
        where = path / "manifest.json"
        if manifest.get("format") != FORMAT:
            raise UserError(f"{where}: format {manifest.get('format')!r} is not {FORMAT!r}; give another folder")
        if manifest.get("version") != VERSION:
            raise UserError(
                f"{where}: format version {manifest.get('version')!r} is unknown; this program reads version "
                f"{VERSION}, use the one that wrote it"
            )
        found = manifest.pop("digest", None)
        if found != (expected := _digest(manifest)):
            raise UserError(f"{where}: altered: its digest says {found}, its content gives {expected}")
        try:
            self.step = int(manifest["step"])
            self._sizes = {name: (int(f["size"]), str(f["sha256"])) for name, f in manifest["files"].items()}
            self._entries = {
                kind: {name: _entry(item) for name, item in manifest["tensors"][kind].items()} for kind in KINDS
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: damaged, {type(error).__name__} {error}") from None
        self._files: dict[str, SafetensorsFile] = {}
        self._check_files()
        self.model = load_json(self._inside("model.json"), "a model description")
        self.trainer: dict[str, Any] | None = None
        if "trainer.json" in self._sizes:
            self.trainer = load_json(self._inside("trainer.json"), "a trainer state")

    @property
    def assets(self) -> list[Path]:
        """The small files (tokenizer) kept with the checkpoint."""
        return [self.path / name for name in self._sizes if name.startswith("assets/")]

    @property
    def files(self) -> list[Path]:
        """Every file of the checkpoint, the manifest included."""
        return [self.path / "manifest.json", *(self.path / name for name in self._sizes)]

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(size for size, _ in self._sizes.values())

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of ``kind`` ("weights" or "optimizer"), in the order they were saved."""
        return list(self._entries[kind])

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Global shape; UserError if there is no such tensor."""
        return self._entry(kind, name).shape

    def dtype(self, kind: str, name: str) -> np.dtype:
        """Stored dtype (bfloat16 is ml_dtypes.bfloat16); UserError if there is no such tensor."""
        return DTYPES[self._entry(kind, name).code]

    def read(self, kind: str, name: str, index: Index | None = None) -> np.ndarray:
        """The tensor, or the box that ``index`` (slices without step) cuts from it, in the stored dtype.

        Reads only the bytes of that box from the pieces it meets. UserError if the tensor is missing, or its pieces
        are not what the manifest says.
        """
        entry = self._entry(kind, name)
        self._check_tiling(kind, name, entry)
        starts, extents = box(entry.shape, index)
        out: np.ndarray | None = None
        for piece in entry.pieces:
            low = [max(s, o) for s, o in zip(starts, piece.offset, strict=True)]
            high = [min(s + n, o + m) for s, n, o, m in zip(starts, extents, piece.offset, piece.extent, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            local = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, piece.offset, strict=True))
            part = self._file(piece, entry).read(piece.key, local)
            if part.shape == extents:
                return part
            if out is None:
                out = np.empty(extents, DTYPES[entry.code])
            out[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, starts, strict=True))] = part
        return np.empty(extents, DTYPES[entry.code]) if out is None else out

    def verify(self, on_bytes: Callable[[int], Any] | None = None) -> None:
        """Hash every file and check every header against the manifest; ``on_bytes`` hears of progress.

        UserError names the file with the expected and the found hash.
        """
        for name, (_, expected) in self._sizes.items():
            found = file_sha256(self._inside(name), on_bytes)
            if found != expected:
                raise UserError(
                    f"{self.path / name}: altered: SHA-256 should be {expected}, found {found}; "
                    "use another checkpoint or restore this file"
                )
        for kind in KINDS:
            for name, entry in self._entries[kind].items():
                self._check_tiling(kind, name, entry)
                for piece in entry.pieces:
                    self._file(piece, entry)

    def _entry(self, kind: str, name: str) -> Entry:
        if name not in self._entries[kind]:
            raise UserError(f"{self.path}: holds no {kind} tensor '{name}'; it has {len(self._entries[kind])} others")
        return self._entries[kind][name]

    def _inside(self, name: str) -> Path:
        path = self.path / name
        if "\0" in name or not path.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{self.path / 'manifest.json'}: file '{name}' points outside the checkpoint folder")
        return path

    def _check_files(self) -> None:
        if "model.json" not in self._sizes:
            raise UserError(f"{self.path / 'manifest.json'}: does not list model.json; the checkpoint is incomplete")
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
                    f"{self.path / 'manifest.json'}: piece '{piece.key}' lies in '{piece.file}', which is not listed"
                )

    def _file(self, piece: Piece, entry: Entry) -> SafetensorsFile:
        """The file of a piece, its header read once and held against the manifest."""
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

    def _check_tiling(self, kind: str, name: str, entry: Entry) -> None:
        """The pieces must cover the tensor, each element once."""
        covered = sum(math.prod(piece.extent) for piece in entry.pieces)
        outside = any(
            o + n > size for p in entry.pieces for o, n, size in zip(p.offset, p.extent, entry.shape, strict=True)
        )
        overlap = any(
            all(
                a < d + e and d < a + b
                for a, b, d, e in zip(one.offset, one.extent, two.offset, two.extent, strict=True)
            )
            for one, two in itertools.combinations(entry.pieces, 2)
        )
        if outside or overlap or covered != math.prod(entry.shape):
            raise UserError(
                f"{self.path / 'manifest.json'}: the {len(entry.pieces)} pieces of {kind} '{name}' cover {covered} "
                f"of {math.prod(entry.shape)} elements{' and overlap' if overlap else ''}"
            )


def check_shapes(
    table: Mapping[str, ParamSpec], names_and_shapes: Mapping[str, tuple[int, ...]], where: str = "checkpoint"
) -> None:
    """Hold the tensors found against the model's parameter table.

    UserError, starting with ``where``, lists the first missing or unexpected names, or the tensor whose shape differs
    with the expected and the found shape.
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


class _Counted:
    """A stream of tensors that knows the bytes that passed, so that a failed save can say what it would take."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = iter(tensors)
        self._bytes = 0

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, array in self._tensors:
            self._bytes += array.nbytes
            yield name, array
            del array

    def drain(self) -> int:
        for _ in self:
            pass
        return self._bytes


def _find(path: Path) -> Path:
    """The step folder meant by ``path``."""
    if not standing(path).is_dir():
        raise UserError(f"{path}: no such folder; expected a checkpoint or a run that saved one")
    path = standing(path)
    if (path / "manifest.json").is_file():
        return path
    pointer = path / "latest"
    if not pointer.is_file():
        raise UserError(f"{path}: holds neither manifest.json nor latest; give a checkpoint or a run that saved one")
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not _STEP.fullmatch(name):
        raise UserError(f"{pointer}: damaged, {name[:80]!r} is no step folder; give the step folder itself")
    if not standing(path / name).is_dir():
        raise UserError(f"{pointer}: names '{name}', which is missing; give another step folder of {path}")
    return standing(path / name)


def _prune(root: Path, newest: Path, keep_last: int) -> None:
    """Keep ``newest`` and the ``keep_last`` - 1 saved last before it (by time: a run may go back to an older step)."""
    others = [p for p in root.iterdir() if _STEP.fullmatch(p.name) and p != newest and (p / "manifest.json").is_file()]
    others.sort(key=lambda p: ((p / "manifest.json").stat().st_mtime_ns, p.name), reverse=True)
    for folder in others[max(keep_last - 1, 0) :]:
        try:
            remove_folder(folder)
        except OSError as error:
            _log.warning("%s: old checkpoint could not be removed (%s)", folder, error.strerror)


def _entry(item: Mapping[str, Any]) -> Entry:
    shape, code = _naturals(item["shape"]), item["dtype"]
    if code not in DTYPES:
        raise ValueError(f"unknown dtype {code!r}")
    pieces = tuple(
        Piece(str(p["file"]), str(p["key"]), _naturals(p["offset"]), _naturals(p["extent"])) for p in item["pieces"]
    )
    if any(len(p.offset) != len(shape) or len(p.extent) != len(shape) for p in pieces):
        raise ValueError(f"a piece of a {list(shape)} tensor has another number of dimensions")
    return Entry(shape, code, pieces)


def _naturals(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} is no list of sizes")
    return tuple(values)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _lines(value: Any, depth: int = 3, indent: str = "") -> str:
    """JSON with a line for each file and each tensor, so that the manifest can be read and searched."""
    if depth == 0 or not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = indent + " "
    items = (f"{inner}{json.dumps(str(k))}: {_lines(v, depth - 1, inner)}" for k, v in value.items())
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def _first(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" for name in names[:limit]) + more
