"""Frozen dataclasses from plain mappings, with errors that name the field.

A configuration is a tree of dataclasses whose fields carry their legal values in ``field(metadata=...)``:
``min``/``max`` (inclusive), ``above`` (exclusive lower bound), ``choices``. Nothing is coerced except int -> float:
a quoted number is a typing mistake that the user should see.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

import yaml

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_DIGITS, read_text
from telechat_twins.core.files.yaml_slips import explained, slip
from telechat_twins.core.near import near_path, nearest, number_meant
from telechat_twins.core.shown import printable, shown
from telechat_twins.core.types import JsonObject

MAX_YAML = 1 << 17  # bytes; the largest config of a run has a few thousand, and the loader reads 100 KB a second
MAX_NODES = 10_000  # values of a document, aliases written out
MAX_DEPTH = 64
LARGEST = 1 << 63  # a whole number below this fits every array, file and counter that a config can size

T = TypeVar("T")
YamlValue: TypeAlias = Any  # a parsed document of unknown shape; from_mapping checks it


def option(default: Any = dataclasses.MISSING, *, help: str, **limits: Any) -> Any:
    """A dataclass field with its help text and limits (``min``, ``max``, ``above``, ``choices``)."""
    metadata = {"help": help, **limits}
    if default is not dataclasses.MISSING and isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def from_mapping(cls: type[T], data: object, where: str) -> T:
    """Build ``cls`` from ``data``; ``where`` is the dotted path used in messages.

    Raises UserError on an unknown key (suggesting the nearest legal one), a missing key, a wrong type, or a value
    outside its range.
    """
    if not isinstance(data, Mapping):
        first = dataclasses.fields(cls)[0].name  # type: ignore[arg-type]
        hint = f"; write {{{first}: {data}}}" if first == "path" and isinstance(data, str) else ""
        if isinstance(data, str) and (said := slip(data)):
            hint = f"; {said}"
        raise UserError(f"{where or 'config'}: expected a mapping of options, found {_found(data)}{hint}")
    # A field named by a word of Python ends in "_", which its key in a file does not: `from`.
    fields = {f.name.removesuffix("_"): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = nearest(key, fields, cutoff=0.5)
            hint = f"did you mean '{near}'?" if near else f"legal keys: {', '.join(sorted(fields))}"
            raise UserError(f"{where or 'config'}: unknown key {shown(key)}; {hint}")
    hints = typing.get_type_hints(cls)
    values: JsonObject = {}
    for name, f in fields.items():
        path = f"{where}.{name}" if where else name
        if name in data:
            values[f.name] = _check(hints[f.name], data[name], path, f.metadata)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{path}: missing; {f.metadata.get('help', 'it has no default')}")
    return cls(**values)


def load_yaml(path: str | Path) -> YamlValue:
    """Read one YAML document with the safe loader; UserError names the file and line of a syntax mistake.

    Only regular files of at most MAX_YAML bytes are read.
    """
    text = read_text(path, MAX_YAML, "no such file" if Path(path).exists() else f"no such file{near_path(path)}")
    return parse_yaml(text, str(path), lines=True)


def set_all(tree: JsonObject, assignments: Sequence[str]) -> None:
    """``set_dotted`` of each assignment. UserError for one that would undo an earlier one in silence: another value of
    the same key, or of a group of options that it lies in."""
    for number, later in enumerate(assignments):
        key, _, text = later.partition("=")
        for earlier in assignments[:number]:
            before, _, value = earlier.partition("=")
            if (before == key and value != text) or before.startswith(f"{key}."):
                raise UserError(
                    f"--set: {shown(later)} would undo {shown(earlier)}, which is set as well; leave one of them out"
                )
        set_dotted(tree, later)


def without(assignments: Sequence[str], others: Sequence[str]) -> list[str]:
    """Those of the ``assignments`` that the ``others``, which come after them, leave as they are."""
    keys = [other.partition("=")[0] for other in others]
    return [one for one in assignments if not any(f"{one.partition('=')[0]}.".startswith(f"{key}.") for key in keys)]


def set_dotted(tree: JsonObject, assignment: str) -> None:
    """Apply ``a.b.c=value`` to a tree of mappings in place."""
    key, sign, text = assignment.partition("=")
    if not sign or not key:
        raise UserError(f"--set {assignment}: expected key=value, e.g. --set train.steps=100")
    *parents, leaf = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {assignment}: '{part}' is a value, not a group of options")
    # The value is read by YAML's rules, so that --set and the file mean the same.
    node[leaf] = parse_yaml(text, f"--set {key}={text!r}" if not text.isprintable() else f"--set {assignment}")


def parse_yaml(text: str, where: str, lines: bool = False) -> YamlValue:
    """One YAML document; UserError on anything the loader stumbles over, with the line number if ``lines``."""
    if found := _ONLY_IN_11.search(text):
        line = f":{text.count(chr(10), 0, found.start()) + 1}" if lines else ""
        code = f"U+{ord(found[0]):04X}"
        raise UserError(f"{where}{line}: not valid YAML ({code} ends a line in some versions of YAML; take it out)")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        # A parser's error has a problem, the reader's (a character that may not stand in YAML) a reason.
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
        mark, begun = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
        number = mark.line + 1 if mark else 0
        if isinstance(error, yaml.reader.ReaderError):
            number = text.count(chr(10), 0, error.position) + 1
        if isinstance(error, (yaml.scanner.ScannerError, yaml.parser.ParserError)):
            number, reason = explained(reason, text, number, begun.line + 1 if begun else None)
        line = f":{number}" if lines and number else ""
        raise UserError(f"{where}{line}: not valid YAML ({reason})") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML (nested too deeply)") from None
    except (ValueError, TypeError, OverflowError) as error:
        # The loader's own conversions: a date with a 13th month, a tagged number that is none.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: not valid YAML ({reason})") from None


def in_file(message: str, path: str | Path, overrides: Sequence[str] = ()) -> str:
    """A message of ``from_mapping`` with "file:line" of the key that it names in front; with the file alone for a key
    that is not there, or a file that can no longer be read, as after hours of training; and as it is for one that an
    override ("a.b=value") sets."""
    found = _NAMED.match(message)
    words = _WORDS.findall(found[1]) if found and found[1] != "config" else []
    words += [found[2]] if found and found[2] else []
    given = [_WORDS.findall(override.partition("=")[0]) for override in overrides]
    if any(key == words[: len(key)] or words == key[: len(words)] for key in given):
        return message
    try:
        node, line = yaml.compose(read_text(path, MAX_YAML), Loader=_Loader), ""
    except (UserError, yaml.YAMLError):
        return f"{path}: {message}"
    for word in words:
        if isinstance(node, yaml.MappingNode):
            pairs = [(key, value) for key, value in node.value if key.value == word]
        elif isinstance(node, yaml.SequenceNode) and word.isdecimal():
            pairs = [(value, value) for value in node.value[int(word) : int(word) + 1]]
        else:
            pairs = []
        if not pairs:
            break
        line, node = f":{pairs[0][0].start_mark.line + 1}", pairs[0][1]
    return f"{path}{line}: {message}"


def key_lines(path: str | Path) -> dict[str, int]:
    """Dotted key of every mapping of a YAML file -> its line, from 1; keys inside lists are left out."""
    return {key: line for key, line, _ in _keys(path)}


def blank_keys(path: str | Path) -> list[tuple[str, int]]:
    """(dotted key, line) of every key of a YAML file, outside of lists, behind which nothing stands; not of "null"."""
    return [
        (key, line)
        for key, line, value in _keys(path)
        if isinstance(value, yaml.ScalarNode) and value.tag == _TAG + "null" and not value.value
    ]


def _keys(path: str | Path) -> Iterator[tuple[str, int, yaml.Node]]:
    """(dotted key, line, value) of every key outside of lists."""
    ways = [("", yaml.compose(read_text(path, MAX_YAML), Loader=_Loader))]
    seen: set[int] = set()  # an alias may be written a million times, or lead back to itself
    while ways:
        start, node = ways.pop()
        if not isinstance(node, yaml.MappingNode) or id(node) in seen:
            continue
        seen.add(id(node))
        for key, value in node.value:
            yield f"{start}{key.value}", key.start_mark.line + 1, value
            ways.append((f"{start}{key.value}.", value))


_NAMED = re.compile(r"([\w.\[\]]+)(?:,[\w., ]+)?: (?:unknown key '([^']*)')?")
_WORDS = re.compile(r"[^.\[\]]+")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """SafeLoader whose plain values mean the same in YAML 1.1 and 1.2, and that refuses a key given twice.

    Whole numbers are decimal, ``1e-5`` is a number, a date is text. What the two versions read differently (``010``,
    ``0x1F``, ``1_000``, ``1:30``, ``yes``) is refused unless quoted. Refused as well are aliases that make a small
    document a large or an endless one, keys that are no text, and tags of other values.
    """

    _composed = _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        self._composed, self._depth = self._composed + 1, self._depth + 1
        if self._composed > MAX_NODES or self._depth > MAX_DEPTH:
            reason = f"more than {MAX_NODES} values" if self._depth <= MAX_DEPTH else "nested too deeply"
            raise yaml.composer.ComposerError(None, None, reason, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > MAX_NODES:
            reason = f"more than {MAX_NODES} values once its aliases are written out"
            raise yaml.composer.ComposerError(None, None, reason, node.start_mark)
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} characters", node.start_mark
            )
        if isinstance(node.value, str) and _SURROGATE.search(node.value):
            reason = "half of a surrogate pair, which no text can hold"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                reason = f"a key must be text, found {key_node.value or 'nothing'}; quote it to mean text"
                raise yaml.constructor.ConstructorError(None, None, reason, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A decimal number, also where the tag was written out."""
        integer = node.tag == _TAG + "int"
        if not _DECIMAL.match(node.value) and (integer or not _FLOAT.match(node.value)):
            return self.refuse_ambiguous(node)
        if integer:
            return self.construct_yaml_int(node)
        value: float = self.construct_yaml_float(node)
        if value == 0 and re.search("[1-9]", re.split("[eE]", node.value)[0]):
            reason = f"{shown(node.value)} is too small for a number, and would be 0"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
        return value

    def construct_truth(self, node: yaml.ScalarNode) -> bool:
        """true or false, also where the tag was written out."""
        if not _TRUTH.match(node.value):
            return self.refuse_ambiguous(node)
        return self.construct_yaml_bool(node)

    def construct_nothing(self, node: yaml.ScalarNode) -> None:
        """null, also where the tag was written out."""
        if node.value not in ("", "~", "null", "Null", "NULL"):
            reason = f"{shown(node.value)} is not null; write null, or the text without the tag"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)

    def refuse_merge(self, node: yaml.ScalarNode) -> NoReturn:
        reason = "'<<' merges mappings in YAML 1.1 and is a key in 1.2; write the keys out, or quote it to mean text"
        raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)

    def refuse_ambiguous(self, node: yaml.ScalarNode) -> NoReturn:
        if node.value.lower() in ("yes", "no", "on", "off"):
            what = "is a truth value in some versions of YAML and text in others; write true or false, or quote it"
        else:
            what = "is read differently by versions of YAML; write a number in decimal, or quote it to mean text"
        raise yaml.constructor.ConstructorError(None, None, f"{shown(node.value)} {what}", node.start_mark)


def _written_out(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many nodes a tree has once every alias is a copy; ComposerError for a node that contains itself."""
    if id(node) not in known:
        known[id(node)] = None
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        known[id(node)] = 1 + sum(_written_out(child, known) for child in children)
    count = known[id(node)]
    if count is None:
        raise yaml.composer.ComposerError(None, None, "an alias to what contains it", node.start_mark)
    return count


_TAG = "tag:yaml.org,2002:"
_AMBIGUOUS = "tag:core.schema,ambiguous"
_DECIMAL = re.compile(r"^[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"^[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    r"|\.inf|\.Inf|\.INF)$|^(\.nan|\.NaN|\.NAN)$"
)
# Line ends of YAML 1.1 alone.
_ONLY_IN_11 = re.compile("[\x85\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TRUTH = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
# Octal, hexadecimal and binary, with digit separators or leading zeros, base 60, and YAML 1.1's other truth values.
_UNCLEAR = re.compile(
    r"^[-+]?(0[xXoObB][0-9a-fA-F_]+|0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"
    r"|(?=[^_]*_)([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?)$"
    r"|^(yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$"
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (_TAG + "null", _TAG + "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "int", _DECIMAL, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(_TAG + "bool", _TRUTH, list("tTfF"))
_Loader.add_implicit_resolver(_AMBIGUOUS, _UNCLEAR, list("-+.0123456789yYnNoO"))
# The values of YAML 1.2; 1.1 has sets, dates and bytes as well, which no option is.
_Loader.yaml_constructors = {
    kind: constructor
    for kind, constructor in yaml.SafeLoader.yaml_constructors.items()
    if kind is None or kind in (_TAG + "str", _TAG + "seq", _TAG + "map")
}
for _kind, _constructor in (
    (_TAG + "null", _Loader.construct_nothing),
    (_TAG + "int", _Loader.construct_number),
    (_TAG + "float", _Loader.construct_number),
    (_TAG + "bool", _Loader.construct_truth),
    (_AMBIGUOUS, _Loader.refuse_ambiguous),
    (_TAG + "merge", _Loader.refuse_merge),
):
    _Loader.add_constructor(_kind, _constructor)


def _check(kind: Any, value: Any, path: str, limits: Mapping[str, Any]) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(kind) if m is not type(None)]
        if value is None:
            if len(members) < len(typing.get_args(kind)):
                return None
            raise UserError(f"{path}: may not be empty")
        fitting = [m for m in members if _plain(m) is not None and _is(value, _plain(m))]
        return _check(fitting[0] if fitting else members[0], value, path, limits)
    if dataclasses.is_dataclass(kind):
        return from_mapping(typing.cast(type, kind), value, path)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise UserError(
                f"{path}: expected a list, found {_found(value)}{_as_list(typing.get_args(kind)[0], value)}"
            )
        inner = typing.get_args(kind)[0]
        items = [_check(inner, v, f"{path}[{i}]", limits) for i, v in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if type(value) is int and abs(value) >= max(LARGEST, limits.get("max", 0) + 1):  # a seed may have all 64 bits
        raise UserError(f"{path}: {shown(value)} is out of range; whole numbers are below 2**63")
    if kind is float and _is(value, int):
        value = float(value)
    if not _is(value, kind):
        one_of = f"one of {', '.join(map(str, limits['choices']))}" if "choices" in limits else _name(kind)
        raise UserError(f"{path}: expected {one_of}, found {_found(value)}{_meant(kind, value)}")
    if "choices" in limits and value not in limits["choices"]:
        near = nearest(value, map(str, limits["choices"]))
        hint = f" (did you mean '{near}'?)" if near else ""
        raise UserError(f"{path}: {shown(value)} is not one of {', '.join(map(str, limits['choices']))}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path}: {value} is not a number to work with")
    for word, bad in (("min", lambda b: value < b), ("max", lambda b: value > b), ("above", lambda b: value <= b)):
        if word in limits and bad(limits[word]):
            says = {"min": "at least", "max": "at most", "above": "above"}[word]
            raise UserError(f"{path}: must be {says} {limits[word]}, found {value}")
    return value


def _meant(kind: Any, value: object) -> str:
    """The end of a message about a value of another type: how to write the number that it seems to be."""
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) < LARGEST:
        return f"; write {int(value)}"
    if kind not in (int, float) or not isinstance(value, str):
        return ""
    text = value.strip()
    if (_DECIMAL if kind is int else _FLOAT).match(text) or (kind is float and _DECIMAL.match(text)):
        return "; take the quotes away" if text == value else "; write the number alone"
    if number := number_meant(text, kind is int):
        return f"; write {number}"
    return "; write the number alone, in plain digits" if re.match("[-+]?[0-9.]", text) else ""


def _as_list(inner: Any, value: object) -> str:
    """The end of a message about a value in place of a list of ``inner``: how to write it as one."""
    if dataclasses.is_dataclass(inner) and isinstance(value, str) and dataclasses.fields(inner)[0].name == "path":
        return f"; write [{{path: {value}}}]"
    if inner is str and isinstance(value, str):
        words = [word for word in re.split(r"[,;\s]+", value) if word]
        plain = all(re.fullmatch(r"[\w./-]+", word) for word in words)
        return f"; write [{printable(', '.join(words), 200)}]" if words and plain else ""
    return f"; write [{value}]" if inner in (int, float) and _is(value, inner) else ""


def _plain(kind: Any) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return Mapping
    return origin or kind


def _is(value: object, kind: Any) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, kind)


def _name(kind: object) -> str:
    names: dict[object, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    names[dict] = "a mapping"
    return names.get(kind, str(kind))


def _found(value: object) -> str:
    return f"{type(value).__name__} {shown(value)}" if value is not None else "nothing"
