"""Typed access to the fields of a JSON object. Fields that are unknown, of the wrong type or out of range are refused
by name. null is the same as absent, as in the OpenAI API."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn, TypeVar

from telechat_twins.core.serve.elsewhere.fields import FIELDS, asks_nothing
from telechat_twins.core.serve.errors import ApiError, shown, shown_name
from telechat_twins.core.types import JsonObject

Unchecked = object  # a JSON value as received; inside the class below ``object`` is a method
Kind = TypeVar("Kind")
Number = TypeVar("Number", int, float)
MAX_HINT_CHARACTERS = 40  # of an unknown field's name; longer ones get no suggestion


class Fields:
    """Readers of an object's fields. ``where``: the object's path in the body, for messages. A reader returns None for
    an absent field."""

    def __init__(self, found: JsonObject, where: str = "") -> None:
        self._found, self._where = found, where
        self._known: set[str] = set()

    def name(self, field: str) -> str:
        return f"{self._where}.{field}" if self._where else field

    def any(self, field: str) -> Unchecked:
        """The value, unchecked."""
        self._known.add(field)
        return self._found.get(field)

    def refuse(self, field: str, message: str, code: str | None = None) -> NoReturn:
        raise ApiError(400, f"{self.name(field)}: {message}", self.name(field), code)

    def _typed(self, field: str, kind: type[Kind], what: str) -> Kind | None:
        value = self.any(field)
        if value is None:
            return None
        # In Python True is an int, in JSON it is not.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.refuse(field, f"expected {what}, found {shown(value)}", "invalid_type")
        return value

    def text(self, field: str) -> str | None:
        return self._typed(field, str, "a string")

    def boolean(self, field: str) -> bool:
        return bool(self._typed(field, bool, "true or false"))

    def object(self, field: str) -> JsonObject | None:
        return self._typed(field, dict, "an object")

    def list(self, field: str) -> list[Unchecked] | None:
        return self._typed(field, list, "a list")

    def integer(self, field: str, low: int, high: int | None) -> int | None:
        value = self._typed(field, int, "a whole number")
        return None if value is None else self._within(field, value, low, high)

    def number(self, field: str, low: float, high: float) -> float | None:
        value = self.any(field)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self.refuse(field, f"expected a number, found {shown(value)}", "invalid_type")
        return float(self._within(field, value, low, high))

    def _within(self, field: str, value: Number, low: float, high: float | None) -> Number:
        if not (low <= value and (high is None or value <= high)):
            wanted = f"at least {low}" if high is None else f"{low} to {high}"
            self.refuse(field, f"must be {wanted}, found {shown(value)}", "invalid_value")
        return value

    def absent(self, fields: Iterable[str], why: str, harmless: JsonObject | None = None) -> None:
        """Refuse fields that this server does not support, unless they have their ``harmless`` value, which asks for
        nothing."""
        for field in fields:
            value = self.any(field)
            if value is not None and value != (harmless or {}).get(field):
                self.refuse(field, why, "unsupported_parameter")

    def done(self) -> None:
        """Refuse every field that was not read, but for those of other servers that ask for nothing here."""
        here = not self._where  # other servers' fields are those of the body itself
        for field, value in self._found.items():
            if field not in self._known and value is not None and not (here and asks_nothing(field, value)):
                name = self.name(shown_name(field))
                if here and field in FIELDS:
                    raise ApiError(400, f"{name}: {FIELDS[field].advice}", name, "unsupported_parameter")
                # A comparison takes time in proportion to the product of both lengths.
                near = difflib.get_close_matches(field, self._known, n=1) if len(field) <= MAX_HINT_CHARACTERS else []
                hint = f", did you mean '{near[0]}'?" if near else ""
                raise ApiError(400, f"Unknown parameter: '{name}'{hint}", name, "unknown_parameter")
