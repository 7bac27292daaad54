"""Megatron's token files: ``NAME.idx`` beside ``NAME.bin``, as its preprocessing and MindFormers write them.

NAME.idx   "MMIDIDX\\0\\0"; uint64 version 1; uint8 type of an id; uint64 sequences; uint64 documents + 1;
           int32 [sequences] lengths; int64 [sequences] byte offsets in NAME.bin; int64 [documents + 1] first
           sequence of each document
NAME.bin   the ids, one sequence after another
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from telechat_twins.core.data.forms.streams import require_fetched
from telechat_twins.core.errors import UserError

_MAGIC, _OLD = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_PART = 1 << 20  # ids that are read at a time


class TokenFile:
    """One pair of files, mapped into memory; UserError for a pair that is damaged or of another version.

    ``path``: either of the two. ``documents``: how many there are. ``size``: bytes of the ids. ``note``: what is to be
    said of them, if anything.
    """

    def __init__(self, path: Path):
        self.index, self.data = path.with_suffix(".idx"), path.with_suffix(".bin")
        for file in (self.index, self.data):
            if not file.is_file():
                raise UserError(f"{file}: no such file; Megatron's token files are a pair of .idx and .bin")
            require_fetched(file)
        head = self._head()
        if head.startswith(_OLD):
            raise UserError(f"{self.index}: of fairseq's older layout (TNTIDX); preprocess again for mmap (MMIDIDX)")
        if not head.startswith(_MAGIC) or len(head) < len(_MAGIC) + _HEADER.size:
            raise UserError(f"{self.index}: not the index of Megatron's token files")
        version, code, sequences, bounds = _HEADER.unpack_from(head, len(_MAGIC))
        if version != 1 or code not in _TYPES:
            raise UserError(
                f"{self.index}: version {version} with ids of type {code}; version 1 with whole numbers is read"
            )
        self.dtype = np.dtype(_TYPES[code]).newbyteorder("<")
        self._read_index(sequences, bounds)
        self.size = self.data.stat().st_size

    def __iter__(self) -> Iterator[Iterator[np.ndarray]]:
        """For each document the arrays of ids that make it up, each int64 [at most 2**20]."""
        for begin, end in zip(self._bounds[:-1], self._bounds[1:], strict=True):
            yield self._parts(int(begin), int(end))

    def _parts(self, begin: int, end: int) -> Iterator[np.ndarray]:
        for sequence in range(begin, end):
            length, offset = int(self._lengths[sequence]), int(self._offsets[sequence])
            ids = np.memmap(self.data, self.dtype, "r", offset, (length,)) if length else np.empty(0, self.dtype)
            for first in range(0, length, _PART):
                yield ids[first : first + _PART].astype(np.int64)

    def _head(self) -> bytes:
        with self.index.open("rb") as file:
            return file.read(len(_MAGIC) + _HEADER.size)

    def _read_index(self, sequences: int, bounds: int) -> None:
        offset = len(_MAGIC) + _HEADER.size
        size, wanted = self.index.stat().st_size, offset + 12 * sequences + 8 * bounds
        # Multimodal indexes go on with one byte a sequence, which says nothing about ids of texts.
        if size not in (wanted, wanted + sequences) or bounds < 1:
            raise UserError(f"{self.index}: damaged, {size} bytes for {sequences} sequences (expected {wanted})")
        raw = np.memmap(self.index, np.uint8, "r")
        self._lengths = raw[offset : (offset := offset + 4 * sequences)].view("<i4")
        self._offsets = raw[offset : (offset := offset + 8 * sequences)].view("<i8")
        self._bounds = raw[offset : offset + 8 * bounds].view("<i8")
        self.documents = bounds - 1
        held = self.data.stat().st_size
        ends = self._offsets + self._lengths.astype(np.int64) * self.dtype.itemsize
        ordered = bool(np.all(self._bounds[1:] >= self._bounds[:-1]))
        whole = sequences == 0 or (self._offsets.min() >= 0 and self._lengths.min() >= 0 and int(ends.max()) <= held)
        whole = whole and not (self._offsets % self.dtype.itemsize).any()  # ids do not begin inside of others
        if not whole or not ordered or int(self._bounds[0]) != 0 or int(self._bounds[-1]) != sequences:
            raise UserError(f"{self.index}: damaged, or not the index of {self.data.name} ({held} bytes)")
        named = int(self._lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        # An index of part of the sequences, or of some of them twice, may be meant; so may one of an earlier file.
        self.note = f"{self.index}: names {named} of the {held} bytes of {self.data.name}" if named != held else None
