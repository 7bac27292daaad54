"""Scorers of answers, given by the user: a Python function, or a command that reads JSON lines and writes numbers."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import queue
import shlex
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

from telechat_twins.core.errors import UserError
from telechat_twins.core.inference.prompts import Prompt
from telechat_twins.core.shown import printable, shown
from telechat_twins.core.types import JsonObject

PYTHON, COMMAND = "python:", "command:"
WAIT_NOTE_S = 60.0  # a note after each such time without a number
EXIT_GRACE_S = 10.0  # for a command to end after its input has ended
_LAST_LINES = 5  # of a command's errors, shown when it ends early

Score = float | str
"""The number of an answer, or the reason why the scorer gave none."""
Note = Callable[[str], object]


class Scorer(Protocol):
    """A judge of answers. ``identity``: what decides its numbers, as far as it can be known."""

    @property
    def identity(self) -> JsonObject: ...

    def score(self, prompt: Prompt, answers: Sequence[str]) -> list[Score]:
        """One number, or the reason why there is none, for each answer. UserError when the scorer is gone."""


@contextmanager
def open_scorer(spec: str, note: Note) -> Iterator[Scorer]:
    """The scorer of ``python:FILE.py:function`` or ``command:CMD ...``, ended with the block; ``note`` shows messages.

    UserError for another spec, a function that is not there, and a command that cannot be started.
    """
    if spec.startswith(PYTHON):
        yield _Function(spec.removeprefix(PYTHON))
    elif spec.startswith(COMMAND):
        with _Command(spec.removeprefix(COMMAND), note) as command:
            yield command
    else:
        raise UserError(f"--score: must be python:FILE.py:function or 'command:CMD ...', found {shown(spec)}")


class _Function:
    """A function (messages, answer, row) -> number from a Python file."""

    def __init__(self, place: str) -> None:
        file, _, name = place.rpartition(":")
        path = Path(file)
        if not file or not name:
            raise UserError(f"--score: must be python:FILE.py:function, found python:{place}; name file and function")
        try:
            source = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"--score {file}: cannot be read ({error.strerror}); give the path of a Python file"
            ) from None
        self.identity: JsonObject = {"function": name, "sha256": hashlib.sha256(source).hexdigest()}
        module_spec = importlib.util.spec_from_file_location("tele_scorer", path)
        if module_spec is None or module_spec.loader is None:
            raise UserError(f"--score {file}: must be a Python file with the ending .py; rename it")
        module = importlib.util.module_from_spec(module_spec)
        sys.path.append(str(path.resolve().parent))  # for modules beside it
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"--score {file}: cannot be imported ({_reason(error)}); mend it") from None
        found = getattr(module, name, None)
        if not callable(found):
            raise UserError(
                f"--score {file}: must define a function {printable(name)}, found none; name one that it has"
            )
        self._function = found

    def score(self, prompt: Prompt, answers: Sequence[str]) -> list[Score]:
        return [self._one(prompt, answer) for answer in answers]

    def _one(self, prompt: Prompt, answer: str) -> Score:
        try:
            # Copies: a scorer that changes its arguments must not change what is written.
            value = self._function(copy.deepcopy(prompt.messages), answer, copy.deepcopy(prompt.row))
            if isinstance(value, str):
                return f"returned {shown(value)}, not a number"
            return float(value)
        except Exception as error:
            return _reason(error)


def _reason(error: Exception) -> str:
    """An exception of the user's code on one line, with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return printable(f"{type(error).__name__}: {error}{place}", 400)


class _Command:
    """A process that reads {"messages", "answer", "row"} a line and writes a number a line, in the same order."""

    def __init__(self, text: str, note: Note) -> None:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UserError(f"--score command: cannot be divided into words ({error}); close its quotes") from None
        if not words:
            raise UserError("--score command: must name a program, found nothing; e.g. 'command:python score.py'")
        self.identity: JsonObject = {"command": words}
        self._name, self._note, self._where = words[0], note, "start"
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise UserError(
                f"--score command: {words[0]} cannot be started ({error.strerror}); give its path"
            ) from None
        self._lines: queue.Queue[bytes | None] = queue.Queue()  # None: the command has closed its output
        self._errors: deque[str] = deque(maxlen=_LAST_LINES)
        # Both outputs are read at all times, so that the command never blocks on a full pipe.
        targets = (self._read_numbers, self._read_errors)
        self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> _Command:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end()
        over = 0
        while not self._lines.empty():
            over += self._lines.get() is not None
        if over and kind is None:
            raise UserError(
                f"--score command: must write one line for each answer, but {self._name} wrote {over} more, so numbers "
                "may belong to other answers; write everything else to stderr, and sample again to another --out"
            )

    def _end(self) -> None:
        """Close the command's input and wait for its end, which is forced after a time."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._note(f"--score command: {self._name} did not end with its input and is terminated")
            self._process.terminate()
            try:
                self._process.wait(EXIT_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for thread in self._threads:
            thread.join(1.0)  # a child of the command may hold its outputs open

    def score(self, prompt: Prompt, answers: Sequence[str]) -> list[Score]:
        self._where = prompt.where
        if not self._lines.empty():
            line = self._lines.get()
            if line is None:
                raise self._gone()
            raise UserError(
                f"--score command: must write one line for each answer, found {shown(line.decode(errors='replace'))} "
                f"before {prompt.where}; write everything else to stderr"
            )
        rows = [{"messages": prompt.messages, "answer": answer, "row": prompt.row} for answer in answers]
        data = "".join(json.dumps(row, default=str) + "\n" for row in rows).encode()  # ASCII: any locale reads it
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError:
            raise self._gone() from None
        return [_number(self._next()) for _ in answers]

    def _next(self) -> bytes:
        waited = 0.0
        while True:
            try:
                line = self._lines.get(timeout=WAIT_NOTE_S)
            except queue.Empty:
                waited += WAIT_NOTE_S
                self._note(
                    f"--score command: no number for {self._where} since {waited:.0f} s; it must flush every line "
                    "that it writes (Python: print(..., flush=True))"
                )
                continue
            if line is None:
                raise self._gone()
            return line

    def _gone(self) -> UserError:
        """The error for a command that ended, or closed its output, before it was asked to."""
        try:
            code = f"ended with exit code {self._process.wait(1.0)}"
        except subprocess.TimeoutExpired:
            code = "closed its output"
        self._threads[1].join(1.0)
        said = f"; its last errors: {' | '.join(self._errors)}" if self._errors else ""
        return UserError(
            f"--score command: must run until its input ends, but {self._name} {code} at {self._where}{said}; mend it "
            "and repeat the command, which resumes"
        )

    def _read_numbers(self) -> None:
        for line in _lines_of(self._process.stdout):
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        for line in _lines_of(self._process.stderr):
            text = printable(line.decode(errors="replace").rstrip("\r\n"), 400)
            self._errors.append(text)
            self._note(f"scorer, {self._where}: {text}")


def _lines_of(file: IO[bytes] | None) -> Iterator[bytes]:
    assert file is not None
    with file:
        yield from iter(file.readline, b"")


def _number(line: bytes) -> Score:
    text = line.decode(errors="replace").strip()
    try:
        return float(text)
    except ValueError:
        return f"wrote {shown(text)}, not a number"
