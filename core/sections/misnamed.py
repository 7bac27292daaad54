"""Keys of a run in the wrong section, or under another trainer's name: the message names the right one."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping

from telechat_twins.core.errors import UserError
from telechat_twins.core.near import nearest, run_key
from telechat_twins.core.shown import shown


def check_names(run: type, tree: Mapping[str, object]) -> None:
    """UserError for a key of ``tree`` that ``run`` (a dataclass whose sections are dataclasses) has elsewhere.

    Only keys that are unknown where they stand, and whose place is clear: the same name in one other section, or a name
    that other trainers use. The rest is left to ``core.schema.from_mapping``, which is called next. Keys of the model
    are not looked at: its presets have their own reader.
    """
    legal = section_keys(run)
    if tree and not set(tree) & set(legal[""]) and set(tree) <= {*legal["model"], "preset"}:
        raise UserError("config: has a model's keys and none of a run; name this file as `model:` in a run's config")
    for where, values in [("", tree), *((name, tree.get(name)) for name in legal if name not in ("", "model"))]:
        for key in values if isinstance(values, Mapping) else ():
            if not isinstance(key, str) or key in legal[where]:
                continue
            if where and key in legal:
                raise UserError(f"{where}: unknown key {shown(key)}; it is a section of its own, beside '{where}'")
            section, _, name = key.partition(".")
            if name in legal.get(section, ()):
                raise UserError(
                    f"{where or 'config'}: unknown key {shown(key)}; write '{name}' in the section '{section}'"
                )
            right = _place(key, where, legal)
            if right is not None:
                raise UserError(f"{where or 'config'}: unknown key {shown(key)}; did you mean '{right}'?")


def section_keys(run: type) -> dict[str, list[str]]:
    """Section -> its keys, "" for the sections themselves; a section's optional None counts as not there."""
    hints = typing.get_type_hints(run)
    found = {"": [field.name for field in dataclasses.fields(run)]}
    for name in found[""]:
        kinds = [hints[name], *typing.get_args(hints[name])]
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                found[name] = [field.name.removesuffix("_") for field in dataclasses.fields(kind)]
    return found


def _place(key: str, where: str, legal: Mapping[str, list[str]]) -> str | None:
    """The dotted key that is meant, without its section if that is ``where``; None if unclear."""
    named = run_key(key) or run_key(f"{where}_{key}")
    places = [f"{section}.{key}" for section, keys in legal.items() if section and key in keys]
    if named is None and len(places) == 1 and nearest(key, legal[where], cutoff=0.8) is None:
        named = places[0]
    if named is None:
        return None
    named = named.partition("=")[0]
    return named.removeprefix(f"{where}.") if where else named
