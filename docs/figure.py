"""The figure of the README: two twins around one core, as SVG in English and in Chinese.

`python docs/figure.py` writes docs/twins.svg and docs/twins.zh.svg; a test compares them with what it would write.
The colours follow the reader's light or dark mode by a media query inside the file, so one file serves both; text is
drawn by the reader's own fonts, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 860, 330
STYLE = """
  text { font: 14px system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; fill: #1f2328 }
  .title { font-weight: 600; font-size: 16px } .mono { font-family: ui-monospace, monospace }
  .small { font-size: 12.5px; fill: #59636e }
  .box { fill: #f6f8fa; stroke: #818b98; stroke-width: 1.2 }
  .ms { fill: #ddf4ff; stroke: #0969da } .pt { fill: #fff1e5; stroke: #bc4c00 } .core { fill: #dafbe1; stroke: #1a7f37 }
  .line { stroke: #59636e; stroke-width: 1.6; fill: none; marker-end: url(#tip) } .tip { fill: #59636e }
  .equal { stroke: #8250df; stroke-width: 2; stroke-dasharray: 5 4; fill: none } 
  .equals { fill: #8250df; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .box { fill: #151b23; stroke: #656c76 }
    .ms { fill: #0c2d4d; stroke: #4493f8 } .pt { fill: #3d2210; stroke: #f0883e }
    .core { fill: #0f2f1a; stroke: #3fb950 }
    .line { stroke: #9198a1 } .tip { fill: #9198a1 } .equal { stroke: #ab7df8 } .equals { fill: #ab7df8 }
  }"""

ENGLISH = {
    "alt": "Two twins, telechat_ms in MindSpore and pt_reference in PyTorch, around one core",
    "in": ("releases", "Hugging Face, MindFormers"),
    "data": ("text and dialogues", "packed once, one order"),
    "configs": ("one YAML file", "model, data, recipe, layout"),
    "ms": ("MindSpore, for Ascend", "model, kernels, parallelism"),
    "pt": ("PyTorch, for GPUs", "the same files and names"),
    "core": ("framework-neutral", "config, data order, checkpoints,", "layouts, server, comparison"),
    "equal": "every operator, gradient and step compared",
    "out": ("one checkpoint", "resume in the other twin, at another layout, or larger"),
}
CHINESE = {
    "alt": "两个孪生实现：MindSpore 的 telechat_ms 与 PyTorch 的 pt_reference，围绕同一个内核",
    "in": ("官方发布的权重", "Hugging Face、MindFormers"),
    "data": ("文本与对话", "打包一次，顺序相同"),
    "configs": ("一个 YAML 文件", "模型、数据、配方、布局"),
    "ms": ("MindSpore，面向昇腾", "模型、算子、并行"),
    "pt": ("PyTorch，面向 GPU", "文件与名称一一对应"),
    "core": ("与框架无关", "配置、数据顺序、检查点、", "布局、服务、比较"),
    "equal": "每个算子、每个梯度、每一步都做比较",
    "out": ("同一种检查点", "可在另一实现、另一布局或更大的模型上继续"),
}


def box(x: int, y: int, width: int, height: int, kind: str, title: str, lines: tuple[str, ...], mono: str = "") -> str:
    """A box with a centred title, perhaps a folder's name, and smaller lines."""
    middle = x + width // 2
    rows = [f'<rect class="box {kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="9"/>']
    at = y + (height - 20 * (len(lines) + 1 + bool(mono))) // 2 + 15
    if mono:
        rows.append(f'<text class="title mono" x="{middle}" y="{at}" text-anchor="middle">{mono}</text>')
        at += 21
    style = "" if mono else ' class="title"'
    rows.append(f'<text{style} x="{middle}" y="{at}" text-anchor="middle">{title}</text>')
    for n, line in enumerate(lines, 1):
        rows.append(f'<text class="small" x="{middle}" y="{at + 19 * n}" text-anchor="middle">{line}</text>')
    return "\n".join(rows)


def arrow(*points: tuple[int, int]) -> str:
    """A line through points, with a tip at its end."""
    return f'<path class="line" d="M{" L".join(f"{x} {y}" for x, y in points)}"/>'


def figure(words: dict[str, str | tuple[str, ...]]) -> str:
    """The SVG with the words of one language."""

    def titled(x: int, y: int, width: int, height: int, name: str, kind: str = "", mono: str = "") -> str:
        title, *lines = words[name]
        return box(x, y, width, height, kind, title, tuple(lines), mono)

    parts = [
        titled(30, 10, 230, 56, "in"),
        titled(315, 10, 230, 56, "data"),
        titled(600, 10, 230, 56, "configs"),
        arrow((145, 66), (370, 104)),
        arrow((430, 66), (430, 104)),
        arrow((715, 66), (490, 104)),
        titled(30, 118, 230, 92, "ms", "ms", "telechat_ms/"),
        titled(315, 108, 230, 112, "core", "core", "core/"),
        titled(600, 118, 230, 92, "pt", "pt", "pt_reference/"),
        arrow((315, 164), (264, 164)),
        arrow((545, 164), (596, 164)),
        '<path class="equal" d="M145 210 L145 240 L715 240 L715 210"/>',
        f'<text class="equals" x="430" y="234" text-anchor="middle">= {words["equal"]} =</text>',
        arrow((430, 240), (430, 262)),
        titled(205, 266, 450, 56, "out"),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{words["alt"]}">'
    )
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
    )
    return "\n".join([head, f"<title>{words['alt']}</title>", f"<style>{STYLE}\n</style>", tip, *parts, "</svg>", ""])


def pages() -> dict[Path, str]:
    """Path -> content of both files."""
    here = Path(__file__).resolve().parent
    return {here / "twins.svg": figure(ENGLISH), here / "twins.zh.svg": figure(CHINESE)}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
