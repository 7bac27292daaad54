"""Fonts of plots: names of runs may be Chinese, and matplotlib's own font has no such characters."""

from __future__ import annotations

import warnings

# Families with Chinese characters, as Linux distributions, macOS and Windows bring them.
CHINESE = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Heiti SC", "Microsoft YaHei", "SimHei"),
)


def any_script() -> None:
    """Let labels be in Chinese, too, from now on in this process: by the first such font that is installed.

    Where none is, a character is a box, of which matplotlib would warn at every refresh of the picture; a run's folder
    says what it stands for.
    """
    import matplotlib
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans", *(name for name in CHINESE if name in installed)]
    matplotlib.rcParams["font.family"] = ["sans-serif"]
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
