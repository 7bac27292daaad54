"""Hooks of the documentation's site: links that lead out of docs/, which the site does not hold, and a search in each
language of its own.

On a page of the repository `../README.md` is the front page; on the site that is index. Other files of the repository
are named, not linked.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Protocol

from mkdocs.plugins import event_priority

CHINESE = "zh/"  # folder of the Chinese pages
INDEX = Path("search") / "search_index.json"

OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([\w./-]*)(?:#[\w-]*)?\)")


class File(Protocol):
    src_uri: str
    dest_uri: str


class Page(Protocol):
    file: File


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """The page's text with links into the repository replaced; links within docs/ stay."""
    folder = page.file.src_uri.count("/")

    def inside(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        if found[0].count("../") <= folder:  # from reference/ to a page of docs/
            return found[0]
        if target in ("README.md", "README.zh.md"):
            return f"[{text}]({'index.zh.md' if target.endswith('.zh.md') else 'index.md'})"
        return f"{text} (`{target}`)"

    return OUTSIDE.sub(inside, markdown)


def on_post_page(output: str, page: Page, **_: object) -> str:
    """The page without its head's list of translations, for each of which Material's script would ask the host for a
    site map that is not there; the menu of languages stays. A Chinese page searches below its own folder."""
    output = re.sub(r"<link rel=\"?alternate\"?[^>]*>", "", output)
    if not page.file.dest_uri.startswith(CHINESE):
        return output
    # Material's script takes the index from `base`, and what it finds leads from there.
    return re.sub(r'("base": ")([./]+)"', lambda found: f'{found[1]}{_one_up(found[2])}"', output, count=1)


def _one_up(base: str) -> str:
    """The way from a page to the folder of its language, from that to the site's: one step less."""
    return base.removesuffix("..").removesuffix("/") or "."


@event_priority(-100)  # after the search plugin has written the index
def on_post_build(config: dict[str, Any], **_: object) -> None:
    """Divide the index of the search: English pages find English ones, Chinese pages Chinese ones."""
    site = Path(config["site_dir"])
    index = json.loads((site / INDEX).read_text(encoding="utf-8"))
    found = [entry for entry in index["docs"] if entry["location"].startswith(CHINESE)]
    if not found:
        return  # this build's other language is still to come
    parts = {
        site / INDEX: [entry for entry in index["docs"] if not entry["location"].startswith(CHINESE)],
        site / CHINESE / INDEX: [{**entry, "location": entry["location"].removeprefix(CHINESE)} for entry in found],
    }
    for path, entries in parts.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**index, "docs": entries}, ensure_ascii=False), encoding="utf-8")
