"""The hidden file by which rank 0 tells the other ranks where a checkpoint is made and how the save ended."""

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

# A network file system may show another machine's new file this much later.
SIGHT_S = 60.0


class Notice:
    """A small hidden file beside the checkpoint by which rank 0 tells the others where it is made and how it ended.

    It holds ``id`` and ``building`` while the save goes on, ``id`` and ``failed`` when it is lost. It is gone when the
    checkpoint stands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.path = self.folder.parent / f".saving-{folder.name}.json"
        self.id = ""

    def post(self, building: Path) -> None:
        self.id = uuid.uuid4().hex
        write_text(self.path, json.dumps({"id": self.id, "building": building.name}))

    def refuse(self, told: str) -> None:
        try:
            write_text(self.path, json.dumps({"id": self.id, "failed": told}))
        except (OSError, UserError):
            self.withdraw()

    def withdraw(self) -> None:
        with suppress(OSError):
            self.path.unlink()

    def read(self) -> JsonObject | None:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def follow(self) -> Path:
        """Where rank 0 makes this checkpoint; UserError if it refused to, or if its notice is not seen here."""
        for _ in polls(SIGHT_S):
            found = self.read()
            if found is not None:
                break
        else:
            raise UserError(
                f"{self.folder}: what rank 0 wrote beside it is not seen here; all ranks must write to one shared "
                "file system"
            )
        if "failed" in found:
            raise UserError(found["failed"])
        self.id = found["id"]
        return self.folder.parent / found["building"]

    def check(self) -> None:
        """UserError if rank 0 has given up."""
        found = self.read()
        if found is not None and found["id"] == self.id and "failed" in found:
            raise UserError(found["failed"])

    def outcome(self, timeout_s: float) -> str | None:
        """None when the checkpoint stands, else the line that says why it does not."""
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
            # Not believed at once: a network file system may lag, or stumble while the file is replaced.
            gone_since = gone_since or time.monotonic()
            if time.monotonic() - gone_since > SIGHT_S:
                return f"{self.folder}: rank 0 gave it up"
        return f"{self.folder}: rank 0 did not finish it within {timeout_s:g} s"


def polls(seconds: float) -> Iterator[None]:
    """One turn at once, then more and more rarely until the time is over; one last turn then."""
    end = time.monotonic() + seconds
    pause = 0.01
    while True:
        over = time.monotonic() >= end
        yield
        if over:
            return
        time.sleep(min(pause, max(end - time.monotonic(), 0)))
        pause = min(pause * 1.5, 0.5)
