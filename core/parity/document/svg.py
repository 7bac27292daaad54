"""Plots of a parity report as inline SVG, which needs no library and follows the page's colours.

The legend is HTML below the picture, so that it covers no curve and no limit. On a logarithmic axis an exact zero has
no place: the curve has a gap there, and the step a mark on the lower edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape

from telechat_twins.core.parity.document.model import Curve, Plot
from telechat_twins.core.shown import printable

WIDTH, HEIGHT = 480, 300  # of the view box: at a phone's width, text of size 13 is about 10 pixels high
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 40
MOST_POINTS = 400  # of a curve: more than one a pixel shows nothing
COLORS = 6  # classes c0 ... c5 of the style sheet
SMALLEST = 1e-300


@dataclass(frozen=True)
class _Axis:
    """Linear or logarithmic scale from values in [low, high] to view box units in [start, stop]."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.logarithmic else (self.low, self.high)
        at = math.log10(max(value, SMALLEST)) if self.logarithmic else value
        # A value far outside (an infinite one is dropped before) stays at the edge.
        return self.start + (self.stop - self.start) * min(1.0, max(0.0, (at - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Four to eight round numbers; powers of ten on a logarithmic axis."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            every = max(1, math.ceil((last - first) / 7))
            return [10.0**n for n in range(first, last + 1) if n % every == 0]
        raw = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


@lru_cache(maxsize=8192)  # titles, labels and sources come back in every row
def text(raw: str) -> str:
    """``raw`` for an HTML page: nothing in it is markup or an unprintable character."""
    return escape(printable(raw, None))


def to_figure(plot: Plot) -> str:
    """``<figure>`` with the picture and its legend; a sentence in place of the picture when there is no number."""
    title = f"<h3>{text(plot.title)}</h3>"
    axes = _axes(plot)
    if axes is None:
        return f"<figure>{title}<p>No finite number to draw.</p></figure>"
    x, y = axes
    parts = [*_grid(x, y), *_labels(plot)]
    for limit in plot.limits:
        parts.append(
            f'<line class="limit" x1="{x(limit.start):.1f}" x2="{x(limit.stop):.1f}" '
            f'y1="{y(limit.value):.1f}" y2="{y(limit.value):.1f}"><title>{text(limit.label)}</title></line>'
        )
    for number, curve in enumerate(plot.curves):
        parts += _curve(curve, f"c{number % COLORS}", x, y, plot.logarithmic)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(plot.title)}">{"".join(parts)}</svg>'
    return f"<figure>{title}{svg}<figcaption>{''.join(_legend(plot))}</figcaption></figure>"


def _axes(plot: Plot) -> tuple[_Axis, _Axis] | None:
    points = [(a, b) for curve in plot.curves for a, b in zip(curve.x, curve.y, strict=True)]
    xs = [a for a, _ in points if math.isfinite(a)]
    ys = [b for _, b in points if math.isfinite(b) and not (plot.logarithmic and b <= 0)]
    ys += [limit.value for limit in plot.limits if math.isfinite(limit.value) and limit.value > 0]
    if not xs or not (ys or plot.logarithmic and points):
        return None
    ys = ys or [1.0]  # only exact zeros: any axis will do, all marks are on its edge
    low, high = min(ys), max(ys)
    if plot.logarithmic:
        low, high = 10.0 ** math.floor(math.log10(low) - 0.1), 10.0 ** math.ceil(math.log10(high) + 0.1)
    elif low == high:
        low, high = low - 0.5, high + 0.5
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    return _Axis(x_low, x_high, LEFT, WIDTH - RIGHT), _Axis(low, high, HEIGHT - BOTTOM, TOP, plot.logarithmic)


def _grid(x: _Axis, y: _Axis) -> Iterator[str]:
    for tick in y.ticks():
        at = y(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        label = f"1e{round(math.log10(tick))}" if y.logarithmic else f"{tick:.6g}"
        yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>'
    for tick in x.ticks():
        at = x(tick)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        yield f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:.6g}</text>'


def _labels(plot: Plot) -> Iterator[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{text(plot.x_label)}</text>'
    yield (
        f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">'
        f"{text(plot.y_label)}</text>"
    )


def _curve(curve: Curve, style: str, x: _Axis, y: _Axis, logarithmic: bool) -> Iterator[str]:
    points = list(zip(curve.x, curve.y, strict=True))
    zeros = [a for a, b in points if logarithmic and b == 0.0]
    drawn = [(a, math.nan if logarithmic and not b > 0 or not math.isfinite(b) else b) for a, b in points]
    if curve.dots:
        marks = (f"M{x(a):.1f} {y(b):.1f}h0" for a, b in drawn if not math.isnan(b))
        yield f'<path class="dots {style}" d="{"".join(marks)}"/>'
    else:
        for run in _runs(_thinned(drawn)):
            if len(run) == 1:
                yield f'<path class="dots {style}" d="M{x(run[0][0]):.1f} {y(run[0][1]):.1f}h0"/>'
            else:
                way = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in run)
                yield f'<polyline class="curve {style}" points="{way}"/>'
    if zeros:
        ticks = "".join(f"M{at} {HEIGHT - BOTTOM}v-6" for at in sorted({f"{x(a):.1f}" for a in zeros}, key=float))
        yield f'<path class="zeros {style}" d="{ticks}"/>'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about ``MOST_POINTS`` points that keep the largest and smallest value of each stretch, and its gaps."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if not math.isnan(point[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else {stretch[0]}
        kept += sorted(ends)
    return kept


def _runs(points: Sequence[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    """Stretches without a gap."""
    run: list[tuple[float, float]] = []
    for point in points:
        if not math.isnan(point[1]):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _legend(plot: Plot) -> Iterator[str]:
    for number, curve in enumerate(plot.curves):
        zeros = sum(value == 0.0 for value in curve.y) if plot.logarithmic else 0
        note = f" (exactly equal: {zeros} of {len(curve.y)}, marked below)" if zeros else ""
        style = f"dot c{number % COLORS}" if curve.dots else f"c{number % COLORS}"
        yield f'<span><i class="{style}"></i>{text(curve.label + note)}</span>'
    for limit in plot.limits:
        yield f'<span><i class="limit"></i>{text(limit.label)}</span>'
