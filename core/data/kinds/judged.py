"""Rows whose kind was found and whose keys were all judged."""

from __future__ import annotations

from collections.abc import Sequence

from telechat_twins.core.data.kinds.fields import refuse_ignored, refuse_unread
from telechat_twins.core.data.kinds.harmless import HARMLESS, HARMLESS_OF_SAMPLES
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.table import (
    DIALOGUE,
    KINDS,
    PREFERENCE,
    TEACHER,
    Kind,
    Slots,
    is_empty,
    kinds_of,
    several_kinds,
)
from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import printable
from telechat_twins.core.types import JsonObject

# Keys that may repeat what a message of the row says, as in tables that hold a question and the dialogue of it.
_REPEATED = frozenset(
    key for kind in KINDS.values() if kind.use != TEACHER for keys in kind.slots.values() for key in keys
)
_ANSWERS = frozenset(key for kind in KINDS.values() if kind.use == DIALOGUE for key in kind.slots.get("answer", ()))


def read_slots(row: JsonObject, where: str, use: str, reading: Reading) -> Slots:
    """A row's slots; its kind is counted. UserError for a row that is not for ``use`` or can be of several kinds, and
    for a key of it that is neither read, nor empty, nor ignored, nor known as harmless."""
    kinds = kinds_of(row, where, use, reading.ignore, reading.kind, reading.columns.parts)
    if len(kinds) > 1:
        raise several_kinds(row, where, kinds)
    return slots_of(kinds[0], row, where, reading)


def slots_of(kind: Kind, row: JsonObject, where: str, reading: Reading, repeated: bool = False) -> Slots:
    """The slots of a row of a known kind; ``repeated``: texts that ``refuse_untold`` judges later are let pass."""
    slots = Slots(kind, row, where, reading.ignore)
    harmless = HARMLESS if kind.use == TEACHER else HARMLESS_OF_SAMPLES
    known = kind.keys.union(_repeating(slots, reading)) if repeated else kind.keys
    refuse_ignored(row, slots.parts(reading.ignore), "", where, reading.ignore)
    unread = [key for key in row if key not in known and key not in reading.ignore and not is_empty(row[key])]
    _refuse_answer(slots, unread)
    refuse_unread(row, known, "", where, reading.ignore, harmless, reading.left_out)
    reading.kinds[kind.name] = reading.kinds.get(kind.name, 0) + 1
    for name, key in reading.columns.parts:
        if key in row:
            reading.columns_met.add(name)
    return slots


def _refuse_answer(slots: Slots, unread: Sequence[str]) -> None:
    """UserError for an ``unread`` key that holds an answer: the worse one of a row that is read as a dialogue, or the
    better one of a pair under a dialogue's name for it."""
    kind, pair = slots.kind, KINDS["preference"]
    for key in unread:
        what = f"{slots.where}: '{printable(key, 80)}'"
        if kind.use == DIALOGUE and key in pair.slots["rejected"] and pair.marked_by(slots.row):
            raise UserError(
                f"{what} holds a rejected answer; pack such rows as pairs with --preference, or the dialogues alone "
                f"with --ignore-key {key}"
            )
        if kind.use == PREFERENCE and "chosen" in kind.slots and "chosen" not in slots and key in _ANSWERS:
            raise UserError(
                f"{what} is not read, and the row has no chosen answer; if it is that answer, say so with "
                f"--column chosen={key}"
            )


def refuse_untold(slots: Slots, texts: Sequence[object], reading: Reading) -> None:
    """UserError for a text of the row beside its messages that none of their ``texts`` is; one that is is left out."""
    repeating = _repeating(slots, reading)
    if not repeating:
        return
    said = {content.strip() for content in texts if isinstance(content, str)}
    told = {key for key in repeating if slots.row[key].strip() in said}
    untold = {key: slots.row[key] for key in repeating if key not in told}
    _refuse_answer(slots, [*untold])
    refuse_unread(untold, (), "", slots.where, reading.ignore)
    reading.left_out |= told


def _repeating(slots: Slots, reading: Reading) -> list[str]:
    return [
        key
        for key, value in slots.row.items()
        if key in _REPEATED
        and key not in slots.kind.keys
        and key not in reading.ignore
        and isinstance(value, str)
        and not is_empty(value)
    ]
