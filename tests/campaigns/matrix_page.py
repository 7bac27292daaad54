"""docs/matrix.md and docs/matrix.zh.md, written from the results of tests/campaigns/matrix.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.campaigns.matrix_cells import CELLS
from tests.house import ROOT


def write_pages(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the table of results between the marks of both pages; the text around it stays."""
    for page, words in (("matrix.md", _ENGLISH), ("matrix.zh.md", _CHINESE)):
        file = ROOT / "docs" / page
        text = file.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        file.write_text(f"{before}{BEGIN}\n{_table(results, words)}{END}{after}", encoding="utf-8")


BEGIN, END = "<!-- results -->", "<!-- end of results -->"
_ENGLISH = ("cell", "versions", "passed", "failed", "skipped", "processor minutes", "not run", "cannot be installed")
_CHINESE = ("环境", "版本", "通过", "失败", "跳过", "处理器分钟", "未运行", "无法安装")


def _table(results: Mapping[str, Mapping[str, Any]], words: tuple[str, ...]) -> str:
    lines = ["| " + " | ".join(words[:6]) + " |", "|---|---|---|---|---|---|"]
    for cell in CELLS:
        found = results.get(cell.name)
        if found is None or not found["versions"]:
            lines.append(f"| {cell.name} | {', '.join(cell.packages)} | {words[6 if found is None else 7]} | | | |")
            continue
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        counts = found["tests"] - len(found["failed"]), len(found["failed"]), found["skipped"]
        lines.append(f"| {cell.name} | {versions} | {' | '.join(map(str, counts))} | {found['processor_s'] / 60:.1f} |")
    return "\n".join(lines) + "\n"
