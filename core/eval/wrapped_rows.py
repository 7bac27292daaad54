"""Rows that a .json file has under a key, such as ``{"version": "1.1", "data": [...]}``, as SQuAD, BIG-bench Hard and
many Chinese data sets publish them."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from pathlib import Path

from telechat_twins.core.data.forms.formats import JSON, form_of
from telechat_twins.core.data.forms.json_items import TooLong, json_items
from telechat_twins.core.data.forms.json_rows import row_place
from telechat_twins.core.data.forms.streams import open_stream
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_JSON, MIB, parse_value
from telechat_twins.core.types import JsonObject

_HEAD = 4096  # bytes of a file that show whether it begins an object


def wrapped_rows(path: Path, fields: Collection[str] = ()) -> tuple[str, list[tuple[str, JsonObject]]] | None:
    """(key, rows with their places) of a .json file that is one object, one key of which holds a list of objects.

    None for all other files, and for an object that has all of ``fields``: it is a row itself. UserError for an object
    with several such keys, and for one that has nothing but other lists and objects.
    """
    found = _only_object(path)
    if found is None or (fields and set(fields) <= found[1].keys()):
        return None
    where, row = found
    keys = [key for key, value in row.items() if value and isinstance(value, list) and _all_objects(value)]
    if len(keys) == 1:
        items = row[keys[0]]
        return keys[0], [(f"{where}: {keys[0]}, item {number}", item) for number, item in enumerate(items, 1)]
    if keys:
        raise UserError(
            f"{where}: is one object with rows under {len(keys)} keys ({', '.join(keys)[:120]}); write each to a "
            "file of its own, named after its split"
        )
    if row and all(isinstance(value, list | dict) for value in row.values()):
        raise UserError(
            f"{where}: is one object, and none of its keys ({', '.join(row)[:120]}) holds a list of objects; write "
            "a list of objects, one for each row"
        )
    return None


def _only_object(path: Path) -> tuple[str, JsonObject] | None:
    """Place and value of the object that a .json file is, if it is one and no more. Whatever is wrong with the file is
    for those who read its rows to say."""
    if form_of(path).name != JSON:
        return None
    with open_stream(path) as file:
        if not file.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            return None
    with open_stream(path) as file:
        try:
            found = list(islice(json_items(file, path, MAX_JSON), 2))
        except TooLong:
            raise UserError(
                f"{path}: is or begins with one object of more than {MAX_JSON // MIB} MiB; write its rows to a .jsonl "
                "file, one a line"
            ) from None
        except UserError:
            return None
    if len(found) != 1:
        return None
    try:
        value = parse_value(found[0].data)
    except ValueError:
        return None
    return row_place(path, found[0].line, 0), value


def _all_objects(values: list[object]) -> bool:
    return all(isinstance(value, dict) for value in values)
