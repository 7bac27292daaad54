"""The content of a parity report, independent of its format: verdict, bounds by section, tables, plots, versions.

Every comparison makes one ``Document``; HTML, JUnit XML and the common part of report.json are written from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from telechat_twins.core.parity.bounds import Bound

Cell = str | float | int
NAMED = 5  # broken bounds that a verdict names; the others it counts


@dataclass(frozen=True)
class Section:
    """One comparison: its title and its bounds."""

    title: str
    bounds: list[Bound]


@dataclass(frozen=True)
class Table:
    """Measured values beside the bounds. Every row has as many cells as ``head``; ``note`` stands above it."""

    title: str
    head: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """One line of a plot. A value that is nan is a gap. ``dots``: separate points instead of a line."""

    label: str
    x: list[float]
    y: list[float]
    dots: bool = False


@dataclass(frozen=True)
class Limit:
    """A horizontal line of a plot at ``value``, from ``start`` to ``stop`` on the x axis."""

    label: str
    value: float
    start: float
    stop: float


@dataclass(frozen=True)
class Plot:
    """Curves over one axis. ``logarithmic``: of the y axis; a value of exactly 0 is then a mark at the lower edge."""

    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    limits: list[Limit] = field(default_factory=list)
    logarithmic: bool = False


@dataclass(frozen=True)
class Document:
    """``kind``: what was compared, "backends", "growth", "records", "runs" or "forward". ``versions``: of the software
    that compared and that was compared. ``notes``: what was not judged, and why."""

    kind: str
    title: str
    facts: dict[str, str]
    versions: dict[str, str]
    sections: list[Section]
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def bounds(self) -> Iterator[tuple[str, Bound]]:
        """Every bound with its section's title."""
        return ((section.title, bound) for section in self.sections for bound in section.bounds)

    @cached_property
    def broken(self) -> list[Bound]:
        """The bounds that do not hold; every part of a report asks for them."""
        return [bound for _, bound in self.bounds() if not bound.holds]

    @cached_property
    def verdict(self) -> str:
        return verdict([bound for _, bound in self.bounds()])


def verdict(bounds: list[Bound]) -> str:
    """One line: whether all bounds hold, how many there are, and the first broken ones by name."""
    broken = [bound.what for bound in bounds if not bound.holds]
    if not broken:
        return f"EQUAL: all {len(bounds)} bounds hold"
    more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    return f"NOT EQUAL: {len(broken)} of {len(bounds)} bounds broken: {'; '.join(broken[:NAMED])}{more}"


def share(bound: Bound) -> float:
    """The measured value over its limit: above 1 is broken. A limit of 0 that holds counts as 0, nan as inf."""
    if bound.holds:
        return bound.value / bound.limit if bound.limit else 0.0
    return bound.value / bound.limit if bound.limit and math.isfinite(bound.value) else math.inf
