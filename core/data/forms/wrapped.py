"""Files that are one object whose list of objects holds the rows, as dumps of services and SQuAD are: {"data": [...]}.

Such an object must be told from a row that is alone in its file, which may hold a list of objects, too (messages,
tools, choices). It is one where it is no row of core.data.kinds.table, exactly one of its keys holds such a list, and
all others say nothing that a model is to learn.
"""

from __future__ import annotations

import codecs
import io
from pathlib import Path

from telechat_twins.core.data.forms.formats import JSON, form_of
from telechat_twins.core.data.forms.json_items import Splitter
from telechat_twins.core.data.forms.streams import UTF8, open_stream
from telechat_twins.core.data.kinds.harmless import HARMLESS_OF_FILE
from telechat_twins.core.data.kinds.table import KINDS, SPEAKERS, is_empty
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_LINE, parse_value
from telechat_twins.core.shown import printable, shown
from telechat_twins.core.types import JsonObject

_BEGIN = 64  # bytes that show whether a file begins with an object
_ANY = ("data", "items")  # keys under which a row has its turns, and a file as often its rows


def rows_under(path: Path, encoding: str = UTF8) -> str | None:
    """The key under which a .json file has its rows; None where it is a list, rows one after another, or one row.

    At most MAX_LINE bytes are looked at. UserError where several keys hold lists of objects, one of which must be
    chosen.
    """
    if not begins_object(path, encoding):
        return None
    with open_stream(path, None, encoding) as file:
        head = file.read(MAX_LINE)
        whole = not file.read(1)
    members, lists = _members(head.removeprefix(codecs.BOM_UTF8), path, whole)
    if not lists or _is_row(members, lists):
        return None
    beside = [key for key in members if key not in lists and key not in HARMLESS_OF_FILE]
    if beside and not whole and [*members][-1] in lists:  # a list that is longer than a row may be
        under = shown(lists[-1])
        raise UserError(f"{path}: {shown(beside[0])} beside the rows under {under}; write the rows alone, as a list")
    if beside:
        return None
    if len(lists) > 1:
        names = " and ".join(f"'{printable(key, 80)}'" for key in lists)
        raise UserError(f"{path}: lists of objects under {names}; write the one that holds the rows alone, as a list")
    return lists[0]


def begins_object(path: Path, encoding: str = UTF8) -> bool:
    """Whether a file is a .json file that begins with an object, and not with a list."""
    if form_of(path).name != JSON:
        return False
    with open_stream(path, None, encoding) as file:
        return file.read(_BEGIN).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")


def under_notes(files: list[Path], encoding: str = UTF8) -> list[str]:
    """For every file that has its rows under a key, what says so."""
    keys = ((file, rows_under(file, encoding)) for file in files)
    return [f"{file}: the rows are those under its key '{printable(key, 80)}'" for file, key in keys if key]


def _members(head: bytes, path: Path, whole: bool) -> tuple[JsonObject, list[str]]:
    """(members with a value of the object that ``head`` begins with, those of them that are lists of objects, of which
    the first object alone is taken). Nothing where more follows the object, or where it is no JSON."""
    splitter = Splitter(io.BytesIO(head), path, len(head))
    members: JsonObject = {}
    lists: list[str] = []
    try:
        splitter.next_byte()
        for key in splitter.members():
            if key in members:
                return {}, []
            members[key] = None
            if _at_objects(splitter):
                members[key] = [parse_value(_taken(splitter, b",]"), MAX_LINE)]
                lists.append(key)
                splitter.drop(splitter.size(b"]", 1) + 1)
            else:
                members[key] = parse_value(_taken(splitter, b",}"), MAX_LINE)
        if splitter.next_byte():
            return {}, []
    except UserError:  # the object goes on behind ``head``; or it is damaged, which its reader will say
        if whole:
            return {}, []
        if members and members[key] is None:  # cut off, but with a value
            members[key] = True
    except ValueError:
        return {}, []
    return {key: value for key, value in members.items() if not is_empty(value)}, lists


def _at_objects(splitter: Splitter) -> bool:
    """Whether a list of objects begins here; if so, the splitter then stands at its first one."""
    if splitter.next_byte() != b"[":
        return False
    begin = splitter.begin
    splitter.drop(1)
    if splitter.next_byte() == b"{":
        return True
    splitter.drop(begin - splitter.begin)
    return False


def _taken(splitter: Splitter, closing: bytes) -> bytes:
    size = splitter.size(closing, 1)
    data = splitter.held[splitter.begin : splitter.begin + size]
    splitter.drop(size)
    return data.strip()


def _is_row(members: JsonObject, lists: list[str]) -> bool:
    """Whether the object is a row itself, by the keys that are not lists of what may be rows."""
    keys = {key for key in members if key not in lists or _holds_parts(key, members[key][0])}
    return any(kind.marked_by(keys) for kind in KINDS.values())


def _holds_parts(key: str, first: JsonObject) -> bool:
    """Whether a list that begins with ``first`` is a row's turns, tools or choices, by what is usual under its key."""
    if any(name in first for name in SPEAKERS):
        return True
    held = any(isinstance(value, list) and value and isinstance(value[0], dict) for value in first.values())
    return key not in _ANY and not held
