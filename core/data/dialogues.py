"""Parser of dialogue rows in three formats; a key that would be lost is an error."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, overload

from telechat_twins.core.data.chat_template import DEFAULT_SYSTEM, ROLES, tool_arguments
from telechat_twins.core.data.control import BOT, USER
from telechat_twins.core.data.rows import OnBytes, keys_found, open_file, parse_row, raw_rows, row_place
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import parse_value
from telechat_twins.core.shown import printable
from telechat_twins.core.types import JsonObject

# The keys that are read: of a row, by the one that tells its shape; of a message; of a call.
_SHAPES = {
    "dialog": {"dialog"},
    "messages": {"messages"},
    "output": {"instruction", "input", "output", "history"},
}
_COMMON = {"system", "tools", "multiturn", "tool"}
_MESSAGE = {"role", "content"}
_OF_ROLE = {"assistant": {"tool_calls"}, "bot": {"tool_calls"}, "tool": {"tool_call_id", "name"}}
_CONTENTS = {"role", "content", "tool_calls"}.union(_COMMON, *_SHAPES.values())
_CALL, _FUNCTION = {"id", "type", "index"}, {"name", "arguments"}


@dataclass(frozen=True)
class Dialogue:
    """One conversation. ``system`` None: the row names none. ``tool``, ``multiturn``: the released flags.

    ``pair``: the (input, output) texts where the row was written that way.
    """

    where: str
    messages: list[JsonObject]
    system: str | None = None
    tools: list[object] | None = None
    multiturn: bool = False
    tool: bool = False
    pair: tuple[str, str] | None = field(default=None)

    @property
    def released_system(self) -> str:
        """The system text the released DeepSpeed pipeline trains with when none is given."""
        return DEFAULT_SYSTEM + "\n" if self.system is None else self.system


def parse_dialogue(row: JsonObject, where: str, ignore: Collection[str] = ()) -> Dialogue:
    """A row of one of the three shapes of docs/data.md:

    {"system", "dialog": [...], "multiturn", "tool"}, {"messages": [...], "tools"}, or {"instruction", "input",
    "output", "history"}. UserError, naming ``where``, for what is malformed and for a key that is not read (by which
    something the user wrote would be lost), unless ``ignore`` names it or its value is empty.
    """
    shape = _shape(row, where)
    refuse_unread(row, _SHAPES[shape] | _COMMON, "", where, ignore)
    system = _optional_text(row, "system", where)
    if shape == "output":
        pair, messages = _pair(row, where)
    else:
        pair, messages = None, _messages(row, shape, where, ignore)
    for n, message in enumerate(messages):
        if message["role"] == "system" and (n or system is not None):
            raise UserError(
                f"{where}: '{shape}[{n}]' is a second system message; the chat layout has a place for one, in front, "
                "so write the instruction into that one or into a user's message"
            )
    if messages and messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if not messages:
        raise UserError(f"{where}: '{shape}' is empty; a dialogue needs a user and a bot message")
    tools = _json_list(row.get("tools"), "tools", where)
    called = any(m.get("tool_calls") or m["role"] == "tool" for m in messages)
    return Dialogue(
        where,
        messages,
        system,
        tools,
        multiturn=_flag(row, "multiturn", len(messages) > 2, where),
        tool=_flag(row, "tool", bool(tools) or called, where),
        pair=pair,
    )


def refuse_unread(
    value: JsonObject, known: Collection[str], name: str, where: str, ignore: Collection[str] = ()
) -> None:
    """UserError for a key of ``value`` (called ``name``) that is none of ``known``; empty values say nothing."""
    for key, given in value.items():
        if given is None or given in ("", [], {}) or (key in ignore and key not in known):
            continue
        if key in known:
            # A name of a function or an id of a call is not a reason to refuse what is left out of rows and messages.
            if key in ignore and key in _CONTENTS:
                raise UserError(
                    f"{where}: --ignore-key {key} would leave out '{f'{name}.' * bool(name)}{key}', which is part of "
                    "the dialogue; remove it from the rows, or leave the option out"
                )
            continue
        place = f"'{name}.{printable(key, 80)}'" if name else f"'{printable(key, 80)}'"
        raise UserError(
            f"{where}: key {place} is not read, so its content would be lost; remove it, or leave it out with "
            f"--ignore-key {printable(key, 80)}"
        )


def _shape(row: JsonObject, where: str) -> str:
    """The key of _SHAPES that tells what kind of row this is."""
    given = [shape for shape in _SHAPES if shape in row]
    if "output" in given and not row.keys() & {"instruction", "input"}:
        given.remove("output")
    for shape in given:
        # Released files fill absent fields with null.
        if row[shape] is not None or len(given) == 1:
            return shape
    if "text" in row:
        raise UserError(f"{where}: a text, not a dialogue; pack texts without --sft")
    raise UserError(
        f"{where}: expected system/dialog, messages, or instruction/input/output; keys found: {keys_found(row)}"
    )


def _pair(row: JsonObject, where: str) -> tuple[tuple[str, str] | None, list[JsonObject]]:
    """(the texts of a bare input/output row, or None; the messages of a row with an output)."""
    given = _optional_text(row, "input", where) or ""
    instruction = _optional_text(row, "instruction", where) or ""
    answer = _text(row, "output", where)
    earlier: list[JsonObject] = []
    for n, turn in enumerate(_list(row.get("history") or [], "history", where)):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise UserError(f"{where}: 'history[{n}]' must be a list of two texts, a question and its answer")
        earlier += [{"role": "user", "content": turn[0]}, {"role": "bot", "content": turn[1]}]
    if instruction:
        question = f"{instruction}\n{given}" if given else instruction
        return None, [*earlier, {"role": "user", "content": question}, {"role": "bot", "content": answer}]
    if row.get("input") is None:
        raise UserError(f"{where}: neither 'instruction' nor 'input' holds text; a dialogue needs a question")
    return None if earlier else (given, answer), [*earlier, *_turns(given, answer)]


def _messages(row: JsonObject, key: str, where: str, ignore: Collection[str]) -> list[JsonObject]:
    messages: list[JsonObject] = []
    calls: list[JsonObject] = []  # those that the tool messages below answer, one after another
    for n, value in enumerate(_list(row[key], key, where)):
        message = _message(value, f"{key}[{n}]", where, ignore)
        if message["role"] == "tool":
            _check_result(message, calls.pop(0) if calls else {}, f"{key}[{n}]", where)
        else:
            calls = list(message.get("tool_calls", ()))
        messages.append(message)
    return messages


def _check_result(message: JsonObject, call: JsonObject, name: str, where: str) -> None:
    """The layout gives results no names: they belong to the calls by their order alone, which names may contradict."""
    for key, wanted in (("tool_call_id", call.get("id")), ("name", call.get("name"))):
        given = message.pop(key, None)
        if given is not None and given != wanted:
            expected = f"{wanted!r}" if wanted is not None else "no call"
            raise UserError(
                f"{where}: '{name}.{key}' is {given!r}, but in its place {expected} is answered; results must stand "
                "in the order of their calls"
            )


class DialogueFile(Sequence[Dialogue]):
    """The dialogues of several files, read from disk one at a time, in order or by number.

    Holds five integers a row and no text. ``on_bytes`` receives the size of every row that is read.
    """

    def __init__(self, files: Sequence[Path], on_bytes: OnBytes | None = None, ignore: Collection[str] = ()):
        self.on_bytes, self._ignore = on_bytes, ignore
        self._files = list(files)
        self._file, self._item = array("i"), array("q")
        self._offset, self._size, self._line = array("q"), array("q"), array("q")
        for n, path in enumerate(self._files):
            for row in raw_rows(path):
                self._file.append(n)
                self._item.append(row.item)
                self._offset.append(row.offset)
                self._size.append(len(row.data))
                self._line.append(row.line)
        self._handle: tuple[int, BinaryIO] | None = None

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
            self._handle = (n, open_file(self._files[n]))
        file = self._handle[1]
        file.seek(self._offset[index])
        data = file.read(self._size[index])
        if self.on_bytes:
            self.on_bytes(len(data))
        where = row_place(self._files[n], self._line[index], self._item[index])
        return parse_dialogue(parse_row(data, where), where, self._ignore)

    def close(self) -> None:
        if self._handle is not None:
            self._handle[1].close()
            self._handle = None


def _turns(question: str, answer: str) -> list[JsonObject]:
    """Messages of an input/output row; an input written as <_user>q<_bot>a...<_user>q is taken apart."""
    plain = [{"role": "user", "content": question}, {"role": "bot", "content": answer}]
    if not question.startswith(USER):
        return plain
    messages: list[JsonObject] = []
    turns = question.split(USER)[1:]
    for n, turn in enumerate(turns):
        asked, marker, said = turn.partition(BOT)
        if bool(marker) != (n < len(turns) - 1) or BOT in said:
            return plain
        messages.append({"role": "user", "content": asked})
        if marker:
            messages.append({"role": "bot", "content": said})
    return [*messages, {"role": "bot", "content": answer}]


def _message(value: object, name: str, where: str, ignore: Collection[str]) -> JsonObject:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise UserError(f"{where}: '{name}' must be an object with role and content")
    role = value["role"]
    if role not in ROLES:
        raise UserError(f"{where}: '{name}.role' is {role!r}; legal: {', '.join(ROLES)}")
    refuse_unread(value, _MESSAGE | _OF_ROLE.get(role, set()), name, where, ignore)
    # Released files fill absent fields with null.
    known = _MESSAGE | _OF_ROLE.get(role, set())
    message = {k: v for k, v in value.items() if v is not None and k in known}
    calls = _json_list(message.pop("tool_calls", None), f"{name}.tool_calls", where)
    if calls:
        message["tool_calls"] = [
            _call(call, n, f"{name}.tool_calls[{n}]", where, ignore) for n, call in enumerate(calls)
        ]
    content = message.get("content")
    if not isinstance(content, str) and not (calls and content is None):
        found = type(content).__name__ if content is not None else "nothing"
        raise UserError(f"{where}: '{name}.content' must be text, found {found}")
    return message


def _call(value: object, place: int, name: str, where: str, ignore: Collection[str]) -> JsonObject:
    """{"name", "arguments", "id"} of a call, written flat or as the OpenAI interface writes it."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: '{name}' must be an object, found {type(value).__name__}")
    wrapped = "function" in value
    inner = value["function"] if wrapped else value
    refuse_unread(value, _CALL | ({"function"} if wrapped else _FUNCTION), name, where, ignore)
    if wrapped:
        name = f"{name}.function"
        if not isinstance(inner, dict):
            raise UserError(f"{where}: '{name}' must be an object, found {type(inner).__name__}")
        refuse_unread(inner, _FUNCTION, name, where, ignore)
    if not isinstance(inner.get("name"), str):
        raise UserError(f"{where}: '{name}.name' must be text, found {type(inner.get('name')).__name__}")
    for key, wanted in (("type", "function"), ("index", place)):
        if value.get(key) is not None and value[key] != wanted:
            raise UserError(f"{where}: '{name}': '{key}' must be {wanted!r}, found {value[key]!r}")
    try:
        given = inner.get("arguments")
        arguments = tool_arguments({} if given is None else given)
    except ValueError as error:
        raise UserError(f"{where}: '{name}.arguments' {error}") from None
    call = {"name": inner["name"], "arguments": arguments}
    return call if value.get("id") is None else {**call, "id": value["id"]}


def _list(value: object, name: str, where: str) -> list[object]:
    if not isinstance(value, list):
        raise UserError(f"{where}: '{name}' must be a list, found {type(value).__name__}")
    return value


def _json_list(value: object, name: str, where: str) -> list[object] | None:
    """A list, or a string that holds one as JSON (as in the released tool files); None when absent or empty."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_value(value.encode())
        except ValueError as error:
            reason = getattr(error, "msg", str(error))
            raise UserError(f"{where}: '{name}' is text but not a JSON list ({reason})") from None
    return _list(value, name, where) if value else None


def _text(row: JsonObject, name: str, where: str) -> str:
    if not isinstance(row[name], str):
        raise UserError(f"{where}: '{name}' must be text, found {type(row[name]).__name__}")
    return row[name]


def _optional_text(row: JsonObject, name: str, where: str) -> str | None:
    return None if row.get(name) is None else _text(row, name, where)


def _flag(row: JsonObject, name: str, default: bool, where: str) -> bool:
    value = row.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"{where}: '{name}' must be true or false, found {value!r}")
    return value
