"""File type detection by the first bytes, for the error message on a file whose name is wrong."""

from __future__ import annotations

import json
from pathlib import Path

_MAGIC = (
    (b"PK\x03\x04", "a zip archive, which is what torch.save writes (pickled weights, which can run code)"),
    (b"\x80", "a pickle (pickled weights, which can run code)"),
    (b"\x93NUMPY", "an array of numpy's (.npy)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"GGUF", "a GGUF file, as llama.cpp reads it"),
    (b"version https://git-lfs", "a pointer of Git LFS; the file itself was not downloaded (git lfs pull)"),
    (b"\x7fELF", "a program"),
)
UNKNOWN = "of no kind known here"
_MARKUP = (b"<!doctype", b"<html", b"<?xml")


def kind_of(path: Path) -> str:
    """A noun phrase for ``path``, e.g. "a zip archive, ..."; UNKNOWN if nothing fits."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file"
    for magic, kind in _MAGIC:
        if start.startswith(magic):
            return kind
    if start[257:262] == b"ustar":
        return "a tar archive"
    if 2 <= int.from_bytes(start[:8], "little") <= size - 8 and start[8:9] == b"{":
        return "a safetensors file; name it .safetensors"
    if start.lstrip().lower().startswith(_MARKUP):
        return "a web page; was the download refused?"
    if not start.strip(b"\0"):
        return "nothing but zeros at its beginning; was it written completely?"
    try:
        text = start.decode("utf-8", "ignore" if len(start) == 512 else "strict")
    except UnicodeDecodeError:
        return UNKNOWN
    if all(character.isprintable() or character in "\t\r\n" for character in text):
        return f"text ({json.dumps(text[:24], ensure_ascii=True)}...)"
    return UNKNOWN
