"""Typed access to the fields of a JSON object. A field of the wrong type or out of range is refused by name, and
so is an unknown one. null is the same as absent, as in the OpenAI interface."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn, TypeVar

from telechat_twins.core.serve.errors import ApiError, shown, shown_name
from telechat_twins.core.types import JsonObject

Unchecked = object  # a JSON value as it came; the class below has a method of that name
Kind = TypeVar("Kind")
Number = TypeVar("Number", int, float)
MAX_HINT_CHARACTERS = 40  # characters of a field's name that is compared with those that there are


class Fields:
    """``where``: the object's own place, for messages. Each reader returns None for an absent field without a
    default."""

    def __init__(self, found: JsonObject, where: str = "") -> None:
        self._found, self._where = found, where
        self._known: set[str] = set()

    def name(self, field: str) -> str:
        return f"{self._where}.{field}" if self._where else field

    def any(self, field: str) -> Unchecked:
        """The value as it is."""
        self._known.add(field)
        return self._found.get(field)

    def refuse(self, field: str, says: str, code: str | None = None) -> NoReturn:
        raise ApiError(400, f"{self.name(field)}: {says}", self.name(field), code)

    def _typed(self, field: str, kind: type[Kind], what: str) -> Kind | None:
        value = self.any(field)
        if value is None:
            return None
        # True is an int to Python, and not to JSON.
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
        """Refuse fields that would ask for something else than what is done; their ``harmless`` values pass."""
        for field in fields:
            value = self.any(field)
            if value is not None and value != (harmless or {}).get(field):
                self.refuse(field, why, "unsupported_parameter")

    def done(self) -> None:
        """Refuse every field that was not read."""
        for field, value in self._found.items():
            if field not in self._known and value is not None:
                # Comparing takes time in the product of the lengths.
                near = difflib.get_close_matches(field, self._known, n=1) if len(field) <= MAX_HINT_CHARACTERS else []
                hint = f", did you mean '{near[0]}'?" if near else ""
                name = self.name(shown_name(field))
                raise ApiError(400, f"Unknown parameter: '{name}'{hint}", name, "unknown_parameter")
