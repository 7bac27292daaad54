"""Packed token files: a folder of flat arrays that training maps into memory, and the view that cuts samples from it.

    meta.json        format, version, kind, counts, tokenizer, size and SHA-256 of every file below
    tokens.bin       uint16 (vocabulary up to 65536) or int32, little-endian, every token in a row
    documents.bin    int64 [documents + 1], where each document starts; the last entry is the number of tokens
    sequences.bin    int64 [sequences + 1], kind "sft" only: where each training sequence starts
    mask.bin         uint8 [tokens], kind "sft" only: 1 where the token counts as a target
    tokenizer.model  the tokenizer that made the ids

The folder appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from core.atomic import clean_stale, mark_lives, publish, standing, start_building
from core.batch import IGNORE
from core.data.tokenizer import Tokenizer
from core.errors import UserError

FORMAT, VERSION = "telechat-packed", 1
KINDS = ("text", "sft")


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest stored type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<i4")


class PackedWriter:
    """Writes one packed folder; use as a context manager and call ``finish`` at the end.

    Memory stays flat: tokens and offsets go to disk as they come. Leaving without ``finish`` removes everything.
    UserError when ``out`` exists (unless ``force`` and it is a packed folder), or when the disk refuses.
    """

    def __init__(self, out: str | Path, tokenizer: Tokenizer, kind: str, force: bool = False):
        self.out = Path(out).absolute()
        self._tokenizer, self._kind = tokenizer, kind
        self._dtype = token_dtype(tokenizer.vocab_size)
        if self.out.parent.is_dir():
            with self._disk():
                clean_stale(self.out.parent)
                _remove_abandoned(self.out)
        _may_write(self.out, force)
        self.tokens = self.documents = self.sequences = self.targets = 0
        self.largest_id = -1
        self._finished = False
        names = ["tokens.bin", "documents.bin"] + (["sequences.bin", "mask.bin"] if kind == "sft" else [])
        self._files: dict[str, _HashedFile] = {}
        with self._disk():
            self._partial = start_building(self.out)
        try:
            with self._disk():
                for name in names:
                    self._files[name] = _HashedFile(self._partial / name)
        except BaseException:
            self.discard()
            raise

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            self.discard()

    def discard(self) -> None:
        """Remove what was written so far."""
        for file in self._files.values():
            file.abandon()
        shutil.rmtree(self._partial, ignore_errors=True)

    def start_document(self) -> None:
        """The tokens that follow belong to a new document."""
        self._offset("documents.bin")
        self.documents += 1

    def add_tokens(self, ids: Sequence[int] | np.ndarray, where: str = "") -> None:
        """Append to the current document. UserError on an id outside the tokenizer's vocabulary."""
        tokens = np.asarray(ids, np.int64)
        if tokens.size:
            largest = int(tokens.max())
            if largest >= self._tokenizer.vocab_size or int(tokens.min()) < 0:
                prefix = f"{where}: " if where else ""
                raise UserError(
                    f"{prefix}token id {largest} is outside the vocabulary of {self._tokenizer.vocab_size} "
                    f"({self._tokenizer.piece(largest)}); a model of that size cannot embed it"
                )
            self.largest_id = max(self.largest_id, largest)
        self._write("tokens.bin", tokens.astype(self._dtype))
        self.tokens += tokens.size

    def add_sequence(self, ids: np.ndarray, loss_mask: np.ndarray, starts: Sequence[int], where: str = "") -> None:
        """Append one training sequence with its mask and the offsets inside it where documents start."""
        self._offset("sequences.bin")
        self.sequences += 1
        base = self.tokens
        self._write("documents.bin", np.asarray([base + s for s in starts], "<i8"))
        self.documents += len(starts)
        self.add_tokens(ids, where)
        self._write("mask.bin", loss_mask.astype(np.uint8))
        # Position 0 of a sequence is predicted by nothing.
        self.targets += int(loss_mask[1:].sum())

    def finish(self, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write meta.json, make the folder visible under its name, return the meta."""
        text = self._kind == "text"
        if self.documents == 0 or self.tokens < 2 or not (text or self.targets):
            what = "no text" if text else "no sequence with an answer to learn"
            raise UserError(f"{self.out}: the data set would be empty ({what} in the input); nothing was written")
        for name in ("documents.bin", "sequences.bin"):
            if name in self._files:
                self._offset(name)
        with self._disk():
            (self._partial / "tokenizer.model").write_bytes(self._tokenizer.model_bytes)
            files = {name: file.close() for name, file in self._files.items()}
            files["tokenizer.model"] = {"bytes": len(self._tokenizer.model_bytes), "sha256": self._tokenizer.sha256}
            meta = {
                "format": FORMAT,
                "version": VERSION,
                "kind": self._kind,
                "vocab_size": self._tokenizer.vocab_size,
                "dtype": self._dtype.name,
                "tokens": self.tokens,
                "documents": self.documents,
                **({} if text else {"sequences": self.sequences, "targets": self.targets}),
                "largest_id": self.largest_id,
                "tokenizer": {"sha256": self._tokenizer.sha256, "control": self._tokenizer.variant},
                **(extra or {}),
                "files": files,
            }
            with open(self._partial / "meta.json", "w", encoding="utf-8") as file:
                json.dump(meta, file, ensure_ascii=False, indent=1)
            publish(self._partial, self.out)
        self._finished = True
        return meta

    def _offset(self, name: str) -> None:
        self._write(name, np.asarray([self.tokens], "<i8"))

    def _write(self, name: str, array: np.ndarray) -> None:
        with self._disk():
            self._files[name].write(array.tobytes())

    @contextlib.contextmanager
    def _disk(self) -> Any:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror}); nothing was left behind") from None


class PackedDataset:
    """A packed folder, opened for reading. ``meta`` is meta.json; nothing is loaded before it is used.

    UserError when the folder is missing, unfinished, of another format, or when a file has not its recorded size.
    """

    def __init__(self, path: str | Path):
        self.path = standing(Path(path))
        self.meta = _read_meta(self.path)
        self.kind: str = self.meta["kind"]
        self.vocab_size: int = self.meta["vocab_size"]
        for name, facts in self.meta["files"].items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size != facts["bytes"]:
                found = "missing" if size is None else f"{size} bytes"
                raise UserError(f"{file}: expected {facts['bytes']} bytes, found {found}; make the folder again")
        self.tokens = self._map("tokens.bin", np.dtype(self.meta["dtype"]).newbyteorder("<"))
        self.documents = self._map("documents.bin", np.dtype("<i8"))
        sft = self.kind == "sft"
        self.mask = self._map("mask.bin", np.dtype(np.uint8)) if sft else None
        self.sequences = self._map("sequences.bin", np.dtype("<i8")) if sft else None

    def verify(self) -> None:
        """Hash every file; UserError names the first that was altered."""
        for name, facts in self.meta["files"].items():
            with open(self.path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != facts["sha256"]:
                raise UserError(f"{self.path / name}: altered (SHA-256 {found[:16]}, recorded {facts['sha256'][:16]})")

    def digest(self) -> str:
        """Identifies the contents: a hash of the recorded hashes."""
        facts = {name: f["sha256"] for name, f in sorted(self.meta["files"].items())}
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def check_seq_len(self, seq_len: int) -> None:
        """UserError when samples of ``seq_len`` would cut stored sequences."""
        stored = self.meta.get("max_length", 0)
        if self.kind == "sft" and seq_len < stored:
            raise UserError(
                f"data.seq_len: {seq_len} would cut the sequences of {self.path}, packed for {stored}; "
                f"use data.seq_len={stored} or pack again with --seq-len {seq_len}"
            )

    def num_samples(self, seq_len: int) -> int:
        """Samples of ``seq_len`` in one pass: windows of the stream (the last one may be padded), or the sequences."""
        if self.sequences is not None:
            return len(self.sequences) - 1
        return -(-(len(self.tokens) - 1) // seq_len)

    def sample(
        self, index: int, seq_len: int, pad_token_id: int, isolate: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Sample ``index`` -> input_ids, targets, positions, doc_ids, each int32 [seq_len].

        Windows of text overlap by one token, so every token but the first is a target exactly once. Padding is on the
        right with IGNORE targets. ``isolate``: positions restart at each document, doc_ids number the documents from 0
        (padding has its own), and no target crosses into another document. Otherwise positions are 0..seq_len-1 and
        doc_ids all 0. UserError when the files no longer hold what was packed.
        """
        if self.sequences is not None:
            begin, end = int(self.sequences[index]), int(self.sequences[index + 1])
        else:
            begin = index * seq_len
            end = len(self.tokens)
        end = min(end, begin + seq_len + 1)
        taken = self.tokens[begin:end].astype(np.int32)
        self._check(taken, begin, end)
        inputs = taken[:seq_len]
        input_ids = np.full(seq_len, pad_token_id, np.int32)
        input_ids[: len(inputs)] = inputs
        counts = np.ones(len(taken), bool) if self.mask is None else self.mask[begin:end] != 0
        positions = np.arange(seq_len, dtype=np.int32)
        doc_ids = np.zeros(seq_len, np.int32)
        if isolate:
            starts = np.zeros(max(len(taken), seq_len) + 1, bool)
            starts[self._starts(begin, end) - begin] = True
            counts = counts & ~starts[: len(taken)]
            starts[len(taken)] = True
            numbered = np.cumsum(starts[:seq_len], dtype=np.int32)
            doc_ids = numbered
            positions = positions - np.maximum.accumulate(np.where(starts[:seq_len], positions, 0)).astype(np.int32)
        targets = np.full(seq_len, IGNORE, np.int32)
        targets[: len(taken) - 1] = np.where(counts[1:], taken[1:], IGNORE)
        return input_ids, targets, positions, doc_ids

    def _check(self, taken: np.ndarray, begin: int, end: int) -> None:
        """What a corpus altered in place would break far away, inside an embedding; hashing all of it takes too long
        to be done before every run."""
        if not 0 <= begin < end <= len(self.tokens):
            raise UserError(
                f"{self.path / 'sequences.bin'}: altered, a sequence goes from token {begin} to {end} of "
                f"{len(self.tokens)}; make the folder again"
            )
        bad = (taken < 0) | (taken >= self.vocab_size)
        if bad.any():
            place = int(np.argmax(bad))
            raise UserError(
                f"{self.path / 'tokens.bin'}: altered, token id {taken[place]} at place {begin + place} is outside the "
                f"vocabulary of {self.vocab_size}; make the folder again"
            )

    def _starts(self, begin: int, end: int) -> np.ndarray:
        """Document starts strictly inside (begin, end)."""
        low, high = np.searchsorted(self.documents, [begin + 1, end])
        return np.asarray(self.documents[low:high])

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        return np.memmap(self.path / name, dtype=dtype, mode="r")


class _HashedFile:
    """A file that hashes what is written to it."""

    def __init__(self, path: Path):
        self._file: BinaryIO = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by close or abandon)
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def is_packed(path: str | Path) -> bool:
    """Whether a folder is a finished packed folder (of any version)."""
    try:
        return json.loads((Path(path) / "meta.json").read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def _may_write(out: Path, force: bool) -> None:
    """UserError unless there is nothing to replace, or an older packed folder that may go."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_packed(out):
        raise UserError(f"{out}: exists and is not a packed folder; choose another --out")
    if not force:
        raise UserError(f"{out}: exists already; choose another --out, or replace it with --force")


def _remove_abandoned(out: Path) -> None:
    """What earlier versions, which had names of their own for it, left when they were killed; that of a living process
    stays."""
    for folder in [*out.parent.glob(f".{out.name}.*.partial"), *out.parent.glob(f".{out.name}.*.old")]:
        pid = folder.name.split(".")[-2]
        if not pid.isdigit() or mark_lives(pid):
            continue
        if folder.suffix == ".old" and not out.exists() and is_packed(folder):
            folder.rename(out)  # killed between two renames: the data set itself
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / "meta.json"
    if not path.is_dir():
        raise UserError(f"{path}: no such packed folder; make one with `tele data`")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not a packed folder (no meta.json); make one with `tele data`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{file}: is not the meta.json of a packed folder; make one with `tele data`")
    if meta.get("version") != VERSION:
        raise UserError(f"{file}: format version {meta.get('version')}, this program reads {VERSION}; pack again")
    needed = {"kind": str, "vocab_size": int, "dtype": str, "tokens": int, "largest_id": int, "files": dict}
    for key, kind in needed.items():
        if not isinstance(meta.get(key), kind):
            raise UserError(f"{file}: field '{key}' is missing or damaged; make the folder again")
    names = {"tokens.bin", "documents.bin"} | ({"mask.bin", "sequences.bin"} if meta["kind"] == "sft" else set())
    plain = all(name == os.path.basename(name) for name in meta["files"])
    if (
        meta["kind"] not in KINDS
        or meta["dtype"] not in ("uint16", "int32")
        or not plain
        or names - meta["files"].keys()
    ):
        raise UserError(f"{file}: inconsistent; make the folder again")
    return meta
