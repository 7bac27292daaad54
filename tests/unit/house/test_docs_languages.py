"""Every page in English and Chinese: the same headings, code blocks, tables and pictures, and no page left out."""

from __future__ import annotations

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


RIGHT = "# 标题\n\n这是一个已经翻译好的页面，见[另一页](b.zh.md)。\n\n```bash\nmake test  # 说明\n```\n\n| 甲 |\n|---|\n| 乙 |\n\n![图](p.zh.svg)\n"
ENGLISH = "# Title\n\nA page, see [another](b.md).\n\n```bash\nmake test  # a remark\n```\n\n| a |\n|---|\n| b |\n\n![picture](p.svg)\n"
PLANTED = [
    (("# 标题", "## 标题"), "headings differ"),
    (("make test", "make demo"), "code blocks differ"),
    (("| 乙 |\n", ""), "tables differ"),
    (("p.zh.svg", "q.svg"), "pictures differ"),
    (("b.zh.md", "b.md"), "its Chinese page is b.zh.md"),
    (("这是一个已经翻译好的页面，", "This page has been left in English, all of its words, as it was "), "is not translated"),
]


@pytest.mark.parametrize(("change", "says"), PLANTED, ids=[says for _, says in PLANTED])
def test_a_planted_fault_is_found(change: tuple[str, str], says: str, tmp_path: Path) -> None:
    for name, text in (("a.md", ENGLISH), ("b.md", ENGLISH), ("a.zh.md", RIGHT), ("b.zh.md", RIGHT)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert translation_faults(tmp_path, "a.md", "a.zh.md") == []
    (tmp_path / "a.zh.md").write_text(RIGHT.replace(*change), encoding="utf-8")
    if "English" in change[1]:
        (tmp_path / "a.zh.md").write_text(RIGHT.replace("，见[另一页](b.zh.md)。", "").replace(change[0][:-1], change[1]), encoding="utf-8")
    complaints = translation_faults(tmp_path, "a.md", "a.zh.md")
    assert any(says in complaint for complaint in complaints), complaints


def test_a_missing_translation_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(ENGLISH, encoding="utf-8")
    assert translation_faults(tmp_path, "a.md", "a.zh.md") == ["a.md: has no translation a.zh.md"]
