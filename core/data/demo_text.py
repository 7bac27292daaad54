"""Demo corpus available wherever Python is: its documentation and sources, and Chinese pages of this project."""

from __future__ import annotations

import json
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files import ROOT
from telechat_twins.core.files.atomic import write_text

CHINESE_PAGES = ("docs/tour.zh.md", "docs/maturity.zh.md", "docs/telechat2.zh.md")
CODE_BYTES = 600_000


def write_demo_text(folder: Path) -> dict[str, Path]:
    """Write english.jsonl, code.jsonl and chinese.jsonl, rows {"text"}, under ``folder``; name -> file."""
    documents = {"english": _topics(), "code": _standard_library(), "chinese": _chinese()}
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, texts in documents.items():
        files[name] = folder / f"{name}.jsonl"
        write_text(files[name], "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
    return files


def _topics() -> Iterable[str]:
    """The language reference as `help()` shows it, one document a topic."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def _standard_library() -> Iterable[str]:
    """The first modules by name, up to CODE_BYTES."""
    total = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        total += len(text)
        if total > CODE_BYTES:
            return
        yield text


def _chinese() -> Iterable[str]:
    """Our own pages in Chinese, one document a section."""
    for name in CHINESE_PAGES:
        path = ROOT / name
        if not path.is_file():
            raise UserError(f"{path}: missing; install the package again, or give the demo text with --data")
        yield from (part.strip() for part in path.read_text(encoding="utf-8").split("\n## ") if part.strip())
