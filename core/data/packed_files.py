"""Integrity of a packed folder: the hashes in its meta.json, and how they are checked.

meta.json holds the size and SHA-256 of every other file and, since version 2, of itself (over its own bytes, with zeros
in the hash's place). Small files and those that say where things are get hashed when the folder is opened. tokens.bin
and mask.bin may be larger than memory, so the SHA-256 of each of their blocks is kept as well (tokens.sums, mask.sums)
and a block is hashed when it is first read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import load_json
from telechat_twins.core.near import near_path
from telechat_twins.core.types import JsonObject

FORMAT, VERSION = "telechat-packed", 2
VERSIONS = (1, 2)  # 1: without the hash of meta.json and those of blocks
KINDS = ("text", "sft", "preference")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
BLOCK = 1 << 16
SMALL = 1 << 26  # bytes of a file that is hashed as a whole whenever it is opened
SUMS = {"tokens.bin": "tokens.sums", "mask.bin": "mask.sums"}
_MENDING = "make the folder again, or copy it again from where it is whole"

OnBytes = Callable[[int], object]

_SELF = re.compile(rb'"meta_sha256": "([0-9a-f]{64})"')
_ZEROS = "0" * 64
_HEX = re.compile("[0-9a-f]{64}")
_COUNTS = ("vocab_size", "tokens", "documents")


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest stored type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<i4")


def tokenizer_name(meta: JsonObject) -> str:
    """The name of the tokenizer's file in a packed folder."""
    return str(meta["tokenizer"].get("file", TOKENIZER_FILES[0]))


def sealed(text: str) -> str:
    """The text of a meta.json whose "meta_sha256" is _ZEROS, with the hash in its place."""
    return text.replace(_ZEROS, hashlib.sha256(text.encode()).hexdigest(), 1)


def unsealed() -> str:
    """What "meta_sha256" is before ``sealed``."""
    return _ZEROS


_HELD = 1 << 14  # bytes that are put into a file at once
_AHEAD = 1 << 23  # bytes after which the system begins to put them to disk


class HashedFile:
    """A new file that hashes what is written to it; ``sums`` receives the SHA-256 of each block of it."""

    def __init__(self, path: Path, sums: HashedFile | None = None):
        self._file: BinaryIO = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by close or abandon)
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._sums, self._block = sums, hashlib.sha256()
        self._held = bytearray()
        self._begun = 0  # bytes of which the system knows that they are to be on disk

    def write(self, data: bytes | memoryview) -> None:
        """Append; short pieces are put into the file together. ``data``: of items of a byte."""
        if len(data) < _HELD:
            self._held += data
            if len(self._held) >= _HELD:
                self._put_held()
        else:
            self._put_held()
            self._put(memoryview(data))

    def _put_held(self) -> None:
        data, self._held = self._held, bytearray()
        self._put(memoryview(data))

    def _put(self, data: memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        if self._sums is None:
            self._bytes += len(data)
            return
        while data:
            fitting = min(BLOCK - self._bytes % BLOCK, len(data))
            self._block.update(data[:fitting])
            self._bytes += fitting
            data = data[fitting:]
            if self._bytes % BLOCK == 0:
                self._end_block()
        if self._bytes - self._begun >= _AHEAD:
            self._begin_to_store()

    def _begin_to_store(self) -> None:
        """Let the system put to disk what is new, while more is made: ``close`` would wait for all of it."""
        self._file.flush()
        # Linux begins to write what it is told to drop, and drops only what is on disk; elsewhere it is advice at most.
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._file.fileno(), self._begun, self._bytes - self._begun, os.POSIX_FADV_DONTNEED)
        self._begun = self._bytes

    def close(self) -> JsonObject:
        """Everything to disk; the file's facts for meta.json. The file of the sums is closed after this one."""
        self._put_held()
        if self._sums is not None and self._bytes % BLOCK:
            self._end_block()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        """Close a file that is not kept; what it holds back may not fit on the disk, and need not."""
        self._held.clear()
        with contextlib.suppress(OSError):
            self._file.close()

    def _end_block(self) -> None:
        assert self._sums is not None
        self._sums.write(self._block.digest())
        self._block = hashlib.sha256()


class Blocks:
    """The bytes of one large file, whose blocks are hashed when they are first read."""

    def __init__(self, path: Path, sums: Path):
        self.path = path
        self._bytes: np.ndarray = np.memmap(path, np.uint8, "r")
        self._sums = np.memmap(sums, np.uint8, "r").reshape(-1, 32)
        self._known = np.zeros(len(self._sums), bool)

    def check(self, begin: int, end: int) -> None:
        """UserError if bytes ``begin`` to ``end`` lie in a block that is not as it was written."""
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            if self._known[block]:
                continue
            found = hashlib.sha256(self._bytes[block * BLOCK : (block + 1) * BLOCK].data).digest()
            if found != self._sums[block].tobytes():
                place = f"bytes {block * BLOCK} to {min((block + 1) * BLOCK, len(self._bytes))}"
                raise UserError(f"{self.path}: altered, {place} are not what was packed; {_MENDING}")
            self._known[block] = True


def read_meta(folder: Path) -> JsonObject:
    """meta.json, whole and consistent; UserError otherwise. Does not check the other files."""
    file = folder / "meta.json"
    if not folder.is_dir():
        near = near_path(folder)
        make = f"`tele data FILES --tokenizer tokenizer.model --out {shlex.quote(str(folder))}`"
        raise UserError(f"{folder}: no such packed folder{near}; make one with {make}")
    if not file.exists():
        raise UserError(
            f"{folder}: not a packed folder (no meta.json); give the --out of a `tele data`, which makes one of texts"
        )
    meta = load_json(file, "a packed folder's meta")
    if meta.get("format") != FORMAT:
        raise UserError(f"{file}: is not the meta.json of a packed folder; make one with `tele data`")
    version = meta.get("version")
    if type(version) is not int or version not in VERSIONS:
        raise UserError(f"{file}: format version {version!r}, this program reads {VERSION}; pack again")
    _check_seal(file, version)
    if reason := _inconsistency(meta):
        raise UserError(f"{file}: inconsistent ({reason}); {_MENDING}")
    return meta


def _check_seal(file: Path, version: int) -> None:
    """UserError unless the file's own hash is right; version 1 has none."""
    data = file.read_bytes()
    seals = _SELF.findall(data)
    if version == 1:
        if b"meta_sha256" in data:
            raise UserError(f"{file}: altered, version 1 has no hash of this file; {_MENDING}")
        return
    if len(seals) != 1 or sealed(_SELF.sub(b'"meta_sha256": "%s"' % _ZEROS.encode(), data).decode()).encode() != data:
        raise UserError(f"{file}: altered, its hash is not the recorded one; {_MENDING}")


def _inconsistency(meta: JsonObject) -> str:
    """What in a meta contradicts the rest or is missing; nothing for a meta that can be relied on."""
    if meta.get("kind") not in KINDS or meta.get("dtype") not in ("uint16", "int32"):
        return "kind or dtype"
    rows = meta["kind"] != "text"
    for name in (*_COUNTS, *(("sequences",) if rows else ())):
        if type(meta.get(name)) is not int or meta[name] < 1:
            return f"'{name}' is missing or damaged"
    for name in ("largest_id", *(("max_length",) if "max_length" in meta else ())):
        if type(meta.get(name)) is not int or meta[name] < 0:
            return f"'{name}' is missing or damaged"
    if meta["kind"] == "preference" and meta["sequences"] % 2:
        return "odd number of 'sequences', two make a pair"
    tokenizer, files = meta.get("tokenizer"), meta.get("files")
    if not isinstance(tokenizer, dict) or not isinstance(files, dict):
        return "'tokenizer' or 'files' is missing or damaged"
    sizes = {}
    for name, facts in files.items():
        if not isinstance(facts, dict) or name != os.path.basename(name) or type(facts.get("bytes")) is not int:
            return f"entry {name!r} of 'files'"
        hashed = "sha256" in facts or meta["version"] > 1
        if hashed and not (isinstance(facts.get("sha256"), str) and _HEX.fullmatch(facts["sha256"])):
            return f"hash of {name!r}"
        sizes[name] = facts["bytes"]
    item = np.dtype(meta["dtype"]).itemsize
    wanted = {"tokens.bin": meta["tokens"] * item, "documents.bin": 8 * (meta["documents"] + 1)}
    if rows:
        wanted |= {"mask.bin": meta["tokens"], "sequences.bin": 8 * (meta["sequences"] + 1)}
    if meta["version"] > 1:
        wanted |= {SUMS[name]: 32 * -(-wanted[name] // BLOCK) for name in SUMS if name in wanted}
    for name, size in wanted.items():
        if sizes.get(name) != size:
            return f"size of {name}: {sizes.get(name)} for {size}"
    kept = tokenizer_name(meta)
    if kept not in TOKENIZER_FILES or set(sizes) != {*wanted, kept} or sizes[kept] < 1:
        return "names of files"
    if token_dtype(meta["vocab_size"]).itemsize != item:
        return "dtype of the vocabulary"
    if tokenizer.get("sha256") != files[kept].get("sha256"):
        return "hash of the tokenizer"
    return ""


def check_size(folder: Path, meta: JsonObject, name: str) -> None:
    """UserError if a file is missing or has not its recorded size."""
    file, wanted = folder / name, meta["files"][name]["bytes"]
    size = file.stat().st_size if file.is_file() else None
    if size != wanted:
        found = "missing" if size is None else f"{size} bytes"
        raise UserError(f"{file}: expected {wanted} bytes, found {found}; {_MENDING}")


def check_hash(folder: Path, meta: JsonObject, name: str, on_bytes: OnBytes | None = None) -> None:
    """UserError if a file is not what was written; nothing where no hash is recorded."""
    recorded = meta["files"][name].get("sha256")
    if recorded is None:
        return
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    try:
        with open(folder / name, "rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(memoryview(block)[:count])
                if on_bytes:
                    on_bytes(count)
    except OSError as error:
        raise UserError(f"{folder / name}: cannot be read ({error.strerror})") from None
    if digest.hexdigest() != recorded:
        found = digest.hexdigest()[:16]
        raise UserError(f"{folder / name}: altered (SHA-256 {found}, recorded {recorded[:16]}); {_MENDING}")


def check_offsets(file: Path, offsets: np.ndarray, end: int, what: str) -> None:
    """UserError unless offsets rise from 0 to ``end``, each greater than the one before."""
    step = 1 << 20
    wrong = None
    if int(offsets[0]) != 0 or int(offsets[-1]) != end:
        wrong = f"from {int(offsets[0])} to {int(offsets[-1])} instead of from 0 to {end}"
    for begin in range(0, len(offsets) - 1, step):
        if wrong is not None:
            break
        part = offsets[begin : begin + step + 1]
        falls = part[1:] <= part[:-1]
        if falls.any():
            place = begin + int(np.argmax(falls))
            wrong = f"{what} {place} goes from token {int(offsets[place])} to {int(offsets[place + 1])}"
    if wrong is not None:
        raise UserError(f"{file}: altered, {wrong}; {_MENDING}")
