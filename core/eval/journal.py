"""Journal of an evaluation: every answer of the model as soon as it is known, so that an interrupted run continues.

A line a request: the digest of what was asked, and the answer. The first line names what the answers depend on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.types import JsonObject

VERSION = 1


def digest_of(*asked: object) -> str:
    """Digest of a request: its kind, token ids and options, as JSON values."""
    return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


class Journal:
    """Answers by digest, in the file ``path``; use as a context manager.

    ``identity``: what the answers depend on, such as the weights' fingerprint. UserError where the file is of another
    identity or damaged before its last line, which may be torn by an interruption.
    """

    def __init__(self, path: Path, identity: JsonObject) -> None:
        self.path = path
        self.found: dict[str, object] = {}
        head = json.dumps({"tele": "eval", "version": VERSION, "identity": identity}, sort_keys=True)
        if path.exists():
            self._read(head)
        else:
            write_text(path, head + "\n")
        self.earlier = len(self.found)
        self._file = open(path, "ab")  # noqa: SIM115 (lives as long as the evaluation; see __exit__)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # of a write that has been told already
            self._file.close()

    def put(self, digest: str, answer: object) -> None:
        """Record an answer: a JSON value. UserError where the system refuses it, as on a full disk."""
        self.found[digest] = answer
        line = json.dumps([digest, answer], ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path}: an answer cannot be written ({error.strerror}); the answers before it are kept: free "
                "some space, and repeat the command to continue"
            ) from None

    def _read(self, head: str) -> None:
        first, *lines = self.path.read_bytes().split(b"\n")
        whole = lines[:-1]  # behind the last newline: torn, or nothing
        try:
            former = json.loads(first)
            if former != json.loads(head):
                names = _different(former["identity"], json.loads(head)["identity"])
                raise UserError(
                    f"{self.path}: was begun with other options ({names}); repeat them to continue, or give another "
                    "--out"
                )
            for line in whole:
                digest, answer = json.loads(line)
                self.found[str(digest)] = answer
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: damaged; remove it, or give another --out") from None
        os.truncate(self.path, len(first) + 1 + sum(len(line) + 1 for line in whole))


def _different(former: JsonObject, now: JsonObject) -> str:
    names = [name for name in now if former.get(name) != now[name]]
    return ", ".join(names) or "of another version"
