"""Retention of a run's checkpoints: lists the step folders, orders them by save number, and removes old ones."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from telechat_twins.core.checkpoint.notice import Notice
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import mark_lives, remove_folder
from telechat_twins.core.files.foreign import read_text
from telechat_twins.core.shown import shown

STEP_FOLDER = re.compile(r"step-(\d{8,})")
BEST = "best"  # file of a run, which names a step folder as ``latest`` does
_NUMBER = re.compile(r'^ "number": (\d{1,18}),$', re.MULTILINE)
_LEFT = re.compile(r"\.saving-step-\d{8,}\.json|\.(latest|\.?saving-step-\d{8,}\.json)-\d+")

_log = logging.getLogger(__name__)


def step_folders(root: Path) -> list[Path]:
    """The step folders of a run."""
    return [p for p in root.iterdir() if STEP_FOLDER.fullmatch(p.name) and (p / "manifest.json").is_file()]


def saved_step(root: Path) -> int:
    """The step of a run's latest checkpoint; 0 without one. UserError for a file ``latest`` that names none."""
    if not (root / "latest").is_file():
        return 0
    name = read_text(root / "latest", 4_096).strip()
    if not STEP_FOLDER.fullmatch(name):
        raise UserError(
            f"{root / 'latest'}: damaged, must name a step folder, found {shown(name)}; remove the folder it lies in"
        )
    return int(name.removeprefix("step-"))


def latest_save(root: Path) -> tuple[int, int]:
    """The step of a run's latest checkpoint and the number of its save, which tells a step that was saved again from
    the one before; zeros without a checkpoint. UserError as saved_step."""
    step = saved_step(root)
    return step, save_number(root / f"step-{step:08d}") if step else 0


def save_number(folder: Path) -> int:
    """Number of a checkpoint's save in its run, from 1; 0 in manifests without one, and for unreadable manifests."""
    try:
        with open(folder / "manifest.json", encoding="utf-8") as file:
            head = file.read(1000)
            if found := _NUMBER.search(head):  # write_manifest puts it in front; the rest may have megabytes
                return int(found[1])
            number = json.loads(head + file.read()).get("number", 0)
        return number if type(number) is int else 0
    except (OSError, ValueError, AttributeError):
        return 0


def prune(root: Path, newest: Path, keep_last: int) -> None:
    """Remove all checkpoints of a run but ``newest``, the ``keep_last`` - 1 saved before it, and the best one.

    The order is that of the save numbers. Steps would be wrong, since a run may return to an earlier step, and so would
    file times, since clocks are set and files copied. Checkpoints without a number count as the oldest, by file time.
    """
    kept = {newest.name, best_name(root)}
    others = [p for p in step_folders(root) if p.name not in kept]
    others.sort(key=lambda p: (save_number(p), (p / "manifest.json").stat().st_mtime_ns, p.name), reverse=True)
    for folder in others[max(keep_last - 1, 0) :]:
        try:
            remove_folder(folder)
        except OSError as error:
            _log.warning("%s: old checkpoint could not be removed (%s)", folder, error.strerror)


def best_name(root: Path) -> str | None:
    """Name of the step folder that the run's file ``best`` names, if there is one (core.train.heldout)."""
    try:
        with open(root / BEST, encoding="utf-8") as file:
            return file.read(100).strip()
    except (OSError, ValueError):
        return None


def forget_notices(folder: Path) -> None:
    """Remove the notices of abandoned and killed saves, except that of this save, and unfinished files that an earlier
    version of this program left behind when it was killed."""
    own = Notice(folder).path
    for left in folder.parent.glob(".*"):
        if left.name != own.name and _LEFT.fullmatch(left.name):
            pid = left.name.rpartition("-")[2]
            if left.suffix == ".json" or not mark_lives(pid):
                left.unlink(missing_ok=True)
