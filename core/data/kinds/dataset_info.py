"""LLaMA-Factory's ``dataset_info.json``: what the columns and speakers of a data set's files are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from telechat_twins.core.data.kinds.columns import Columns
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import load_json
from telechat_twins.core.shown import printable, shown
from telechat_twins.core.types import JsonObject

# Their names -> ours. Of the others in use each says something that would be lost.
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_SHAREGPT = {"messages": "conversations"}
_BOTH = {"system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected"}
_TAGS = {"role_tag": "role", "content_tag": "content"}
_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
_READ = ("file_name", "formatting", "ranking", "columns", "tags", "split")


def dataset_columns(path: str | Path, files: Sequence[Path]) -> tuple[Columns, bool]:
    """(the columns that the entries of ``files`` name, whether they are pairs). UserError where the file has no entry
    for one of them, where two differ, and for what an entry says and rows here cannot."""
    entries = load_json(Path(path), "LLaMA-Factory's description of data sets")
    found: dict[tuple[Columns, bool], str] = {}
    for file in files:
        name, entry = _entry_of(file, entries, Path(path))
        found.setdefault(_read(entry, f"{path}: {name}"), name)
    if len(found) > 1:
        raise UserError(f"{path}: {' and '.join(found.values())} name their columns differently; pack them separately")
    return next(iter(found), (Columns(), False))


def _entry_of(file: Path, entries: JsonObject, path: Path) -> tuple[str, JsonObject]:
    named = {
        printable(name, 80): entry
        for name, entry in entries.items()
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)
    }
    fits = [name for name, entry in named.items() if _names(str(entry["file_name"]), file)]
    if len(fits) != 1:
        what = f"{' and '.join(fits)} both name" if fits else "no entry has a file_name of"
        raise UserError(f"{path}: {what} {file}; entries with a file_name: {', '.join(named) or 'none'}")
    return fits[0], named[fits[0]]


def _names(given: str, file: Path) -> bool:
    """Whether an entry's file_name, a file or a folder beside the description, is ``file``."""
    parts = Path(given).parts
    return bool(parts) and any(
        whole[-len(parts) :] == parts for whole in (file.absolute().parts, file.absolute().parent.parts)
    )


def _read(entry: JsonObject, where: str) -> tuple[Columns, bool]:
    if strange := [key for key in entry if key not in _READ]:
        raise UserError(f"{where}: '{printable(strange[0], 80)}' is not read; read are {', '.join(_READ)}")
    form = entry.get("formatting", "alpaca")
    if form not in ("alpaca", "sharegpt"):
        raise UserError(f"{where}: 'formatting' must be alpaca or sharegpt, found {shown(form)}")
    pairs = entry.get("ranking", False)
    if not isinstance(pairs, bool):
        raise UserError(f"{where}: 'ranking' must be true or false, found {shown(pairs)}")
    if entry.get("split", "train") != "train":
        raise UserError(f"{where}: 'split' is {shown(entry['split'])}; a file has no splits, give the split's own file")
    names = {**(_ALPACA if form == "alpaca" else _SHAREGPT), **_BOTH}
    columns = _translated(entry, "columns", names, where)
    tags = _translated(entry, "tags", {**_TAGS, **_ROLES}, where)
    if twice := next((key for n, (_, key) in enumerate(columns) if key in [own for _, own in columns[:n]]), None):
        raise UserError(f"{where}: 'columns' gives {shown(twice)} to two parts; each key of a row fills one")
    parts = [(name, key) for name, key in columns if name != key]
    parts += [(name, key) for name, key in tags if name in _TAGS.values() and key not in ("from", "value", name)]
    roles = [(key, name) for name, key in tags if name in _ROLES.values()]
    return Columns(tuple(parts), tuple(roles)), pairs


def _translated(entry: JsonObject, part: str, names: dict[str, str], where: str) -> list[tuple[str, str]]:
    given = entry.get(part, {})
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given.values()):
        raise UserError(f"{where}: '{part}' must be an object of names, found {shown(given)}")
    if strange := [name for name in given if name not in names]:
        raise UserError(
            f"{where}: '{part}.{printable(strange[0], 80)}' has no place in rows that are read; legal: "
            f"{', '.join(names)}"
        )
    return [(names[name], str(key)) for name, key in given.items()]
