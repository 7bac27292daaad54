"""Rows whose kind was found and whose keys were all judged."""

from __future__ import annotations

from telechat_twins.core.data.kinds.fields import refuse_ignored, refuse_unread
from telechat_twins.core.data.kinds.messages import Reading
from telechat_twins.core.data.kinds.table import HARMLESS, Slots, kind_of
from telechat_twins.core.types import JsonObject


def read_slots(row: JsonObject, where: str, use: str, reading: Reading) -> Slots:
    """A row's slots; its kind is counted. UserError for a row that is not for ``use``, and for a key of it that is
    neither read, nor empty, nor ignored, nor known as harmless."""
    kind = kind_of(row, where, use, reading.ignore, reading.kind)
    slots = Slots(kind, row, where, reading.ignore)
    refuse_ignored(row, slots.parts(reading.ignore), "", where, reading.ignore)
    refuse_unread(row, kind.keys, "", where, reading.ignore, HARMLESS, reading.left_out)
    reading.kinds[kind.name] = reading.kinds.get(kind.name, 0) + 1
    return slots
