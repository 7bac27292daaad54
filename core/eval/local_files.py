"""Which files of a folder hold which split of a data set, and their rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from telechat_twins.core.data.forms.formats import COMPRESSIONS, STATE, is_dataset, known_form
from telechat_twins.core.data.forms.wrapped import begins_object
from telechat_twins.core.data.rows import read_rows, under_notes
from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import printable
from telechat_twins.core.types import JsonObject

Placed = tuple[str, JsonObject]  # file and line of a row, and the row

SPLITS = ("train", "validation", "val", "dev", "test")  # folders of archives such as ceval-exam.zip, a file a subject
# Names that Hugging Face datasets takes for the same split, in its order.
ALIKE = {
    "train": ("training",),
    "validation": ("valid", "val", "dev"),
    "test": ("testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
_FACTS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # of datasets, beside the splits


def find_splits(folder: Path, path: str, name: str | None) -> dict[str, list[Path]]:
    """The inputs of each split of the data set ``path`` with the configuration ``name``, in order.

    Below ``folder``: ``path/name/<split>.jsonl`` and other forms; folders of ``save_to_disk``; a copy of the hub's
    repository, whose splits may be in shards, below ``data`` or below the only configuration; and an unpacked archive
    with ``path/<split>/<name>.csv``. UserError where there is none, and for a split that two files claim.
    """
    top = folder / path
    place = top / name if name else top
    for here in (place, place / "data"):
        if found := _splits_in(here):
            return found
    if name:
        found = {split: files for split in SPLITS if (files := _of_subject(top / split, name, split))}
    else:
        inner = [found for one in _folders(top) if (found := _splits_in(one))]
        found = inner[0] if len(inner) == 1 else {}
    if found:
        return found
    if (place / STATE).is_file():
        raise UserError(f"{place}: is one saved data set, without the name of its split; move it to {place}/<split>")
    there = ", ".join(sorted(one.name for one in place.iterdir())[:5]) if place.is_dir() else ""
    raise UserError(
        f"{place}: has no split{f' (it has {there})' if there else ''}; put <split>.jsonl there, with the fields of "
        f"the data set '{path}'"
    )


def read_records(path: Path, note: Callable[[str], object] = lambda _: None) -> list[Placed]:
    """The rows of an input with their places, as `tele data` reads them. UserError names file and line of what is not a
    row. ``note`` is told where a .json file has its rows under a key, and where it might but is read as one row."""
    try:
        for line in under_notes([path]):
            note(line)
        rows = list(read_rows(path))
    except UserError as error:
        said, advised, _ = str(error).partition("; name the file's encoding")  # which no option here can
        raise UserError(f"{said}; convert it to UTF-8" if advised else error) from None
    if not rows:
        raise UserError(f"{path}: has no row")
    if len(rows) == 1 and begins_object(path):
        _judge_only_row(path, *rows[0], note)
    return rows


def _judge_only_row(path: Path, where: str, row: JsonObject, note: Callable[[str], object]) -> None:
    """Say of a file that is one row if it looks like many: UserError where it has nothing but lists and objects."""
    names = ", ".join(printable(key, 80) for key in row)[:120]
    if row and all(isinstance(value, list | dict) for value in row.values()):
        raise UserError(
            f"{where}: is one object, and none of its keys ({names}) holds the rows, a list of objects; write a list "
            "of objects, one for each row"
        )
    lists = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists:
        note(
            f"{path}: is read as one row ({names}); if '{printable(lists[0], 80)}' holds the rows, write that list "
            "alone"
        )


def _folders(place: Path) -> list[Path]:
    found = sorted(place.iterdir()) if place.is_dir() else []
    return [one for one in found if one.is_dir() and not one.name.startswith(".")]


def _splits_in(place: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for split, file in _named(place):
        found.setdefault(split, []).append(file)
    for split, files in found.items():
        _check_shards(split, files)
    return found


def _named(place: Path) -> Iterator[tuple[str, Path]]:
    """(split, input) of what a folder holds, in the order of names."""
    for one in sorted(place.iterdir()) if place.is_dir() else []:
        if one.name.startswith(".") or one.name in _FACTS:
            continue
        if one.is_dir():
            if is_dataset(one) and (one / STATE).is_file():
                yield one.name, one
        elif (form := known_form(one)) is not None and form.holds_rows and one.name != STATE:
            stem = _stem(one)
            shard = _SHARD.fullmatch(stem)
            yield (shard[1] if shard else stem), one


def _stem(file: Path) -> str:
    """A file's name without the suffixes of its form and its compression."""
    return Path(file.stem).stem if file.suffix.lower() in COMPRESSIONS else file.stem


def _check_shards(split: str, files: list[Path]) -> None:
    """UserError where several files are not all the shards of one split."""
    shards = [_SHARD.fullmatch(_stem(file)) for file in files]
    if len(files) == 1 and shards[0] is None:
        return
    whole = int(shards[0][3]) if shards[0] else 0
    if [int(shard[2]) if shard else -1 for shard in shards] != list(range(whole)):
        names = ", ".join(file.name for file in files[:4])
        what = "is claimed by several files" if None in shards else "is not there with all its shards"
        raise UserError(f"{files[0].parent}: the split '{split}' {what} ({names}); leave one whole copy of it")


def _of_subject(place: Path, name: str, split: str) -> list[Path]:
    """The file of one subject in a split's folder, as C-Eval (``accountant_val.csv``) and CMMLU name them."""
    return [file for stem, file in _named(place) if stem in (name, f"{name}_{split}")][:1]
