"""What is wrong with YAML that does not parse, in words for whoever typed it: the parser names what it met instead."""

from __future__ import annotations

import re
import unicodedata

BACK = 3  # lines before the parser's in which a slip is looked for: it notices a missing ": " one line later
_START = r"^\s*(?:-\s+)?"
_KEY = r"[A-Za-z_][\w.-]*"
_CONFLICT = re.compile(r"^(<{7} |={7}$|>{7} )", re.MULTILINE)
_TAB_INDENT = re.compile(r"^ *\t")
_WIDE_COLON = re.compile(rf"{_START}({_KEY})\s*[：﹕∶]")
_EQUALS = re.compile(rf"{_START}({_KEY})\s*=\s*(\S.*)?$")
_NO_SPACE = re.compile(rf"{_START}({_KEY}):(?!//)[^\s:]")
_QUOTED = re.compile(r""""[^"]*"|'[^']*'""")
_TAB = re.compile(rf"{_START}{_KEY}:\t")
# The parser's words -> ours, where no line shows a slip of its own.
_SAID = {
    "mapping values are not allowed here": "'key: value' behind or below a value that is already complete; check the "
    "indentation and the quotes",
    "expected <block end>, but found '<block mapping start>'": "indented differently from the lines of its section",
    "expected <block end>, but found '-'": "an entry of a list among the keys of a section; check the indentation",
    "but found another document": "a second document, after '---'; one file holds one",
}


def explained(reason: str, text: str, line: int, begun: int | None) -> tuple[int, str]:
    """(line, reason) for a message about ``text``, of which the parser said ``reason`` at ``line`` (from 1).

    ``begun``: the line at which what it was reading began, where it says so.
    """
    lines = text.split("\n")
    if conflict := _CONFLICT.search(text):
        return text.count("\n", 0, conflict.start()) + 1, "a merge conflict; keep one of its sides"
    if begun is not None and "end of stream" in reason:
        return begun, "a quote that is not closed"
    if begun is not None and reason.startswith("expected ',' or") and (begun < line or "<stream end>" in reason):
        return begun, "a bracket that is not closed"
    seen = 0
    for number in range(min(line, len(lines)), 0, -1):
        if not lines[number - 1].strip():
            continue
        if said := slip(lines[number - 1]):
            return number, said
        seen += 1
        if seen == BACK:
            break
    return line, _SAID.get(reason, reason)


def slip(line: str) -> str | None:
    """The slip that one line shows by itself; None for a line that is well-formed."""
    bare = line.split(" #")[0].rstrip()
    if bare.lstrip().startswith("#"):
        return None
    if _TAB_INDENT.match(bare):
        return "indented by a tab; YAML takes spaces alone"
    if found := _WIDE_COLON.match(bare):
        return f"the colon behind '{found[1]}' is a wide one (中文冒号); write '{found[1]}: '"
    for char in _QUOTED.sub("", bare):
        if char != " " and unicodedata.category(char) == "Zs":
            return f"U+{ord(char):04X}, which looks like a space and is none; type it again"
    if found := _EQUALS.match(bare):
        return f"'{found[1]} =' is no YAML; write '{found[1]}: {found[2] or ''}'".replace(": '", ":'")
    if found := _NO_SPACE.match(bare):
        return f"no space behind '{found[1]}:'"
    if _TAB.match(bare):
        return "a tab behind the colon; write a space"
    return None
