"""Hooks of the documentation's site: links that lead out of docs/, which the site does not hold.

On a page of the repository `../README.md` is the front page; on the site that is index. Other files of the repository
are named, not linked.
"""

from __future__ import annotations

import re
from typing import Protocol

OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([\w./-]*)(?:#[\w-]*)?\)")


class File(Protocol):
    src_uri: str


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


def on_post_page(output: str, **_: object) -> str:
    """The page without its head's list of translations, for each of which Material's script would ask the host for a
    site map that is not there; the menu of languages stays."""
    return re.sub(r"<link rel=\"?alternate\"?[^>]*>", "", output)
