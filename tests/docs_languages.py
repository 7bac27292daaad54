"""Chinese pages beside the English ones: what a translation must share with its original.

Kept apart from the tests, like tests/docs.py, so that each rule can be run on planted pages.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests import docs

HAN = re.compile(r"[\u4e00-\u9fff]")
LEAST_HAN = 0.15  # of a Chinese page's characters outside code; names, figures and paths take the rest
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


def translation_faults(root: Path, english: str, chinese: str) -> list[str]:
    """Complaints about a pair of pages: no Chinese page, headings, code blocks, tables or pictures that differ, links
    that lead to an English page though a Chinese one exists, and a page that is mostly not Chinese."""
    if not (root / chinese).is_file():
        return [f"{english}: has no translation {chinese}"]
    complaints = []
    for name, of in (("headings", _headings), ("code blocks", _blocks), ("tables", _tables), ("pictures", _pictures)):
        here, there = of(root, english), of(root, chinese)
        if here != there:
            at = next(
                (n for n, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there))
            )
            complaints.append(
                f"{chinese}: {name} differ from {english}, from number {at + 1}: {_at(here, at)} / {_at(there, at)}"
            )
    complaints += _foreign_links(root, chinese)
    # The tables of reference/ hold help texts as the program prints them.
    return complaints if "/reference/" in chinese else complaints + _untranslated(root, chinese)


def _at(of: list[str], n: int) -> str:
    return repr(of[n][:60]) if n < len(of) else "none"


def _prose(root: Path, page: str) -> list[str]:
    fenced = {n for f in docs.fences(root, page) for n in range(f.line - 1, f.line + len(f.lines) + 1)}
    lines = (root / page).read_text(encoding="utf-8").splitlines()
    return [line for n, line in enumerate(lines, 1) if n not in fenced]


def _headings(root: Path, page: str) -> list[str]:
    """Levels of the headings, in order."""
    return [found[0] for line in _prose(root, page) if (found := re.match(r"#+(?= )", line))]


def _blocks(root: Path, page: str) -> list[str]:
    """Code blocks with their language; comments may be translated."""
    return [
        "\n".join([fence.language, *(re.sub(r"\s+#\s.*$", "", line).rstrip() for line in fence.lines)])
        for fence in docs.fences(root, page)
    ]


def _tables(root: Path, page: str) -> list[str]:
    """For each table its numbers of columns and rows."""
    found: list[list[int]] = []
    rows = 0
    for line in [*_prose(root, page), ""]:
        if line.startswith("|"):
            rows += 1
            if rows == 2:
                found.append([line.count("|") - 1, 0])
            elif rows > 2:
                found[-1][1] += 1
        else:
            rows = 0
    return [f"{columns} columns, {count} rows" for columns, count in found]


def _pictures(root: Path, page: str) -> list[str]:
    """Targets of images; a picture may have a Chinese edition."""
    return [target.replace(".zh.", ".") for line in _prose(root, page) for target in IMAGE.findall(line)]


def _foreign_links(root: Path, page: str) -> list[str]:
    complaints = []
    for line in _prose(root, page):
        for target in re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", line):
            twin = target.replace(".md", ".zh.md")
            own = (root / page.replace(".zh.md", ".md")).resolve()
            file = ((root / page).parent / target).resolve()
            if not target.endswith(".zh.md") and file != own and ((root / page).parent / twin).is_file():
                complaints.append(f"{page}: links to {target}; its Chinese page is {twin}")
    return complaints


def _untranslated(root: Path, page: str) -> list[str]:
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|[\d\s|]", "", "".join(_prose(root, page)))
    share = len(HAN.findall(text)) / max(1, len(text))
    complaints = [] if share >= LEAST_HAN else [f"{page}: only {share:.0%} of its text is Chinese"]
    inside = False  # a block inside a list, which docs.fences leaves out
    for line in _prose(root, page):
        inside ^= line.lstrip().startswith("```")
        if inside or line.startswith("    "):
            continue
        words = re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)
        if not line.startswith(("|", "<")) and not HAN.search(line) and len(re.findall(r"[A-Za-z]{3,}", words)) > 8:
            complaints.append(f"{page}: a line is not translated: {line[:60]}")
    return complaints
