"""Notice file of a multi-rank save: rank 0 publishes the folder being written and the outcome."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.types import JsonObject

# A file written on one machine may become visible on another this much later, by the caches of a network file system.
VISIBILITY_S = 60.0


class Notice:
    """A small hidden file beside the checkpoint, written by rank 0 and polled by the other ranks.

    It has ``id`` and ``building`` (the hidden folder) during the save, and ``id`` and ``failed`` (the reason) after a
    failure. It is removed when the checkpoint is complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.path = self.folder.parent / f".saving-{folder.name}.json"
        self.id = ""

    def post(self, building: Path) -> None:
        """Announce a new save that writes into ``building``."""
        self.id = uuid.uuid4().hex
        write_text(self.path, json.dumps({"id": self.id, "building": building.name}))

    def refuse(self, reason: str) -> None:
        """Announce that the save has failed."""
        try:
            write_text(self.path, json.dumps({"id": self.id, "failed": reason}))
        except (OSError, UserError):
            self.withdraw()

    def withdraw(self) -> None:
        """Remove the notice: the checkpoint is complete."""
        with suppress(OSError):
            self.path.unlink()

    def read(self) -> JsonObject | None:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def follow(self) -> Path:
        """The folder that rank 0 has announced. UserError if its save has failed or the notice is not visible here."""
        for _ in polls(VISIBILITY_S):
            found = self.read()
            if found is not None:
                break
        else:
            raise UserError(
                f"{self.folder}: all ranks must write to one shared file system; the notice that rank 0 wrote beside "
                "the checkpoint is not visible on this machine"
            )
        if "failed" in found:
            raise UserError(found["failed"])
        self.id = found["id"]
        return self.folder.parent / found["building"]

    def check(self) -> None:
        """UserError if rank 0 has abandoned this save."""
        found = self.read()
        if found is not None and found["id"] == self.id and "failed" in found:
            raise UserError(found["failed"])

    def outcome(self, timeout_s: float) -> str | None:
        """Wait for the end of the save: None when the checkpoint is complete, else the reason in one line."""
        gone_since: float | None = None
        for _ in polls(timeout_s):
            found = self.read()
            if found is not None and found["id"] == self.id:
                if "failed" in found:
                    return found["failed"]
                gone_since = None
                continue
            with suppress(OSError), open(self.folder / "manifest.json", encoding="utf-8") as file:
                if f'"save": "{self.id}"' in file.read(1000):
                    return None
            # Not yet a failure: a network file system may lag, or fail while a file is replaced.
            gone_since = gone_since or time.monotonic()
            if time.monotonic() - gone_since > VISIBILITY_S:
                return f"{self.folder}: rank 0 abandoned the save"
        return f"{self.folder}: rank 0 did not finish the save within {timeout_s:g} s"


def polls(seconds: float) -> Iterator[None]:
    """Yields at once, then at growing intervals (10 ms to 0.5 s), for the last time when ``seconds`` have passed."""
    end = time.monotonic() + seconds
    pause = 0.01
    while True:
        over = time.monotonic() >= end
        yield
        if over:
            return
        time.sleep(min(pause, max(end - time.monotonic(), 0)))
        pause = min(pause * 1.5, 0.5)
