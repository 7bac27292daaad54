"""Every page in English and Chinese: the same headings, code blocks, tables and pictures, and no page left out."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import pytest

from tests import docs
from tests.docs_languages import translation_faults
from tests.house import ROOT

README_BYTES = 9_000


@pytest.mark.parametrize(("english", "chinese"), docs.PAIRS, ids=[english for english, _ in docs.PAIRS])
def test_a_page_is_translated(english: str, chinese: str) -> None:
    complaints = translation_faults(ROOT, english, chinese)
    assert not complaints, "\n" + "\n".join(complaints)


def test_no_chinese_page_stands_alone() -> None:
    assert {page for page in docs.PAGES if page.endswith(".zh.md")} == {chinese for _, chinese in docs.PAIRS}


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_readme_is_short(page: str) -> None:
    size = len((ROOT / page).read_bytes())
    assert size <= README_BYTES, f"{page} has {size} bytes; what is more than {README_BYTES} belongs to docs/"


ENGLISH = """# Title

A page, see [another](b.md).

```bash
make test  # a remark
```

| a |
|---|
| b |

![picture](p.svg)
"""
RIGHT = """# 标题

这是一个已经翻译好的页面，见[另一页](b.zh.md)。

```bash
make test  # 说明
```

| 甲 |
|---|
| 乙 |

![图](p.zh.svg)
"""
LEFT = "This page has been left in English, all of its words, as it was before."
PLANTED = [
    (("# 标题", "## 标题"), "headings differ"),
    (("make test", "make demo"), "code blocks differ"),
    (("| 乙 |\n", ""), "tables differ"),
    (("p.zh.svg", "q.svg"), "pictures differ"),
    (("b.zh.md", "b.md"), "its Chinese page is b.zh.md"),
    (("这是一个已经翻译好的页面，见[另一页](b.zh.md)。", LEFT), "is not translated"),
]


@pytest.mark.parametrize(("change", "says"), PLANTED, ids=[says for _, says in PLANTED])
def test_a_planted_fault_is_found(change: tuple[str, str], says: str, tmp_path: Path) -> None:
    for name, text in (("a.md", ENGLISH), ("b.md", ENGLISH), ("a.zh.md", RIGHT), ("b.zh.md", RIGHT)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert translation_faults(tmp_path, "a.md", "a.zh.md") == []
    (tmp_path / "a.zh.md").write_text(RIGHT.replace(*change), encoding="utf-8")
    complaints = translation_faults(tmp_path, "a.md", "a.zh.md")
    assert any(says in complaint for complaint in complaints), complaints


def test_a_missing_translation_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(ENGLISH, encoding="utf-8")
    assert translation_faults(tmp_path, "a.md", "a.zh.md") == ["a.md: has no translation a.zh.md"]


def test_every_key_and_option_is_said_in_chinese() -> None:
    """A new help text is translated in docs/reference/words.zh.json, and an old one taken out."""
    reference = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    assert reference["untranslated"]() == []
    for english, chinese in reference["SAID"].items():
        quoted = re.findall(r"`[^`]+`", english)
        assert sorted(quoted) == sorted(re.findall(r"`[^`]+`", chinese)), english


def test_the_reference_and_the_figure_are_what_the_program_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make reference` writes them, the same on a machine with other cores."""
    monkeypatch.setattr(os, "cpu_count", lambda: 61)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(61)))
    reference = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    figure = runpy.run_path(str(ROOT / "docs" / "figure.py"))
    made = reference["pages"]() | figure["pages"]()
    stale = [path.name for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], f"{', '.join(stale)}: run `make reference`"
