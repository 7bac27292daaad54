"""Writing large new files past the kernel's file cache, with their SHA-256 taken on the way.

A checkpoint is written once and read much later. Through the cache every byte costs a copy and a page to be found for
it, pages that somebody else was using, and a second reading for the hash. Here pieces are gathered in a few aligned
buffers, and each full one is hashed and handed to the disk by other threads while the next one fills. A file system
that cannot do this gets the same writes through its cache.
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
BUFFERS = 4  # of all files together: one fills for each of two files while two are on their way
BLOCK = 4096  # what places, lengths and addresses must be multiples of
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # of file systems that write through the cache only


class Spool:
    """Buffers and threads that the files of one writer share. Use as a context manager, outside of its files.

    Fewer than BUFFERS files may fill at once, or all of them would wait for a buffer.
    """

    def __init__(self) -> None:
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8))
        self._hashing = ThreadPoolExecutor(1, "hash")  # one: a file's buffers in their order
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
        """Hash and store the first ``count`` bytes of ``buffer``, and free it."""
        return self._writing.submit(self._store, file, buffer, count, place, self._hash(file, buffer[:count]))

    def _hash(self, file: DirectFile, data: np.ndarray) -> Future[None]:
        return self._hashing.submit(file.digest.update, data.data)

    def _store(self, file: DirectFile, buffer: np.ndarray, count: int, place: int, hashed: Future[None]) -> None:
        try:
            # The last one is padded; what is too much is cut off again.
            file.store(buffer[: -(-count // BLOCK) * BLOCK].data, place)
        finally:
            hashed.result()
            self._free.put(buffer)


class DirectFile:
    """A new file at ``path`` that bytes are appended to. ``finish`` or ``abandon`` ends it."""

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
        """Append bytes (uint8, [n]). OSError of a write before, as when the disk is full."""
        while data.size:
            if self._buffer is None:
                self._buffer, self._filled = self._spool.take(), 0
            count = min(data.size, BUFFER_BYTES - self._filled)
            np.copyto(self._buffer[self._filled : self._filled + count], data[:count])
            self._filled, self.size, data = self._filled + count, self.size + count, data[count:]
            if self._filled == BUFFER_BYTES:
                self._send()

    def finish(self) -> str:
        """Everything on disk; the file's SHA-256 in hexadecimal."""
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
        """Leave the file as it is."""
        with suppress(OSError):
            self._send()  # its buffer is of use to others
        for part in self._sent:
            part.exception()  # waits
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def store(self, data: memoryview, place: int) -> None:
        """Write whole blocks at ``place``; from any thread."""
        while data:
            try:
                count = os.pwrite(self._handle, data, place)
            except OSError as error:
                if not self._direct or error.errno not in _REFUSED:
                    raise
                # Opened so, yet not written so; what comes after goes through the cache.
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
