"""Matching of regular expressions that come with other people's files, in bounded time.

Python's ``re`` tries one way through an expression after the other, and their number can grow exponentially with the
text. Here the positions that all ways lead to are followed together, as the bits of one integer (Thompson's simulation
of an automaton): bit p is set when some way has matched the text up to position p. A repetition then takes at most as
many rounds as the text has characters, and what it costs is known before anything is matched. Whether there is a match
is the same question for both, since greedy and lazy repetition differ only in what they capture.

Expressions are parsed by ``re`` itself. What cannot be followed so is refused: references to groups, looking behind,
\\B, possessive and atomic parts, flags, and repetition nested more than DEPTH times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from re import _parser  # type: ignore[attr-defined]  # the parser of ``re``; its tree has no public name
from typing import Any

LEVELS = 50  # groups inside one another
DEPTH = 2  # repetitions (and looking ahead) inside one another
NESTED = 50  # cost of a repetition inside another: about as many rounds as a name has characters

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
}
_STARTS, _ENDS = ("AT_BEGINNING", "AT_BEGINNING_STRING"), ("AT_END", "AT_END_STRING")
_BOUNDARY = "AT_BOUNDARY"  # of a word
_CHARS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
_AHEAD = ("ASSERT", "ASSERT_NOT")

Node = tuple[Any, Any]  # operator and its argument, as in the parser's tree


def expression_cost(text: str) -> int:
    """What following an expression costs: 0 for characters and dots alone, else 1 and one for each repetition, or
    NESTED inside another. ValueError for an expression that is none, or that is not followed here."""
    try:
        tree = _parse(text)
        cost = _cost(tree, 0)
        matches(text, "")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is not a regular expression ({error})") from None
    return cost + (not _is_plain(tree))


def matches(text: str, name: str) -> bool:
    """Whether a checked expression matches the whole of ``name``, as ``re.fullmatch`` (names have one line)."""
    return bool(_follow(_parse(text), _Name(name), 1) >> len(name))


def matches_ending(text: str, name: str) -> bool:
    """Whether it matches ``name`` or what follows one of its dots, as ``re.match(rf"(.*\\.)?({text})$", name)``."""
    tree = _parse(text)
    if tree and _is_plain(tree):  # of a known length, as in files that name every layer
        begin = len(name) - len(tree)
        return (begin == 0 or begin > 0 and name[begin - 1] == ".") and re.fullmatch(text, name[begin:]) is not None
    starts = 1 | sum(1 << place for place, char in enumerate(name, 1) if char == ".")
    return bool(_follow(tree, _Name(name), starts) >> len(name))


class _Name:
    """A text, and where each character of an expression fits into it."""

    def __init__(self, text: str) -> None:
        self.text, self.length = text, len(text)
        self._places: dict[tuple[str, int], int] = {}

    def places(self, kind: str, value: Any) -> int:
        key = (kind, value if isinstance(value, int) else id(value))
        if key not in self._places:
            test = _char_test(kind, value)
            self._places[key] = sum(1 << place for place, char in enumerate(self.text) if test(char))
        return self._places[key]

    @property
    def boundaries(self) -> int:
        """Positions between a character of a word and one of none, or an end of the text."""
        words = sum(1 << place for place, char in enumerate(self.text) if _CATEGORIES["CATEGORY_WORD"](char))
        return words ^ words << 1


@lru_cache(maxsize=4096)
def _parse(text: str) -> list[Node]:
    tree = _parser.parse(text)
    if tree.state.flags & ~re.UNICODE:
        raise re.error("flags are not read")
    return list(tree)


def _is_plain(tree: list[Node]) -> bool:
    return all(str(operator) in ("LITERAL", "ANY") for operator, _ in tree)


def _cost(nodes: Iterable[Node], depth: int, level: int = 0) -> int:
    """The repetitions of ``nodes``, by their depth; ValueError for what is not followed."""
    if depth > DEPTH:
        raise ValueError(f"nests repetition more than {DEPTH} times")
    if level > LEVELS:
        raise ValueError(f"nests more than {LEVELS} groups")
    cost, level = 0, level + 1
    for operator, value in nodes:
        kind = str(operator)
        if kind in _CHARS:
            _char_test(kind, value)
        elif kind == "BRANCH":
            cost += sum(_cost(branch, depth, level) for branch in value[1])
        elif kind == "SUBPATTERN" and not value[1] and not value[2]:
            cost += _cost(value[3], depth, level)
        elif kind in _REPEATS:
            again = int(value[1]) > 1
            cost += _cost(value[2], depth + again, level) + again * (NESTED if depth else 1)
        elif kind in _AHEAD and value[0] == 1:
            cost += _cost(value[1], depth + 1, level) + (NESTED if depth else 1)
        elif not (kind == "AT" and str(value) in (*_STARTS, *_ENDS, _BOUNDARY)):
            raise ValueError("holds what is not read here (a reference, looking behind, flags)")
    return cost


def _follow(nodes: Iterable[Node], name: _Name, places: int) -> int:
    """The positions after ``nodes``, from each of ``places``."""
    for operator, value in nodes:
        if not places:
            return 0
        kind = str(operator)
        if kind in _CHARS:
            places = (places & name.places(kind, value)) << 1
        elif kind == "BRANCH":
            found = 0
            for branch in value[1]:
                found |= _follow(branch, name, places)
            places = found
        elif kind == "SUBPATTERN":
            places = _follow(value[3], name, places)
        elif kind in _REPEATS:
            places = _repeat(int(value[0]), int(value[1]), value[2], name, places)
        elif kind in _AHEAD:
            wanted = kind == "ASSERT"
            each = (place for place in range(name.length + 1) if places >> place & 1)
            places = sum(1 << place for place in each if bool(_follow(value[1], name, 1 << place)) == wanted)
        elif str(value) == _BOUNDARY:
            places &= name.boundaries
        else:
            places &= 1 if str(value) in _STARTS else 1 << name.length
    return places


def _repeat(least: int, most: int, item: Iterable[Node], name: _Name, places: int) -> int:
    # No position moves left, so after length + 1 rounds only those that an empty match keeps are there, and stay.
    rounds = name.length + 1
    for _ in range(min(least, rounds)):
        places = _follow(item, name, places)
    found = places
    for _ in range(min(most - least, rounds)):
        places = _follow(item, name, places)
        if not places & ~found:  # nothing new: further rounds find nothing new either
            break
        found |= places
    return found


def _char_test(kind: str, value: Any) -> Callable[[str], bool]:
    """Whether one character is matched; ValueError for a class that is not read."""
    if kind == "LITERAL":
        return lambda char: ord(char) == value
    if kind == "NOT_LITERAL":
        return lambda char: ord(char) != value
    if kind == "ANY":
        return lambda char: char != "\n"
    negated = str(value[0][0]) == "NEGATE"
    tests = [_item_test(str(operator), one) for operator, one in value[negated:]]
    return lambda char: any(test(char) for test in tests) != negated


def _item_test(kind: str, value: Any) -> Callable[[str], bool]:
    if kind == "LITERAL":
        return lambda char: ord(char) == value
    if kind == "RANGE":
        return lambda char: value[0] <= ord(char) <= value[1]
    name = str(value).replace("_NOT_", "_")
    if kind != "CATEGORY" or name not in _CATEGORIES:
        raise ValueError("holds a class of characters that is not read here")
    return lambda char: _CATEGORIES[name](char) == ("_NOT_" not in str(value))
