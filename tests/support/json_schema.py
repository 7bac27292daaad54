"""The part of JSON Schema that docs/parity-report.md uses, as a function from schema and value to complaints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}
WORDS = {
    "$ref", "$defs", "$schema", "title", "description", "type", "const", "enum", "anyOf", "pattern", "required",
    "properties", "additionalProperties", "items", "minItems",
}  # fmt: skip


def complaints(schema: dict[str, Any], value: Any, root: dict[str, Any] | None = None, at: str = "$") -> Iterator[str]:
    """What of ``value`` breaks ``schema``. AssertionError for a keyword that this validator does not know."""
    root = schema if root is None else root
    assert schema.keys() <= WORDS, schema.keys() - WORDS
    if "$ref" in schema:
        yield from complaints(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root, at)
    if "type" in schema and (
        not isinstance(value, TYPES[schema["type"]]) or isinstance(value, bool) != (schema["type"] == "boolean")
    ):
        yield f"{at}: must be {schema['type']}, found {value!r:.80}"
        return
    if "const" in schema and value != schema["const"] or "enum" in schema and value not in schema["enum"]:
        yield f"{at}: must be one of {schema.get('enum', [schema.get('const')])}, found {value!r:.80}"
    if "anyOf" in schema and all(any(complaints(one, value, root, at)) for one in schema["anyOf"]):
        yield f"{at}: fits none of the alternatives, found {value!r:.80}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{at}: must match {schema['pattern']}, found {value!r:.80}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        yield from (f"{at}: lacks {name}" for name in schema.get("required", ()) if name not in value)
        for name, inner in value.items():
            rule = known.get(name, schema.get("additionalProperties", {}))
            if rule is False:
                yield f"{at}: unknown key {name}"
            else:
                yield from complaints(rule, inner, root, f"{at}.{name}")
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{at}: too short"
        for index, inner in enumerate(value):
            yield from complaints(schema.get("items", {}), inner, root, f"{at}[{index}]")
