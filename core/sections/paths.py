"""Paths of a run's file: relative ones count from its folder, "~" is the user's home, and an address is no folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_VARIABLE = re.compile(r"\$(\{|[A-Za-z_])")


def anchor_paths(tree: JsonObject, folder: Path, normalise: bool = False) -> None:
    """Make paths of sources, of a task's folders and train.init absolute, from ``folder``; ``normalise`` when that may
    not exist."""
    for holder, key, _ in _paths(tree):
        if holder[key] and not holder[key].startswith("~") and not _ADDRESS.match(holder[key]):
            holder[key] = _joined(folder, holder[key], normalise)


def check_paths(tree: JsonObject) -> None:
    """Replace "~"; UserError, naming the key, for a path that is empty, an address, or has a variable to fill in."""
    for holder, key, where in _paths(tree):
        path = holder[key]
        if not path:
            raise UserError(f"{where}: empty; name a folder")
        if _ADDRESS.match(path):
            raise UserError(f"{where}: {path} is an address; copy what it names to this machine and give that folder")
        if path.startswith("~"):
            path = os.path.expanduser(path)
        if _VARIABLE.search(path) and not os.path.lexists(path):
            raise UserError(f"{where}: {path} is not there, and variables are not filled in; write the path itself")
        holder[key] = path


def _paths(tree: JsonObject) -> Iterator[tuple[Any, str | int, str]]:
    """(mapping or list, its key, dotted name) of every path that is text."""
    train = tree.get("train")
    if isinstance(train, dict) and isinstance(train.get("init"), str):
        yield train, "init", "train.init"
    given = tree.get("eval")
    if isinstance(given, dict):
        if isinstance(given.get("task_data"), str):
            yield given, "task_data", "eval.task_data"
        include = given.get("task_include")
        for n, folder in enumerate(include if isinstance(include, list) else ()):
            if isinstance(folder, str):
                yield include, n, f"eval.task_include[{n}]"
    stages = train.get("stages") if isinstance(train, dict) else None
    holders = [(tree.get("data"), "data"), (tree.get("eval"), "eval")]
    holders += [(stage, f"train.stages[{n}]") for n, stage in enumerate(stages if isinstance(stages, list) else ())]
    for holder, name in holders:
        sources = holder.get("sources") if isinstance(holder, dict) else None
        for n, source in enumerate(sources if isinstance(sources, list) else ()):
            if isinstance(source, dict) and isinstance(source.get("path"), str):
                yield source, "path", f"{name}.sources[{n}].path"


def _joined(folder: Path, path: str, normalise: bool) -> str:
    """``folder``/``path``; a "../" that begins ``path`` is taken off the resolved ``folder``: no detours shown."""
    while path.startswith("../"):
        folder, path = folder.parent, path[3:].lstrip("/")
    return os.path.normpath(folder / path) if normalise else str(folder / path)
