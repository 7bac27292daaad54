"""Byte streams of input files: decompressed, and recoded to UTF-8 where the file has another encoding."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from telechat_twins.core.data.forms.formats import form_of
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import refuse_stand_in
from telechat_twins.core.types import JsonObject

UTF8 = "utf-8"
OnBytes = Callable[[int], object]

_CHUNK = 1 << 18
_ZSTD_CHUNK = 1 << 10  # compressed bytes at a time, of which at most 32 MiB come out
_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)
# UTF-32's mark begins with UTF-16's.
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

_MAGIC = {  # what other files begin with -> their name and suffix
    b"\x1f\x8b": "gzip (.gz)",
    b"\x28\xb5\x2f\xfd": "Zstandard (.zst)",
    b"\xfd7zXZ\0": "xz (.xz)",
    b"BZh": "bzip2 (.bz2)",
    b"PK\3\4": "an archive (.zip)",
    b"%PDF": "a PDF (.pdf)",
    b"\x89PNG": "a picture (.png)",
    b"\xff\xd8\xff": "a picture (.jpg)",
}
_NEVER_READ = ("a PDF (.pdf)", "a picture (.png)", "a picture (.jpg)")


def missing(library: str, path: Path, error: ImportError) -> UserError:
    """The error for a file whose reader is not installed: it names the extra that brings it."""
    return UserError(
        f"{path}: is read with {library}, which is not installed ({error}); "
        "install it with pip install 'telechat-twins[data]'"
    )


def check_encoding(name: str) -> str:
    """``name`` as Python calls it; UserError for one that Python has not, or that is not of text."""
    try:
        "".encode(name)
        return codecs.lookup(name).name
    except (LookupError, UnicodeError):
        raise UserError(
            f"--encoding: '{name}' is not a text encoding of Python's; examples: utf-8, gb18030, big5, utf-16"
        ) from None


def open_file(path: Path) -> BinaryIO:
    """A file opened for reading bytes; UserError if it cannot be."""
    try:
        file = path.open("rb")
        refuse_stand_in(file.peek(64), path)
        return file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def require_fetched(path: Path) -> None:
    """UserError for a file that cannot be read, or that Git LFS did not fetch, before a library opens it by name."""
    open_file(path).close()


def open_stream(path: Path, on_bytes: OnBytes | None = None, encoding: str = UTF8) -> BinaryIO:
    """The contents of a file as UTF-8 bytes; ``on_bytes`` receives the number of bytes taken from the disk.

    Memory does not grow with the file. UserError, at the first read that meets it, for damaged compressed data, and
    with the line for bytes that ``encoding`` does not have. UTF-8 itself is not checked here.
    """
    file = open_file(path)
    source: IO[bytes] = file
    if on_bytes:
        source = io.BufferedReader(_Counting(file, on_bytes), _CHUNK)  # type: ignore[type-var]
    if lies_so(path, encoding):
        return source  # type: ignore[return-value]
    compression = form_of(path).compression
    chunks = _unpacked(source, compression, path) if compression else _read(source)
    if not _is_utf8(encoding):
        chunks = _recoded(chunks, encoding, path)
    return io.BufferedReader(_Chunks(chunks, file), _CHUNK)  # type: ignore[type-var]


def lies_so(path: Path, encoding: str = UTF8) -> bool:
    """Whether ``open_stream`` has the bytes of the file as they lie on the disk."""
    return _is_utf8(encoding) and not form_of(path).compression


def _is_utf8(encoding: str) -> bool:
    return check_encoding(encoding) in (UTF8, "utf-8-sig")


def marked(head: bytes) -> bool:
    """Whether a file that begins so is, by its mark, of another encoding or no text."""
    return head.startswith((*_BOMS, *_MAGIC))


def not_utf8(head: bytes) -> str:
    """The end of a message about bytes that are not UTF-8: how to name the encoding."""
    if name := next((name for bom, name in _BOMS.items() if head.startswith(bom)), ""):
        return f"not UTF-8 but {name}; add --encoding {name}"
    if kind := next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), ""):
        way = "which is not read" if kind in _NEVER_READ else "so give it the suffix that says so"
        return f"not a text; its first bytes are those of {kind}, {way}"
    return "not UTF-8; name the file's encoding, e.g. --encoding gb18030"


class _Counting(io.RawIOBase):
    """A file that reports what is read of it."""

    def __init__(self, file: BinaryIO, on_bytes: OnBytes):
        self._file, self._on_bytes = file, on_bytes

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        count: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._on_bytes(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Chunks(io.RawIOBase):
    """A file of what an iterator yields."""

    def __init__(self, chunks: Iterator[bytes], file: BinaryIO):
        self._chunks, self._file, self._held = chunks, file, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while not self._held:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._held = memoryview(chunk)
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _read(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _unpacked(file: IO[bytes], suffix: str, path: Path) -> Iterator[bytes]:
    """What a compressed file holds, members and frames that follow one another included."""
    if not os.fstat(file.fileno()).st_size:
        raise _damaged(path, suffix, "it is empty")
    if suffix == ".zst":
        yield from _zstandard(file, path)
        return
    unpacked: gzip.GzipFile | lzma.LZMAFile | bz2.BZ2File
    if suffix == ".gz":
        unpacked = gzip.GzipFile(fileobj=file)
    else:
        unpacked = lzma.LZMAFile(file) if suffix == ".xz" else bz2.BZ2File(file)  # noqa: SIM115 (closed with file)
    while True:
        try:
            chunk = unpacked.read(_CHUNK)
        except _DAMAGED as error:
            raise _damaged(path, suffix, error) from None
        if not chunk:
            return
        yield chunk


def _zstandard(file: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise missing("zstandard", path, error) from None
    frame = None
    while data := file.read(_ZSTD_CHUNK):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                chunk = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise _damaged(path, ".zst", error) from None
            if chunk:
                yield chunk
            # The library's stream reader would end in silence where a frame is cut off.
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise _damaged(path, ".zst", "it ends inside a frame")


def _damaged(path: Path, suffix: str, error: object) -> UserError:
    return UserError(f"{path}: damaged or cut off, not a whole {suffix} file ({error}); copy or make it again")


def _recoded(chunks: Iterator[bytes], encoding: str, path: Path) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    line, ended = 1, False
    while not ended:
        chunk = next(chunks, b"")
        ended = not chunk
        try:
            text = decoder.decode(chunk, ended)
            data = text.encode(UTF8)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].decode(encoding, "replace").count("\n")
            raise UserError(
                f"{path}:{line}: not {encoding} ({error.reason}); name the file's own encoding with --encoding"
            ) from None
        except UnicodeError as error:
            raise UserError(f"{path}:{line}: not {encoding} ({error}); name another encoding with --encoding") from None
        line += text.count("\n")
        if data:
            yield data


def damage_of(error: Exception) -> str:
    """The first line of a library's message."""
    return str(error).partition("\n")[0]


RowAt = tuple[str, JsonObject]
"""A row and where it stands, as messages name it: "file:line", or "file: row n" in a table."""
