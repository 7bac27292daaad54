"""Names for types that no library gives a name to."""

from __future__ import annotations

from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object or YAML mapping as parsed, its values not yet checked. A single unchecked value is an ``object``."""
