"""Reading the user's files: which files, their lines, and dialogue rows in the three shapes found in the wild.

Nothing here keeps a file in memory; every mistake is reported as "file:line: ...".
"""

from __future__ import annotations

import glob
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from core.data.chat_template import DEFAULT_SYSTEM
from core.data.control import BOT, USER
from core.errors import UserError
from core.foreign import MAX_LINE, MAX_LINE_VALUES, check_size, lines

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
ROW_SUFFIXES = (".jsonl", ".ndjson")
BLOCK_BYTES = 1 << 20

OnBytes = Callable[[int], object]


def find_inputs(paths: Sequence[str | Path]) -> list[Path]:
    """Files, folders (searched through, text and jsonl files only) and globs -> sorted files without repetition.

    The order is that of ``paths``, and by name inside a folder or glob. UserError when one of them yields nothing.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES + ROW_SUFFIXES and p.is_file())
            files = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        else:
            files = [Path(p) for p in sorted(glob.glob(str(given), recursive=True)) if Path(p).is_file()]
        if not files:
            kinds = " ".join(TEXT_SUFFIXES + ROW_SUFFIXES)
            raise UserError(f"{given}: no such file, and no folder or pattern with files in it (folders: {kinds})")
        found.update(dict.fromkeys(files))
    return list(found)


def is_rows(path: Path) -> bool:
    """Whether a file holds one JSON object a line."""
    return path.suffix in ROW_SUFFIXES


def total_bytes(files: Sequence[Path]) -> int:
    return sum(f.stat().st_size for f in files)


def detect_kind(files: Sequence[Path]) -> str:
    """ "text" or "dialogue", by the first row of every jsonl file; UserError when both are mixed."""
    kinds: dict[str, Path] = {}
    for file in files:
        kind = "text"
        if is_rows(file):
            row = next((row for _, row in read_rows(file)), {})
            kind = "text" if "text" in row else "dialogue" if row else ""
        if kind:
            kinds.setdefault(kind, file)
    if len(kinds) > 1:
        raise UserError(f"{kinds['dialogue']}: holds dialogues while {kinds['text']} holds text; pack them separately")
    return next(iter(kinds), "text")


def read_rows(path: Path, on_bytes: OnBytes | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) for every non-blank line of a jsonl file."""
    with _open(path) as file:
        for number, line in enumerate(lines(file, path), 1):
            if on_bytes:
                on_bytes(len(line))
            if line.strip():
                where = f"{path}:{number}"
                yield where, parse_row(line, where)


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        check_size(line, MAX_LINE, MAX_LINE_VALUES)
    except ValueError as error:
        raise UserError(f"{where}: a row of {error}; split it into several rows") from None
    try:
        row = json.loads(line.decode("utf-8-sig").strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}); convert the file") from None
    except (ValueError, RecursionError) as error:
        # Besides JSON's own errors: a number of thousands of digits, which Python refuses to read.
        reason = getattr(error, "msg", "nested too deep" if isinstance(error, RecursionError) else "a number too long")
        column = getattr(error, "colno", 1)
        raise UserError(f"{where}: not valid JSON ({reason} at column {column}); expected one object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


@dataclass(frozen=True)
class Block:
    """Part of a document: ``first`` starts it, ``last`` ends it."""

    where: str
    text: str
    first: bool = True
    last: bool = True


def read_documents(path: Path, on_bytes: OnBytes | None = None, text_key: str = "text") -> Iterator[Block]:
    """A jsonl file gives one document a row; any other file is one document, in blocks cut behind a newline."""
    if not is_rows(path):
        yield from _text_blocks(path, on_bytes)
        return
    for where, row in read_rows(path, on_bytes):
        text = row.get(text_key)
        if isinstance(text, str):
            yield Block(where, check_text(text, where, text_key))
        elif {"dialog", "messages", "input"} & row.keys():
            raise UserError(f"{where}: a dialogue, not a text; pack dialogues with --sft")
        else:
            raise UserError(f"{where}: expected text in field '{text_key}'; keys found: {', '.join(row) or 'none'}")


def _text_blocks(path: Path, on_bytes: OnBytes | None) -> Iterator[Block]:
    line = 1
    with _open(path) as file:
        blocks = _byte_blocks(file, on_bytes)
        data = next(blocks, None)
        first = True
        while data is not None:
            following = next(blocks, None)
            try:
                text = data.decode("utf-8-sig" if first else "utf-8")
            except UnicodeDecodeError as error:
                bad = line + data.count(b"\n", 0, error.start)
                raise UserError(f"{path}:{bad}: not UTF-8; convert the file") from None
            yield Block(f"{path}:{line}", text, first, last=following is None)
            line += data.count(b"\n")
            data, first = following, False


def _byte_blocks(file: Any, on_bytes: OnBytes | None) -> Iterator[bytes]:
    """About BLOCK_BYTES each, cut behind a newline: there a block encodes exactly as it does inside the whole text."""
    rest = b""
    while chunk := file.read(BLOCK_BYTES):
        if on_bytes:
            on_bytes(len(chunk))
        rest += chunk
        cut = rest.rfind(b"\n") + 1
        if not cut and len(rest) >= 16 * BLOCK_BYTES:
            cut = len(rest) - 1
            while cut > 1 and rest[cut] & 0xC0 == 0x80:  # not inside a character
                cut -= 1
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def check_text(text: str, where: str, name: str) -> str:
    """The text itself; UserError when it cannot be written as UTF-8 (an unpaired surrogate escape)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: '{name}' has an unpaired surrogate at character {error.start}; remove it") from None
    return text


@dataclass(frozen=True)
class Dialogue:
    """One conversation. ``system`` None: the row names none. ``tool``, ``multiturn``: the released flags.

    ``pair``: the (input, output) texts where the row was written that way.
    """

    where: str
    messages: list[dict[str, Any]]
    system: str | None = None
    tools: list[Any] | None = None
    multiturn: bool = False
    tool: bool = False
    pair: tuple[str, str] | None = field(default=None)

    @property
    def released_system(self) -> str:
        """The system text the released DeepSpeed pipeline trains with when none is given."""
        return DEFAULT_SYSTEM + "\n" if self.system is None else self.system


def parse_dialogue(row: dict[str, Any], where: str) -> Dialogue:
    """A row {"system", "dialog": [...], "multiturn", "tool"}, {"messages": [...], "tools"} or {"input", "output"}."""
    if "dialog" in row or "messages" in row:
        key = "dialog" if "dialog" in row else "messages"
        messages = [_message(m, f"{key}[{n}]", where) for n, m in enumerate(_list(row[key], key, where))]
        system = _optional_text(row, "system", where)
        if system is None and messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        if not messages:
            raise UserError(f"{where}: '{key}' is empty; a dialogue needs a user and a bot message")
        tools = _json_list(row.get("tools"), "tools", where)
        called = any(m.get("tool_calls") or m["role"] == "tool" for m in messages)
        return Dialogue(
            where,
            messages,
            system,
            tools,
            multiturn=_flag(row, "multiturn", len(messages) > 2, where),
            tool=_flag(row, "tool", bool(tools) or called, where),
        )
    if "input" in row and "output" in row:
        pair = (_text(row, "input", where), _text(row, "output", where))
        messages = _turns(*pair)
        return Dialogue(where, messages, _optional_text(row, "system", where), multiturn=len(messages) > 2, pair=pair)
    if "text" in row:
        raise UserError(f"{where}: a text, not a dialogue; pack texts without --sft")
    raise UserError(
        f"{where}: expected system/dialog, messages, or input/output; keys found: {', '.join(row) or 'none'}"
    )


class DialogueFile(Sequence[Dialogue]):
    """The dialogues of several jsonl files, read from disk one at a time, in order or by number.

    Holds three integers a row and no text. ``on_bytes`` is told the size of every line that is read.
    """

    def __init__(self, files: Sequence[Path], on_bytes: OnBytes | None = None):
        self.on_bytes = on_bytes
        self._files = list(files)
        self._file, self._offset, self._line = array("i"), array("q"), array("q")
        for n, path in enumerate(self._files):
            if not is_rows(path):
                raise UserError(f"{path}: dialogues are read from {' '.join(ROW_SUFFIXES)} files")
            offset = 0
            with _open(path) as file:
                for number, line in enumerate(lines(file, path), 1):
                    if line.strip():
                        self._file.append(n)
                        self._offset.append(offset)
                        self._line.append(number)
                    offset += len(line)
        self._handle: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self._offset)

    @overload
    def __getitem__(self, index: int) -> Dialogue: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Dialogue]: ...
    def __getitem__(self, index: int | slice) -> Dialogue | Sequence[Dialogue]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        n = self._file[index]
        if self._handle is None or self._handle[0] != n:
            self.close()
            self._handle = (n, _open(self._files[n]))
        file = self._handle[1]
        file.seek(self._offset[index])
        line = file.readline()
        if self.on_bytes:
            self.on_bytes(len(line))
        where = f"{self._files[n]}:{self._line[index]}"
        return parse_dialogue(parse_row(line, where), where)

    def close(self) -> None:
        if self._handle is not None:
            self._handle[1].close()
            self._handle = None


def _turns(question: str, answer: str) -> list[dict[str, Any]]:
    """Messages of an input/output row; an input written as <_user>q<_bot>a...<_user>q is taken apart."""
    plain = [{"role": "user", "content": question}, {"role": "bot", "content": answer}]
    if not question.startswith(USER):
        return plain
    messages: list[dict[str, Any]] = []
    turns = question.split(USER)[1:]
    for n, turn in enumerate(turns):
        asked, marker, said = turn.partition(BOT)
        if bool(marker) != (n < len(turns) - 1) or BOT in said:
            return plain
        messages.append({"role": "user", "content": asked})
        if marker:
            messages.append({"role": "bot", "content": said})
    return [*messages, {"role": "bot", "content": answer}]


def _message(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise UserError(f"{where}: '{name}' must be an object with role and content")
    if value["role"] not in ("system", "user", "assistant", "bot", "tool"):
        raise UserError(f"{where}: '{name}.role' is {value['role']!r}; legal: system, user, assistant, bot, tool")
    # Released files fill absent fields with null.
    message = {k: v for k, v in value.items() if v is not None}
    calls = _json_list(message.get("tool_calls"), f"{name}.tool_calls", where)
    if calls:
        message["tool_calls"] = calls
    elif not isinstance(message.get("content"), str):
        found = type(message.get("content")).__name__ if "content" in message else "nothing"
        raise UserError(f"{where}: '{name}.content' must be text, found {found}")
    check_text(str(message.get("content", "")), where, name)
    return message


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{where}: '{name}' must be a list, found {type(value).__name__}")
    return value


def _json_list(value: Any, name: str, where: str) -> list[Any] | None:
    """A list, or a string that holds one as JSON (as in the released tool files); None when absent or empty."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deep")
            raise UserError(f"{where}: '{name}' is text that is no JSON list ({reason})") from None
    return _list(value, name, where) if value else None


def _text(row: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(row[name], str):
        raise UserError(f"{where}: '{name}' must be text, found {type(row[name]).__name__}")
    return check_text(row[name], where, name)


def _optional_text(row: dict[str, Any], name: str, where: str) -> str | None:
    return None if row.get(name) is None else _text(row, name, where)


def _flag(row: dict[str, Any], name: str, default: bool, where: str) -> bool:
    value = row.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"{where}: '{name}' must be true or false, found {value!r}")
    return value


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
