"""The harness's index of tasks: unknown names and the nearest known ones, tags, and members of groups.

The harness lists tasks (a name of its own), groups (a score over members) and tags (names for several tasks at once,
without a score of their own).
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.presets import PRESETS, TaskPlan
from telechat_twins.core.near import nearest
from telechat_twins.core.shown import message_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

OWN_TASKS = Path(__file__).with_name("task_files")


def open_tasks(plans: Sequence[TaskPlan], include: Sequence[Path]) -> TaskManager:
    """The harness's index of tasks. UserError names an unknown task and the nearest known one.

    The harness's own 14,000 take seconds to index, and are left out where ours and ``include`` have all that is named.
    """
    from lm_eval.tasks import TaskManager

    for folder in include:
        if not folder.is_dir():
            found = f"is a file; give {folder.parent}, which holds it" if folder.is_file() else "no such folder"
            raise UserError(f"--include {folder}: {found}")
    paths = [OWN_TASKS, *include]
    with _doubles() as doubles:
        manager = TaskManager(include_path=paths, include_defaults=False)
    names = [plan.name for plan in plans]
    if not all(_named(name, manager.task_index) for name in names) or any(_missing(names, manager.task_index)):
        manager = TaskManager(include_path=paths)
    known = [*manager.all_tasks, *PRESETS]
    for name in names:
        if not _named(name, manager.task_index):
            raise UserError(_unknown(name, known, include))
    for group, member in _missing(names, manager.task_index):
        near = nearest(member, known)
        hint = f"did you mean '{near}'?" if near else "correct the group, or give the folder that has it by --include"
        raise UserError(f"--tasks: the group '{group}' names an unknown task '{member}'; {hint}")
    for text in doubles:
        if any(f"'{name}'" in text for name in names):
            print(f"note: {message_line(text)}", file=sys.stderr)
    return manager


@contextlib.contextmanager
def _doubles() -> Iterator[list[str]]:
    """What the harness warns of as it reads ours and --include: names that two files give, of which it takes one."""
    logger = logging.getLogger("lm_eval.tasks._index")
    found: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, before = Kept(logging.WARNING), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def spelt_out(plans: Sequence[TaskPlan], manager: TaskManager) -> list[TaskPlan]:
    """The plans with each tag and each pattern (``mmlu_*``) replaced by what it stands for, each task once."""
    found: dict[str, TaskPlan] = {}
    for plan in plans:
        for name in _named(plan.name, manager.task_index):
            entry = manager.task_index[name]
            for one in sorted(entry.tags) if entry.kind.name == "TAG" else [name]:
                found.setdefault(one, replace(plan, name=one))
    return list(found.values())


def _named(name: str, index: Mapping[str, Any]) -> list[str]:
    """What of the index a name or a pattern stands for."""
    if name in index or not set("*?[") & set(name):
        return [name] if name in index else []
    return sorted(one for one in index if fnmatch.fnmatchcase(one, name) and index[one].kind.name != "TAG")


def _unknown(name: str, known: Sequence[str], include: Sequence[Path]) -> str:
    """What is said of a name that the index lacks."""
    if (file := _unread(name, include)) is not None:
        return f"{file}: names the task '{name}', but is not read: correct its YAML or include"
    if name.endswith((".yaml", ".yml")):
        return f"--tasks: '{name}' is a file; give its folder, --include {Path(name).parent}, and the task's name in it"
    if Path(name).is_dir():
        return f"--tasks: '{name}' is a folder; give it as --include {name}, and the tasks' names in it"
    near = nearest(name, known)
    return f"--tasks: unknown task '{name}'; " + (
        f"did you mean '{near}'?" if near else "`lm-eval ls tasks` lists the harness's"
    )


def _missing(names: Iterable[str], index: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(group, member) of the groups among ``names`` where ``index`` lacks the member."""
    for name in names:
        entry = index.get(name)
        if entry is not None and entry.kind.name == "GROUP":
            yield from _missing_members(name, (entry.cfg or {}).get("task"), index)


def _missing_members(group: str, members: object, index: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for item in members if isinstance(members, list) else []:
        inline = isinstance(item, dict)
        name = str(item.get("group", item.get("task"))) if inline else str(item)
        if name in index:
            yield from _missing([name], index)
        elif inline and "group" in item:
            yield from _missing_members(name, item.get("task"), index)
        elif not (inline and item.keys() & {"dataset_path", "class", "custom_dataset", "include"}):
            yield group, name


def _unread(name: str, include: Sequence[Path]) -> Path | None:
    """The file of ``include`` that names a task; the harness passes over files that it cannot read without a word."""
    line = re.compile(rf"^\W*(task|group)\W+{re.escape(name)}\W*$", re.MULTILINE)
    files = sorted(file for folder in include for file in folder.rglob("*.yaml") if file.is_file())
    return next((file for file in files if line.search(file.read_text("utf-8", "replace"))), None)
