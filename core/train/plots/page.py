"""One self-contained HTML page of runs laid side by side, with zoom; it loads nothing, and its policy forbids it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.train.plots.picture import COLOURS
from telechat_twins.core.train.plots.series import Panel

_HERE = Path(__file__).parent


def to_page(panels: Sequence[Panel], title: str, x_label: str, marks: Mapping[float, str]) -> str:
    """The whole page."""
    code = (_HERE / "page.js").read_text(encoding="utf-8")
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    data = {
        "xLabel": x_label,
        "colours": COLOURS,
        "marks": [[x, text] for x, text in marks.items()],
        "panels": [
            {
                "title": panel.title,
                "log": panel.logarithmic,
                "curves": [{"label": c.label, "x": _finite(c.x), "y": _finite(c.y)} for c in panel.curves],
            }
            for panel in panels
        ],
    }
    # "<" must not end the script element early: a label may hold "</script>".
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{name}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n'
        f"<h1>{name}</h1>\n"
        '<p class="help">Drag across a plot to zoom in on its steps; double-click, or Escape, to see all. '
        "Click a run's name to hide it.</p>\n"
        '<div class="bar"><span id="runs" role="group" aria-label="runs"></span>\n'
        '<label>smooth <input id="smooth" type="range" min="0" max="0.99" step="0.01" value="0"></label>\n'
        '<button id="all" type="button">all steps</button></div>\n<main id="plots"></main>\n'
        f'<script type="application/json" id="data">{text}</script>\n<script>{code}</script>\n</body>\n</html>\n'
    )


def write_page(panels: Sequence[Panel], title: str, x_label: str, marks: Mapping[float, str], path: Path) -> None:
    """Write the page."""
    write_text(path, to_page(panels, title, x_label, marks))


def _finite(values: Sequence[float]) -> list[float | None]:
    """JSON has no nan: a gap is null. Seven digits are more than a screen can show."""
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]
