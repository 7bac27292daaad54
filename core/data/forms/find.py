"""Search for input files: files, folders and patterns; what a folder holds besides is listed with the reason."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from telechat_twins.core.data.forms.arrow_rows import dataset_files
from telechat_twins.core.data.forms.formats import (
    DATASET,
    SUFFIXES,
    TOKENS,
    dataset_split,
    form_of,
    is_dataset,
    known_form,
    why_unread,
)
from telechat_twins.core.data.packed import is_packed
from telechat_twins.core.errors import UserError
from telechat_twins.core.near import near_path

_WORD = re.compile(r"[a-z]+")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_NAMED = 10  # skipped files that are named for one reason; the rest are counted


def find_inputs(paths: Sequence[str | Path], rows: bool = False) -> list[Path]:
    """Files, folders (searched through, by suffix) and globs -> sorted inputs without repetition.

    An input is a file, a folder of ``save_to_disk``, or the .idx file of Megatron's pair. The order is that of
    ``paths``, and by name inside a folder or glob. ``rows``: folders are searched for files of rows alone, so that the
    README beside them is none. ``skipped_inputs`` lists what a folder holds besides. UserError when one of ``paths``
    yields nothing, names a file that is not read, or cannot be searched, and for a folder of several splits.
    """
    found: dict[str, Path] = {}  # by the whole path, so that no file is read twice under two spellings
    for given in paths:
        path = Path(given)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = [dataset_split(path)] if is_dataset(path) else _inside(path, rows)[0]
            _check_splits(path, files)
        elif path.with_name(path.name + ".idx").is_file():
            files = [path.with_name(path.name + ".idx")]
        else:
            matched = [Path(name) for name in sorted(glob.glob(str(given), recursive=True))]
            files = [dataset_split(p) if p.is_dir() else p for p in matched if p.is_file() or is_dataset(p)]
        if not files:
            kinds = " ".join(SUFFIXES)
            what = "no such file, and no folder or pattern with files in it"
            raise UserError(f"{given}: {what} (folders: {kinds}){near_path(given) if not path.exists() else ''}")
        for file in files:
            if reason := why_unread(file):
                raise UserError(f"{file}: {reason}")
        for file in map(_index_of, files):
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def skipped_inputs(paths: Sequence[str | Path], rows: bool = False) -> list[str]:
    """A line for each folder of ``paths`` with files that ``find_inputs`` does not take: which, and why not."""
    notes = []
    for path in map(Path, paths):
        if not path.is_dir() or is_dataset(path):
            continue
        taken, others, hidden = _inside(path, rows)
        reasons: dict[str, list[str]] = {}
        for file, reason in others.items():
            reasons.setdefault(reason, []).append(str(file.relative_to(path)))
        parts = []
        for reason, names in reasons.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"{', '.join(names[:_NAMED])}{more} ({reason})")
        parts += [f"{hidden} hidden"] * bool(hidden)
        if parts:
            notes.append(f"skipped in {path}: {'; '.join(parts)}; read: {len(taken)}")
    return notes


def total_bytes(inputs: Sequence[Path]) -> int:
    """Bytes on the disk of all that is read."""
    return sum(file.stat().st_size for file in _files_read(inputs) if file.is_file())


class Unchanged:
    """What files were when they were first looked at; ``check`` before what was made of them is published."""

    def __init__(self, inputs: Sequence[Path]) -> None:
        self._before = {file: _state(file) for file in _files_read(inputs)}

    def check(self) -> None:
        """UserError for a file that was written or replaced since: part of it may have been read, and part not. One
        that was removed while it was open has been read whole."""
        for file, before in self._before.items():
            if _state(file) not in (before, None):
                raise UserError(
                    f"{file}: changed while it was read, so part of it may be missing; pack again once it is complete"
                )


def _files_read(inputs: Sequence[Path]) -> list[Path]:
    """The files that are read for inputs."""
    files: list[Path] = []
    for path in inputs:
        form = form_of(path).name
        if form == DATASET:
            files += dataset_files(path)
        elif form == TOKENS:
            files.append(path.with_suffix(".bin"))
        else:
            files.append(path)
    return files


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _index_of(path: Path) -> Path:
    """The .idx file for either of Megatron's pair; any other file itself."""
    return path.with_suffix(".idx") if path.is_file() and form_of(path).name == TOKENS else path


def _inside(folder: Path, rows: bool) -> tuple[list[Path], dict[Path, str], int]:
    """(inputs of known forms, what else there is with the reason, number of hidden files) anywhere under a folder.

    Not searched: links to folders and packed folders, which are among the second, and hidden folders, whose names begin
    with a dot and which count as one file.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be searched ({error.strerror})") from None

    taken: list[Path] = []
    others: dict[Path, str] = {}
    hidden = 0
    for root, folders, names in os.walk(folder, onerror=refuse):
        here = Path(root)
        if "meta.json" in names and is_packed(here):
            others[here] = "a packed folder"
            folders.clear()
            continue
        if is_dataset(here):
            taken.append(dataset_split(here))
            folders.clear()
            continue
        hidden += sum(name.startswith(".") for name in folders + names)
        folders[:] = [name for name in folders if not name.startswith(".")]
        others |= {link: "a link to a folder" for link in (here / name for name in folders) if link.is_symlink()}
        for file in (here / name for name in names if not name.startswith(".")):
            if reason := _why_not(file, rows):
                others[file] = reason
            elif file.suffix.lower() != ".bin":  # whose .idx is the input
                taken.append(file)
    return sorted(taken), dict(sorted(others.items())), hidden


def _check_splits(folder: Path, files: Sequence[Path]) -> None:
    """UserError where files of rows under a folder are, by their names, several splits of a data set: the test set of a
    repository would be trained on. The words are those by which Hugging Face datasets tells splits."""
    found: dict[str, Path] = {}
    for file in files:
        if form_of(file).holds_rows:
            parts = reversed(file.relative_to(folder).parts)  # the file's own name first
            words = (word for part in parts for word in _WORD.findall(part.lower()))
            if split := next((_SPLITS[word] for word in words if word in _SPLITS), None):
                found.setdefault(split, file.relative_to(folder))
    if len(found) > 1:
        named = ", ".join(f"{file} ({split})" for split, file in sorted(found.items()))
        first = "train" if "train" in found else min(found)
        raise UserError(
            f"{folder}: holds several splits by the names of files: {named}; name the files of one, e.g. "
            f"'{folder}/**/*{first}*', or all that are meant, e.g. '{folder}/**/*.*'"
        )


def _why_not(file: Path, rows: bool) -> str:
    if not file.is_file():
        return "not a file"
    if file.suffix.lower() == ".idx" and not file.with_suffix(".bin").is_file():
        return "without its .bin file"
    if form := known_form(file):
        return "no rows" if rows and not form.holds_rows else ""
    return why_unread(file) or ("a suffix that is not known" if file.suffix else "no suffix")
