"""The chat page: one document, made of its parts in this folder, that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Page:
    """The document, and the sources of Content-Security-Policy for what is in it: the hashes of its style and its
    script, so that nothing else in it can be run."""

    html: str
    policy: str


def chat_page() -> Page:
    """Put the page together: page.html with page.css, and page.js with the texts of words.json."""
    words = json.dumps(json.loads(_read("words.json")), ensure_ascii=False).replace("</", "<\\/")
    style, script = _read("page.css"), f'"use strict";\nconst WORDS = {words};\n{_read("page.js")}'
    html = _read("page.html").replace("/* page.css */", style).replace("/* page.js */", script)
    return Page(
        html,
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'; connect-src 'self'; img-src data:",
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
