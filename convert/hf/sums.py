"""SHA-256 sums of a folder's files in one small file, in the form that ``sha256sum -c`` reads.

A released folder has no hashes of its own. Where this file lies in one, every file that is read must be listed in it
and unaltered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import file_sha256

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\x00-\x1f]+)")


def write_sums(folder: Path) -> None:
    """Write the sums of all files in a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str] | None:
    """File name -> SHA-256 in hexadecimal, or None if the folder has no sums; UserError if they are damaged."""
    path = folder / SUMS
    if not path.is_file():
        return None
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged, not UTF-8 text at byte {error.start}") from None
    sums: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums:
            fault = "names a file twice" if match else "is not a SHA-256 sum, two spaces and a file name"
            raise UserError(f"{path}:{number}: damaged, the line {fault}; restore the file, or remove it")
        sums[match[2]] = match[1]
    if not sums:
        raise UserError(f"{path}: damaged, it is empty; restore the file, or remove it")
    return sums


def sums_bytes(folder: Path) -> int:
    """Bytes that ``check_sums`` reads."""
    sums = read_sums(folder) or {}
    return sum((folder / name).stat().st_size for name in sums if (folder / name).is_file())


def check_sums(
    folder: Path,
    needed: Iterable[Path],
    on_bytes: Callable[[int], object] | None = None,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Hash every listed file; UserError names one that is altered or missing, or a needed one that is not listed.

    ``share`` = (rank, ranks): only this rank's share of the files. Nothing is checked in a folder without sums.
    """
    sums = read_sums(folder)
    if sums is None:
        return
    for path in needed:
        if path.name not in sums:
            raise UserError(f"{path}: {SUMS} does not list it; remove the file, or {SUMS} if it is out of date")
    for name in sorted(sums)[share[0] :: share[1]]:
        path, expected = folder / name, sums[name]
        if not path.is_file():
            raise UserError(f"{path}: missing; {SUMS} lists it with SHA-256 {expected}")
        try:
            found = file_sha256(path, on_bytes)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if found != expected:
            raise UserError(
                f"{path}: altered: SHA-256 should be {expected} by {SUMS}, found {found}; restore this file, or "
                f"remove {SUMS} if it is out of date"
            )
