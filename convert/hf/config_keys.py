"""Keys of a foreign config: the names one field of ModelConfig goes by, and how their values are read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject

REQUIRED = object()
Value = TypeVar("Value")


@dataclass(frozen=True)
class Key:
    """A field of ModelConfig, the names it goes by (the first is written), its type, and its default.

    The default is a number, or the name of an earlier field, or required. One that is taken is reported as a note,
    unless it is ``quiet`` (what a trained model computes does not depend on it). A key without names is never stored.
    """

    field: str
    names: tuple[str, ...]
    kind: type[int] | type[float]
    default: object = REQUIRED
    quiet: bool = False


@dataclass(frozen=True)
class Switch:
    """A field of ModelConfig that a release stores as a choice: its names, released value -> our value, its default.

    The first released value that stands for ours is written. A ``quiet`` default is taken without a note.
    """

    field: str
    names: tuple[str, ...]
    values: tuple[tuple[object, object], ...]
    default: object = REQUIRED
    quiet: bool = False


def take(released: JsonObject, key: Key, where: str) -> int | float | None:
    """The value of a key under any of its names, None if absent or null; UserError if two names contradict."""
    given = {
        name: number(released[name], key.kind, name, where) for name in key.names if released.get(name) is not None
    }
    # max_position_embeddings may exceed seq_length, which names the trained length; the first name counts.
    return agreed({k: v for k, v in list(given.items())[: 1 if key.field == "max_seqlen" else None]}, where)


def read_keys(released: JsonObject, keys: tuple[Key, ...], where: str) -> tuple[JsonObject, list[str]]:
    """Fields of ModelConfig from the keys, and notes on the defaults that were taken."""
    values: JsonObject = {}
    notes = []
    for key in keys:
        value: object = take(released, key, where)
        if value is None:
            if key.default is REQUIRED:
                raise UserError(f"{where}: {' or '.join(key.names[:2])} is missing; it has no safe default, add it")
            value = values[key.default] if isinstance(key.default, str) else key.default
            if key.names and not key.quiet:
                notes.append(defaulted(key.names[0], value))
        values[key.field] = value
    return values, notes


def choose(released: JsonObject, switch: Switch, where: str) -> tuple[object, list[str]]:
    """Our value for what a release chose, and a note if it is a default."""
    given = {name: released[name] for name in switch.names if released.get(name) is not None}
    found = {}
    for name, value in given.items():
        ours = [mine for theirs, mine in switch.values if type(value) is type(theirs) and value == theirs]
        if not ours:
            legal = ", ".join(repr(theirs) for theirs, _ in switch.values)
            raise UserError(f"{where}: {name} is {value!r}; supported are {legal}")
        found[name] = ours[0]
    if found:
        if len(set(found.values())) > 1:
            raise UserError(f"{where}: {' and '.join(f'{n} {v!r}' for n, v in given.items())} contradict each other")
        return next(iter(found.values())), []
    if switch.default is REQUIRED:
        raise UserError(f"{where}: {switch.names[0]} is missing; it has no safe default, add it")
    mine = next(ours for theirs, ours in switch.values if theirs == switch.default)
    return mine, [] if switch.quiet else [defaulted(switch.names[0], switch.default)]


def chosen(switch: Switch, mine: object) -> object:
    """What the release calls our value."""
    return next(theirs for theirs, ours in switch.values if ours == mine)


def token_ids(released: JsonObject, where: str, pad_default: int) -> tuple[JsonObject, list[str]]:
    """Fields of ModelConfig for bos, eos and pad, and notes on defaults.

    ``eos_token_id`` may be a list: the first is the model's, and all of them end generation. ``pad_token_id`` -1 or
    null means that there is none.
    """
    values: JsonObject = {}
    notes = []
    for name, default in (("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", pad_default)):
        found = released.get(name)
        if name == "pad_token_id" and name in released and (found is None or (type(found) is int and found == -1)):
            values[name] = None
        elif found is None:
            values[name] = default
            notes.append(defaulted(name, default))
        elif name == "eos_token_id":
            ends = end_ids(found, name, where)
            values[name], values["end_token_ids"] = ends[0], ends[1:]
        else:
            values[name] = _token(found, name, where)
    return values, notes


def end_ids(found: object, name: str, where: str) -> tuple[int, ...]:
    """An ``eos_token_id``, which is a token or a list of them, as distinct ids in order."""
    if isinstance(found, list):
        if not found:
            raise UserError(f"{where}: {name} is an empty list; name at least one token")
        return tuple(dict.fromkeys(_token(token, name, where) for token in found))
    return (_token(found, name, where),)


def number(value: object, kind: type[int] | type[float], name: str, where: str) -> int | float:
    """``value`` as a finite number above 0 of type ``kind`` (int or float)."""
    if not (type(value) is int or (kind is float and type(value) is float)):
        raise UserError(f"{where}: {name} should be a {'whole ' * (kind is int)}number, found {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise UserError(f"{where}: {name} is {_short(value)}, which is outside the range of numbers")
    if value <= 0:
        raise UserError(f"{where}: {name} must be above 0, found {_short(value)}")
    return kind(value)


def agreed(given: Mapping[str, Value], where: str) -> Value | None:
    """The one value that all names give, None without any; UserError if they contradict each other."""
    if len(set(given.values())) > 1:
        raise UserError(f"{where}: {' and '.join(f'{n} {v}' for n, v in given.items())} contradict each other")
    return next(iter(given.values()), None)


def defaulted(name: str, value: object) -> str:
    """The note on a default."""
    return f"{name} is missing: {value} is taken, as the released code does"


def _token(value: object, name: str, where: str) -> int:
    if type(value) is not int:
        raise UserError(f"{where}: {name} should be a whole number, found {value!r}")
    if value < 0:
        raise UserError(f"{where}: {name} must be 0 or more, found {_short(value)}")
    return value


def _short(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return str(value)
