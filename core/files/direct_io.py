"""Direct I/O for large new files: bypasses the kernel's page cache and computes the SHA-256 while writing.

A checkpoint is written once and read much later. Through the page cache each byte is copied once more, evicts pages of
other programs, and is read again for the hash. Here pieces are collected in a few aligned buffers; each full buffer
is hashed and written by other threads while the next one is filled. On a file system without direct I/O the same writes
go through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import queue
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

BUFFER_BYTES = 8 << 20
BUFFERS = 4  # of all files together: two files fill one each while two buffers are being written
BLOCK = 4096  # alignment in bytes of positions, lengths and addresses
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # of file systems that write through the cache only


class Spool:
    """Buffers and threads shared by the files of one writer. Use as a context manager around the files.

    Fewer than BUFFERS files may be open at once, or each may hold one buffer and wait for another.
    """

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8))
        self._hashing = ThreadPoolExecutor(1, "hash")  # one thread, since a file's buffers are hashed in order
        self._writing = ThreadPoolExecutor(2, "write")

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._hashing.shutdown()
        self._writing.shutdown()

    def take(self) -> np.ndarray:
        """A buffer; waits until one is free."""
        return self._free.get()

    def send(self, file: DirectFile, buffer: np.ndarray, count: int, place: int) -> Future[None]:
        """Hash and write the first ``count`` bytes of ``buffer`` in the background, then free it."""
        return self._writing.submit(self._store, file, buffer, count, place, self._hash(file, buffer[:count]))

    def _hash(self, file: DirectFile, data: np.ndarray) -> Future[None]:
        return self._hashing.submit(file.digest.update, data.data)

    def _store(self, file: DirectFile, buffer: np.ndarray, count: int, place: int, hashed: Future[None]) -> None:
        try:
            # The last buffer is padded to whole blocks; ``finish`` truncates the file.
            file.store(buffer[: -(-count // BLOCK) * BLOCK].data, place)
        finally:
            hashed.result()
            self._free.put(buffer)


class DirectFile:
    """A new file at ``path`` for appending. ``finish`` or ``abandon`` must end it."""

    def __init__(self, path: Path, spool: Spool) -> None:
        self.path, self.digest, self.size = path, hashlib.sha256(), 0
        self._spool, self._sent = spool, list[Future[None]]()
        self._buffer: np.ndarray | None = None
        self._filled = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._direct = getattr(os, "O_DIRECT", 0)
        try:
            self._handle = os.open(path, flags | self._direct, 0o666)
        except OSError as error:
            if not self._direct or error.errno not in _REFUSED:
                raise
            self._direct = 0
            self._handle = os.open(path, flags, 0o666)

    def write(self, data: np.ndarray) -> None:
        """Append bytes (uint8, [n]). Raises the OSError of an earlier background write, e.g. when the disk is full."""
        while data.size:
            if self._buffer is None:
                self._buffer, self._filled = self._spool.take(), 0
            count = min(data.size, BUFFER_BYTES - self._filled)
            np.copyto(self._buffer[self._filled : self._filled + count], data[:count])
            self._filled, self.size, data = self._filled + count, self.size + count, data[count:]
            if self._filled == BUFFER_BYTES:
                self._send()

    def finish(self) -> str:
        """Write the rest and sync the file. Returns its SHA-256 in hexadecimal."""
        try:
            self._send()
            for part in self._sent:
                part.result()
            os.ftruncate(self._handle, self.size)
            os.fsync(self._handle)
        finally:
            self.abandon()
        return self.digest.hexdigest()

    def abandon(self) -> None:
        """Close the file without completing it."""
        with suppress(OSError):
            self._send()  # frees its buffer for other files
        for part in self._sent:
            part.exception()  # waits
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def store(self, data: memoryview, place: int) -> None:
        """Write whole blocks at byte position ``place``; called from the writing threads."""
        while data:
            try:
                count = os.pwrite(self._handle, data, place)
            except OSError as error:
                if not self._direct or error.errno not in _REFUSED:
                    raise
                # Some file systems accept O_DIRECT in open but not in write: continue through the cache.
                self._direct = 0
                fcntl.fcntl(self._handle, fcntl.F_SETFL, fcntl.fcntl(self._handle, fcntl.F_GETFL) & ~os.O_DIRECT)
                continue
            data, place = data[count:], place + count

    def _send(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._sent.append(self._spool.send(self, buffer, self._filled, self.size - self._filled))
        waiting = []
        for part in self._sent:
            if part.done():
                part.result()
            else:
                waiting.append(part)
        self._sent = waiting
