"""Packed token files: a folder of flat arrays that training maps into memory, and the view that cuts samples from it.

    meta.json        format, version, kind, counts, tokenizer, size and SHA-256 of itself and every file below
    tokens.bin       uint16 (vocabulary up to 65536) or int32, little-endian, every token in a row
    documents.bin    int64 [documents + 1], where each document starts; the last entry is the number of tokens
    sequences.bin    int64 [sequences + 1], not in kind "text": where each training sequence starts
    mask.bin         uint8 [tokens], not in kind "text": 1 where the token counts as a target
    tokens.sums      SHA-256 of each 64 KiB of tokens.bin; mask.sums: of mask.bin (core.data.packed_files)
    tokenizer.model  the tokenizer that made the ids (tokenizer.json: one of the tokenizers library)

Kind "text" is documents without end, "sft" training sequences, "preference" pairs of them (core.data.preference).

The folder appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from telechat_twins.core.data.packed_files import (
    FORMAT,
    SMALL,
    SUMS,
    VERSION,
    Blocks,
    HashedFile,
    OnBytes,
    check_hash,
    check_offsets,
    check_size,
    read_meta,
    sealed,
    token_dtype,
    tokenizer_name,
    unsealed,
)
from telechat_twins.core.data.tokenizer import Tokenizer
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import clean_stale, mark_lives, publish, standing, start_building
from telechat_twins.core.files.foreign import load_json
from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.types import JsonObject


class PackedWriter:
    """Writes one packed folder; use as a context manager and call ``finish`` at the end.

    ``dtype``: of the ids on the disk. Memory stays flat: tokens and offsets go to disk as they come. Leaving without
    ``finish`` removes everything.
    UserError when ``out`` exists (unless ``force`` and it is a packed folder), or when the disk refuses.
    """

    def __init__(self, out: str | Path, tokenizer: Tokenizer, kind: str, force: bool = False):
        self.out = Path(out).absolute()
        self._tokenizer, self._kind = tokenizer, kind
        self.dtype = token_dtype(tokenizer.vocab_size)
        if self.out.parent.is_dir():
            with self._disk():
                clean_stale(self.out.parent)
                _remove_abandoned(self.out)
        _may_write(self.out, force)
        self.tokens = self.documents = self.sequences = self.targets = 0
        self.largest_id = -1
        self._finished = False
        names = ["tokens.bin", "documents.bin"] + (["sequences.bin", "mask.bin"] if kind != "text" else [])
        self._files: dict[str, HashedFile] = {}
        with self._disk():
            self._partial = start_building(self.out)
        try:
            with self._disk():
                for name in names:
                    sums = SUMS.get(name)
                    if sums is not None:
                        self._files[sums] = HashedFile(self._partial / sums)
                    self._files[name] = HashedFile(self._partial / name, self._files[sums] if sums else None)
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

    def add_documents(self, ids: np.ndarray, starts: np.ndarray) -> None:
        """Append ids that go on with the current document, until others begin at ``starts``, offsets in ``ids``.

        UserError like ``add_tokens``.
        """
        self._write("documents.bin", (self.tokens + starts).astype("<i8"))
        self.documents += len(starts)
        self.add_tokens(ids)

    def add_tokens(self, ids: Sequence[int] | np.ndarray, where: str = "") -> None:
        """Append to the current document. UserError on an id outside the tokenizer's vocabulary."""
        tokens = ids if isinstance(ids, np.ndarray) else np.asarray(ids, np.int64)
        self.largest_id = max(self.largest_id, check_ids(tokens, self._tokenizer, where))
        self._write("tokens.bin", tokens.astype(self.dtype, copy=False))
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

    def finish(self, extra: JsonObject | None = None) -> JsonObject:
        """Write meta.json, make the folder visible under its name, return the meta."""
        text = self._kind == "text"
        if self.documents == 0 or self.tokens < 2 or not (text or self.targets):
            what = "no text" if text else "no sequence with an answer to learn"
            raise UserError(f"{self.out}: the data set would be empty ({what} in the input); nothing was written")
        for name in ("documents.bin", "sequences.bin"):
            if name in self._files:
                self._offset(name)
        with self._disk():
            (self._partial / self._tokenizer.file_name).write_bytes(self._tokenizer.model_bytes)
            # Files before the sums of their blocks, the last of which is written when the file is closed.
            ordered = sorted(self._files, key=lambda name: name in SUMS.values())
            files = {name: self._files[name].close() for name in ordered}
            about = {"bytes": len(self._tokenizer.model_bytes), "sha256": self._tokenizer.sha256}
            files[self._tokenizer.file_name] = about
            meta = {
                "format": FORMAT,
                "version": VERSION,
                "meta_sha256": unsealed(),
                "kind": self._kind,
                "vocab_size": self._tokenizer.vocab_size,
                "dtype": self.dtype.name,
                "tokens": self.tokens,
                "documents": self.documents,
                **({} if text else {"sequences": self.sequences, "targets": self.targets}),
                "largest_id": self.largest_id,
                "tokenizer": {
                    "sha256": self._tokenizer.sha256,
                    "control": self._tokenizer.variant,
                    "file": self._tokenizer.file_name,
                    "eos": self._tokenizer.eos_token_id,
                },
                **(extra or {}),
                "files": files,
            }
            with open(self._partial / "meta.json", "w", encoding="utf-8") as file:
                file.write(sealed(json.dumps(meta, ensure_ascii=False, indent=1)))
                file.flush()
                os.fsync(file.fileno())
            publish(self._partial, self.out)
        self._finished = True
        return meta

    def _offset(self, name: str) -> None:
        self._write(name, np.asarray([self.tokens], "<i8"))

    def _write(self, name: str, array: np.ndarray) -> None:
        with self._disk():
            self._files[name].write(np.ascontiguousarray(array).view(np.uint8).data)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror}); nothing was left behind") from None


def check_ids(ids: np.ndarray, tokenizer: Tokenizer, where: str = "") -> int:
    """The largest of ``ids``, -1 without any; UserError for one outside the tokenizer's vocabulary."""
    if not ids.size:
        return -1
    largest = int(ids.max())
    if largest >= tokenizer.vocab_size or int(ids.min()) < 0:
        wrong = int(ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0])
        raise UserError(
            f"{where}{': ' if where else ''}token id {wrong} is outside the vocabulary of {tokenizer.vocab_size} "
            f"({tokenizer.piece(wrong)}); a model of that size cannot embed it"
        )
    return largest


class PackedDataset:
    """A packed folder, opened for reading. ``meta`` is meta.json; tokens are not loaded before they are used.

    ``tokenizer``: the bytes of the tokenizer's file, called
    ``tokenizer_name``. ``notes``: what could not be verified, for a reader.

    UserError when the folder is missing, unfinished, of another format, or when a file is not what was written: the
    files that say where things are and files up to SMALL bytes are hashed here, the rest where it is read. ``fresh``:
    written by this process just now, so that nothing is hashed.
    """

    def __init__(self, path: str | Path, fresh: bool = False):
        self.path = standing(Path(path))
        self.meta = read_meta(self.path)
        self.kind: str = self.meta["kind"]
        self.vocab_size: int = self.meta["vocab_size"]
        for name in self.meta["files"]:
            check_size(self.path, self.meta, name)
        large = [name for name in SUMS if name in self.meta["files"] and self.meta["files"][name]["bytes"] > SMALL]
        for name in () if fresh else self.meta["files"].keys() - set(large):
            check_hash(self.path, self.meta, name)
        self.tokenizer_name = tokenizer_name(self.meta)
        self.tokenizer = (self.path / self.tokenizer_name).read_bytes()
        self.tokens = self._map("tokens.bin", np.dtype(self.meta["dtype"]).newbyteorder("<"))
        self.documents = self._map("documents.bin", np.dtype("<i8"))
        rows = self.kind != "text"
        self.mask = self._map("mask.bin", np.dtype(np.uint8)) if rows else None
        self.sequences = self._map("sequences.bin", np.dtype("<i8")) if rows else None
        for name, offsets in (("documents.bin", self.documents), ("sequences.bin", self.sequences)):
            if offsets is not None:
                check_offsets(self.path / name, offsets, len(self.tokens), name.removesuffix("s.bin"))
        sealed_meta = self.meta["version"] > 1
        self._blocks = {
            name: Blocks(self.path / name, self.path / SUMS[name]) for name in large if sealed_meta and not fresh
        }
        self.notes = [] if sealed_meta else [_unverified(self.path, self.meta, large)]

    def digest(self) -> str:
        """Identifies the contents: a hash of the recorded hashes, to which the files are held when they are read."""
        files = self.meta["files"].items()
        facts = {name: f.get("sha256") for name, f in sorted(files) if name not in SUMS.values()}
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def check_counts(self) -> None:
        """Read everything and hold it against the counts of meta.json, for folders in which not all has a hash."""
        step, largest, targets = 1 << 22, -1, 0
        for begin in range(0, len(self.tokens), step):
            largest = max(largest, int(self._taken(begin, min(begin + step, len(self.tokens))).max()))
            if self.mask is not None:
                part = self.mask[begin : begin + step]
                if part.max() > 1:
                    raise UserError(
                        f"{self.path / 'mask.bin'}: altered, holds {int(part.max())}; make the folder again"
                    )
                targets += int(part.sum())
        if self.mask is not None and self.sequences is not None:
            targets -= int(self.mask[self.sequences[:-1]].sum())  # position 0 is predicted by nothing
        found = {"largest_id": largest, **({"targets": targets} if self.mask is not None else {})}
        for name, value in found.items():
            if self.meta.get(name) != value:
                raise UserError(
                    f"{self.path}: altered, the files hold {name} {value}, meta.json {self.meta.get(name)}; "
                    "make the folder again"
                )

    def check_seq_len(self, seq_len: int) -> None:
        """UserError when samples of ``seq_len`` would cut stored sequences."""
        stored = self.meta.get("max_length", 0)
        if self.kind != "text" and seq_len < stored:
            raise UserError(
                f"data.seq_len: {seq_len} would cut the sequences of {self.path}, packed for {stored}; "
                f"use data.seq_len={stored} or pack again with --seq-len {seq_len}"
            )

    def check_isolation(self, isolate: bool) -> None:
        """UserError where the documents of a sequence must not see each other and would (a teacher's propositions)."""
        if self.meta.get("isolated") and not isolate:
            raise UserError(
                f"data.isolate_documents: must be true, because {self.path} holds propositions that are packed to be "
                "isolated from each other"
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
        taken = self._taken(begin, end)
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

    def _taken(self, begin: int, end: int) -> np.ndarray:
        """Tokens ``begin`` to ``end`` as int32, in which nothing was altered that would break far away."""
        for name, blocks in self._blocks.items():
            item = self.tokens.itemsize if name == "tokens.bin" else 1
            blocks.check(begin * item, end * item)
        taken = self.tokens[begin:end].astype(np.int32)
        bad = (taken < 0) | (taken >= self.vocab_size)
        if bad.any():
            place = int(np.argmax(bad))
            raise UserError(
                f"{self.path / 'tokens.bin'}: altered, token id {taken[place]} at place {begin + place} is outside the "
                f"vocabulary of {self.vocab_size}; make the folder again"
            )
        return taken

    def _starts(self, begin: int, end: int) -> np.ndarray:
        """Document starts strictly inside (begin, end)."""
        low, high = np.searchsorted(self.documents, [begin + 1, end])
        return np.asarray(self.documents[low:high])

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        return np.memmap(self.path / name, dtype=dtype, mode="r")


def verify(path: str | Path, on_bytes: OnBytes | None = None) -> None:
    """Hash every file of a packed folder, in full; UserError names each that is not what was written.

    ``on_bytes`` receives the number of bytes of every block, ``bytes_to_verify`` of them in all.
    """
    folder = standing(Path(path))
    meta = read_meta(folder)
    wrong = []
    for name in meta["files"]:
        try:
            check_size(folder, meta, name)
            check_hash(folder, meta, name, on_bytes)
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("; ".join(wrong))
    data = PackedDataset(folder)
    if data.notes:
        data.check_counts()


def bytes_to_verify(path: str | Path) -> int:
    """How many bytes ``verify`` reads."""
    return sum(facts["bytes"] for facts in read_meta(standing(Path(path)))["files"].values())


def is_packed(path: str | Path) -> bool:
    """Whether a folder is a finished packed folder (of any version)."""
    try:
        return load_json(Path(path) / "meta.json", "a packed folder's meta").get("format") == FORMAT
    except UserError:
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


def _unverified(path: Path, meta: JsonObject, large: list[str]) -> str:
    """The note about a folder of version 1."""
    missing = [name for name, facts in meta["files"].items() if "sha256" not in facts]
    what = "its meta.json has no hash"
    if missing:
        what += f", nor have {', '.join(missing)}"
    elif large:
        what += f", and {', '.join(large)} can only be verified as a whole (tele data --verify)"
    return f"{path}: packed by an earlier version: {what}; pack again to have all of it verified"
