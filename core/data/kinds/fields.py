"""Values of rows, checked one by one; every UserError names the row and the key."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection

from telechat_twins.core.data.kinds.harmless import harmless as is_harmless
from telechat_twins.core.data.kinds.table import is_empty
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import parse_value
from telechat_twins.core.shown import printable, shown
from telechat_twins.core.types import JsonObject

_TYPE = "\ud800type"  # an unpaired surrogate, which no row that was read holds


def typed(value: object) -> JsonObject:
    """What stands, in the JSON by which rows of tables travel, for a date or bytes; only a reader of it minds."""
    return {_TYPE: type(value).__name__}


def found_type(value: object) -> str:
    """A value's type for a message, with the reason where a table made it one."""
    name = type(value).__name__ if value is not None else "nothing"
    if isinstance(value, dict) and _TYPE in value:
        name = str(value[_TYPE])
    return f"{name} (a column of dates; store it as text)" if name in ("datetime", "date", "Timestamp") else name


def text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: '{name}' must be text, found {found_type(value)}")
    return value


def listed(value: object, name: str, where: str) -> list[object]:
    if not isinstance(value, list):
        raise UserError(f"{where}: '{name}' must be a list, found {found_type(value)}")
    return value


def json_value(value: object, name: str, where: str) -> None:
    """UserError for what JSON cannot say, anywhere in ``value``: tables have dates, bytes, NaN and decimals."""
    if isinstance(value, dict) and _TYPE not in value:
        for key, member in value.items():
            json_value(member, f"{name}.{key}", where)
    elif isinstance(value, list):
        for n, member in enumerate(value):
            json_value(member, f"{name}[{n}]", where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: '{printable(name, 80)}' is {value}, which is no number in JSON")
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise UserError(f"{where}: '{printable(name, 80)}' is of type {found_type(value)}, which JSON cannot say")


def json_list(value: object, name: str, where: str) -> list[object]:
    """A list, or a text that holds one as JSON (as in the released tool files, and in cells of tables)."""
    if isinstance(value, str) and value.strip():
        value = _parsed(value, name, where)
    return listed(value, name, where)


_SPOKEN = (("role", "content"), ("from", "value"))  # keys of a message
_KEY = re.compile(r"""["'](role|from|content|value)["']\s*:""")
_WRITTEN = re.compile(r"""\s*\[?\s*\{\s*["'](?:role|from|content|value)["']\s*:\s*["']""")


def written_messages(said: str) -> bool:
    """Whether a text is a message or a list of them as JSON, or Python, or numpy, writes it."""
    if not _WRITTEN.match(said) or said.rstrip()[-1:] not in ("}", "]"):
        return False
    keys = set(_KEY.findall(said))
    return any(keys.issuperset(pair) for pair in _SPOKEN)


def json_or_text(value: object, name: str, where: str, spellings: Collection[tuple[str, str]] = _SPOKEN) -> object:
    """The messages whose JSON a text is (as in cells of tables), or OpenAI's object of messages; else the value itself.
    ``spellings``: the keys of a message, for who speaks and what is said.

    UserError for messages as Python writes them, which would be learnt in their brackets and quotes.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        parsed = parse_value(value.encode())
    except ValueError as error:
        if not written_messages(value):
            return value
        reason = getattr(error, "msg", str(error))
        raise UserError(
            f"{where}: '{name}' is the text of messages, but as Python writes them or cut off, and not JSON "
            f"({reason}); store messages, or their JSON text"
        ) from None
    if isinstance(parsed, dict) and isinstance(parsed.get("messages"), list):
        return parsed
    members = parsed if isinstance(parsed, list) else [parsed]
    return parsed if any(_is_message(one, spellings) for one in members) else value


def _is_message(value: object, spellings: Collection[tuple[str, str]]) -> bool:
    return isinstance(value, dict) and any(isinstance(value.get(who), str) and said in value for who, said in spellings)


def _parsed(value: str, name: str, where: str) -> object:
    try:
        return parse_value(value.encode())
    except ValueError as error:
        reason = getattr(error, "msg", str(error))
        raise UserError(f"{where}: '{name}' is text but not a JSON list ({reason})") from None


def flag(row: JsonObject, name: str, default: bool, where: str) -> bool:
    """True or false, also as the text of a table's cell; ``default`` where it is absent."""
    value = row.get(name)
    if is_empty(value):
        return default
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise UserError(f"{where}: '{name}' must be true or false, found {shown(value)}")
    return value


def refuse_unread(
    value: JsonObject,
    known: Collection[str],
    name: str,
    where: str,
    ignore: Collection[str] = (),
    harmless: Collection[str] = (),
    left_out: set[str] | None = None,
) -> None:
    """UserError for a key of ``value`` (called ``name``) that is none of ``known`` nor ``harmless``, by which something
    that the row says would be lost. Keys with empty values say nothing; ``left_out`` receives the harmless ones."""
    unread = []
    for key, given in value.items():
        if key in known or is_empty(given) or key in ignore:
            continue
        if not is_harmless(key, given, harmless):
            unread.append(printable(key, 80))
        elif left_out is not None:
            left_out.add(key)
    if unread:
        raise _unread(unread, name, where)


def _unread(keys: list[str], name: str, where: str) -> UserError:
    """The error for keys that are not read; all of them, so that one go leaves them out."""
    places = ", ".join(f"'{f'{name}.' * bool(name)}{key}'" for key in keys)
    several = len(keys) > 1
    what = "keys" if several else "key"
    verb, content, them = ("are", "their", "them") if several else ("is", "its", "it")
    options = " ".join(f"--ignore-key {shlex.quote(key)}" for key in keys)
    return UserError(
        f"{where}: {what} {places} {verb} not read, so {content} content would be lost; remove {them}, or leave {them} "
        f"out with {options}"
    )


def refuse_ignored(value: JsonObject, parts: Collection[str], name: str, where: str, ignore: Collection[str]) -> None:
    """UserError where ``ignore`` names a key of ``value`` that is one of ``parts``, of which the row consists."""
    for key in ignore and value:
        if key in ignore and key in parts and not is_empty(value[key]):
            raise UserError(
                f"{where}: --ignore-key {key} would leave out '{f'{name}.' * bool(name)}{key}', which is part of "
                "the dialogue; remove it from the rows, or leave the option out"
            )
