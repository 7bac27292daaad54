"""Writer of checkpoint pieces into safetensors files, and of the manifest over them (docs/checkpoints.md).

core.checkpoint.save decides which rank writes when; core.checkpoint.read reads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.direct_io import Spool
from telechat_twins.core.files.safetensors import SafetensorsWriter, StreamedSafetensors, dtype_code, file_sha256
from telechat_twins.core.types import JsonObject

FORMAT = "tele-checkpoint"
VERSION = 1
KINDS = ("weights", "optimizer")
MAX_FILE_BYTES = 4 << 30
# One thread hashes a whole file, so planned bytes are divided among files that threads share when they are verified. A
# full file is synced while the next one fills; the last one when all else is done. Smaller files would be too many.
LEAST_FILE_BYTES, FILES = 128 << 20, 64

# Header room of a file whose tensors are not known in advance: some hundreds of entries, and data on a 64 KiB boundary.
_HEADER_ROOM = (64 << 10) - 8


class TensorPiece(NamedTuple):
    """A box of a tensor: ``array`` starts at ``offset`` in the tensor ``name``, whose global shape is ``shape``."""

    name: str
    array: np.ndarray
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class PieceSpec(NamedTuple):
    """A planned piece: a TensorPiece with dtype and extent in place of the array."""

    name: str
    dtype: np.dtype
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.extent) * self.dtype.itemsize


class Planned(NamedTuple):
    """All planned pieces of one kind, in the order of writing, and their total bytes."""

    pieces: Iterable[PieceSpec]
    nbytes: int


Tensors = Iterable[TensorPiece | tuple[str, np.ndarray]]


def whole(name: str, array: np.ndarray) -> TensorPiece:
    """The whole tensor as one piece."""
    return TensorPiece(name, array, (0,) * array.ndim, array.shape)


class PieceWriter:
    """Writer of tensor pieces into the files of a folder; ``part`` describes them for ``write_manifest``.

    Each kind has files of its own. A new file is begun when one would exceed ``max_file_bytes``; a single larger tensor
    has a file to itself. ``rank`` becomes part of the file names. Files of the kinds in ``planned`` bypass the page
    cache (core.files.direct_io); their pieces must be added in the planned order, and their files hold at most a
    ``FILES``-th of all planned bytes, or ``LEAST_FILE_BYTES`` if that is more.
    """

    def __init__(
        self,
        folder: Path,
        max_file_bytes: int = MAX_FILE_BYTES,
        rank: int | None = None,
        planned: Mapping[str, Planned] | None = None,
    ) -> None:
        self.folder = folder
        self.max_file_bytes = max_file_bytes
        self._stem = "" if rank is None else f"{rank:05d}-"
        self._tensors: dict[str, dict[str, JsonObject]] = {kind: {} for kind in KINDS}
        self._open: dict[str, SafetensorsWriter | StreamedSafetensors] = {}
        plans = planned or {}
        most = min(max_file_bytes, max(LEAST_FILE_BYTES, sum(plan.nbytes for plan in plans.values()) // FILES))
        self._planned = {kind: _planned_files(plan.pieces, most) for kind, plan in plans.items()}
        self._spool = Spool() if planned else None
        self._counts = dict.fromkeys(KINDS, 0)
        self._files: dict[str, JsonObject] = {}
        # Full files are synced and hashed in these threads while the next one is written: one may wait for the disk
        # while another is hashed.
        self._finisher = ThreadPoolExecutor(2, "finish-file")
        self._finishing: list[Future[None]] = []

    def add(self, kind: str, piece: TensorPiece) -> None:
        """Write one piece. ValueError if it contradicts earlier pieces of its tensor, or repeats a whole tensor."""
        name, array, shape = piece.name, piece.array, tuple(piece.shape)
        entry: JsonObject = {"shape": list(shape), "dtype": dtype_code(array.dtype), "pieces": []}
        entry = _agreeing(self._tensors[kind].setdefault(name, entry), entry, kind, name)
        if entry["pieces"] and array.shape == shape:
            raise ValueError(f"{kind} '{name}' was given twice")
        if array.size == 0 and 0 not in shape:
            return  # a rank's empty part; its key would equal that of the piece that starts at this offset
        key = _key(name, piece.offset, array.shape, shape)
        file = self._file(kind, key, array)
        file.add(key, array)
        entry["pieces"].append(
            {"file": file.path.name, "key": key, "offset": list(piece.offset), "extent": list(array.shape)}
        )

    def part(self) -> JsonObject:
        """JSON description of what was written: ``tensors`` by kind and name, ``files`` with size and SHA-256. Valid
        after the context has been left."""
        return {"tensors": self._tensors, "files": self._files}

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, file in list(self._open.items()):
            if kind is None:
                self._close(name)
            elif isinstance(file, StreamedSafetensors):
                file.abandon()
            else:
                file.__exit__(kind, error, trace)
        self._finisher.shutdown()  # waits
        if self._spool:
            self._spool.__exit__()
        for finished in self._finishing if kind is None else ():
            finished.result()

    def _file(self, kind: str, key: str, array: np.ndarray) -> SafetensorsWriter | StreamedSafetensors:
        file = self._open.get(kind)
        if file and (file.full if isinstance(file, StreamedSafetensors) else self._is_full(file, key, array)):
            self._close(kind)
        if kind not in self._open:
            self._counts[kind] += 1
            path = self.folder / f"{kind}-{self._stem}{self._counts[kind]:05d}.safetensors"
            if self._spool and kind in self._planned:
                # The room of a file that is not planned, so that both kinds of save give the same bytes.
                specs = next(self._planned[kind], {})
                self._open[kind] = StreamedSafetensors(path, specs, self._spool, _HEADER_ROOM)
            else:
                self._open[kind] = SafetensorsWriter(path, _HEADER_ROOM)
        return self._open[kind]

    def _is_full(self, file: SafetensorsWriter, key: str, array: np.ndarray) -> bool:
        some = file.size > 8 + file.header_room
        return not file.fits(key, array) or (some and file.size + array.nbytes > self.max_file_bytes)

    def _close(self, kind: str) -> None:
        self._finishing.append(self._finisher.submit(self._finish, self._open.pop(kind)))

    def _finish(self, file: SafetensorsWriter | StreamedSafetensors) -> None:
        if isinstance(file, StreamedSafetensors):
            size, digest = file.finish()
        else:
            file.__exit__(None, None, None)
            # The header comes first in the file but is known last, so the file is hashed now, from the page cache.
            size, digest = file.path.stat().st_size, file_sha256(file.path)
        self._files[file.path.name] = {"size": size, "sha256": digest}


def _key(name: str, offset: Sequence[int], extent: Sequence[int], shape: Sequence[int]) -> str:
    return name if tuple(extent) == tuple(shape) else f"{name}@{'.'.join(map(str, offset))}"


def _planned_files(pieces: Iterable[PieceSpec], max_bytes: int) -> Iterator[dict[str, tuple[str, tuple[int, ...]]]]:
    """The planned tensors of each file of one kind: key -> dtype code, shape."""
    file: dict[str, tuple[str, tuple[int, ...]]] = {}
    size = 0
    for piece in pieces:
        if file and size + piece.nbytes > max_bytes:
            yield file
            file, size = {}, 0
        file[_key(piece.name, piece.offset, piece.extent, piece.shape)] = dtype_code(piece.dtype), piece.extent
        size += piece.nbytes
    if file:
        yield file


def write_manifest(
    folder: Path,
    step: int,
    parts: Sequence[JsonObject],
    save: str | None = None,
    number: int | None = None,
) -> None:
    """manifest.json over the pieces in ``parts`` (PieceWriter.part of each rank) and every file now in ``folder``.

    ``save`` identifies a save by many ranks; ``number`` counts the saves of a run. ValueError if pieces contradict
    each other or do not make up their tensor.
    """
    tensors: dict[str, dict[str, JsonObject]] = {kind: {} for kind in KINDS}
    known: dict[str, JsonObject] = {}
    for part in parts:
        known.update(part["files"])
        for kind in KINDS:
            for name, entry in part["tensors"][kind].items():
                merged = tensors[kind].setdefault(name, {**entry, "pieces": []})
                _agreeing(merged, entry, kind, name)["pieces"] += entry["pieces"]
    for kind in KINDS:
        for name, entry in tensors[kind].items():
            boxes = [(piece["offset"], piece["extent"]) for piece in entry["pieces"]]
            if fault := tiling_fault(entry["shape"], boxes):
                raise ValueError(f"the {len(boxes)} pieces of {kind} '{name}' {fault}")
    files = {}
    for path in sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()):
        size = (folder / path).stat().st_size
        files[path] = known.get(path) or {"size": size, "sha256": file_sha256(folder / path)}
        if files[path]["size"] != size:
            raise UserError(
                f"{folder / path}: must have the {files[path]['size']} bytes that its rank wrote, rank 0 finds {size}; "
                "let all ranks save to one shared file system, and save again"
            )
    manifest = {"format": FORMAT, "version": VERSION, "step": step}
    manifest |= ({"save": save} if save else {}) | ({} if number is None else {"number": number})
    manifest |= {"files": files, "tensors": tensors}
    text = _lines({**manifest, "digest": manifest_digest(manifest)}) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def manifest_digest(manifest: JsonObject) -> str:
    """SHA-256 of the manifest (without ``digest``) as JSON with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tiling_fault(shape: Sequence[int], boxes: Iterable[tuple[Sequence[int], Sequence[int]]]) -> str | None:
    """None if the boxes (offset, extent) cover each element of a tensor of ``shape`` exactly once; else the fault."""
    spans = [(tuple(offset), tuple(o + n for o, n in zip(offset, extent, strict=True))) for offset, extent in boxes]
    covered = sum(math.prod(b - a for a, b in zip(low, high, strict=True)) for low, high in spans)
    outside = any(b > size for _, high in spans for b, size in zip(high, shape, strict=True))
    overlap = _overlap([span for span in spans if all(a < b for a, b in zip(*span, strict=True))], len(shape))
    if not outside and not overlap and covered == math.prod(shape):
        return None
    return f"cover {covered} of {math.prod(shape)} elements{overlap}"


_MAX_OPEN_BOXES = 128
_Span = tuple[tuple[int, ...], tuple[int, ...]]


def _overlap(spans: list[_Span], dimensions: int) -> str:
    """The fault if two non-empty boxes (low, high) overlap, or if too many lie side by side to check that quickly: no
    layout cuts a tensor into hundreds of boxes that begin at the same place of an axis. "" if neither."""
    if not dimensions:
        return " and overlap" if len(spans) > 1 else ""
    # Sweep along the axis with the most cuts. `reaching` has the boxes that extend beyond the start of the next one;
    # along this axis they are few, and only they can overlap with it.
    axis = max(range(dimensions), key=lambda i: len({low[i] for low, _ in spans}))
    others = [i for i in range(dimensions) if i != axis]
    reaching: list[_Span] = []
    left = 10_000 + _MAX_OPEN_BOXES * len(spans)
    for low, high in sorted(spans, key=lambda span: span[0][axis]):
        left -= len(reaching)
        if left < 0:
            return ", too many of them side by side"
        reaching = [span for span in reaching if span[1][axis] > low[axis]]
        met = reaching
        for i in others:
            met = [(a, b) for a, b in met if a[i] < high[i] and low[i] < b[i]]
        if met:
            return " and overlap"
        reaching.append((low, high))
    return ""


def _agreeing(entry: JsonObject, other: JsonObject, kind: str, name: str) -> JsonObject:
    if (entry["shape"], entry["dtype"]) != (other["shape"], other["dtype"]):
        raise ValueError(
            f"{kind} '{name}': piece of a {other['dtype']} {other['shape']} tensor, before it was "
            f"{entry['dtype']} {entry['shape']}"
        )
    return entry


def _lines(value: object, depth: int = 3, indent: str = "") -> str:
    """JSON with a line for each file and each tensor, so that the manifest can be read and searched."""
    if depth == 0 or not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = indent + " "
    items = (f"{inner}{json.dumps(str(k))}: {_lines(v, depth - 1, inner)}" for k, v in value.items())
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"
