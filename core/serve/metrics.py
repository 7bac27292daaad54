"""Metrics of the server in Prometheus' text format (``/metrics``), counted in the event loop's thread."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

PREFIX = "tele_"
FIRST_TOKEN_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
NEXT_TOKEN_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
WHOLE_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)


class Histogram:
    """How many values lay at or below each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def mean(self) -> float:
        """0 before the first value."""
        return self._sum / max(1, sum(self._counts))

    def lines(self, name: str) -> Iterable[str]:
        below = 0
        for bound, count in zip((*map(_number, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {_number(self._sum)}"
        yield f"{name}_count {below}"


class Metrics:
    """``requests``: by (endpoint, outcome). ``prompt_tokens`` are those of requests that came to an end: computed, and
    found in the cache. ``generated`` tokens count as they are made."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.computed_tokens = self.cached_tokens = self.generated_tokens = 0
        self.first_token, self.next_token, self.whole = (
            Histogram(FIRST_TOKEN_BOUNDS_S),
            Histogram(NEXT_TOKEN_BOUNDS_S),
            Histogram(WHOLE_BOUNDS_S),
        )

    def text(self, now: Mapping[str, tuple[str, str, float]]) -> str:
        """The page; ``now``: further values, name -> (kind, what it is, value)."""
        lines = _head("requests_total", "counter", "Requests that are over, by endpoint and outcome.")
        for (endpoint, outcome), count in sorted(self.requests.items()):
            lines.append(f'{PREFIX}requests_total{{endpoint="{endpoint}",outcome="{outcome}"}} {count}')
        for name, (kind, what, value) in now.items():
            lines += [*_head(name, kind, what), f"{PREFIX}{name} {_number(value)}"]
        lines += _head("prompt_tokens_total", "counter", "Prompt tokens of finished requests.")
        lines.append(f'{PREFIX}prompt_tokens_total{{source="computed"}} {self.computed_tokens}')
        lines.append(f'{PREFIX}prompt_tokens_total{{source="cache"}} {self.cached_tokens}')
        lines += _head("generated_tokens_total", "counter", "Tokens made.")
        lines.append(f"{PREFIX}generated_tokens_total {self.generated_tokens}")
        for name, what, histogram in (
            ("first_token_seconds", "From the arrival of a request to its first token.", self.first_token),
            ("next_token_seconds", "Between two tokens of an answer.", self.next_token),
            ("request_seconds", "From the arrival of a request to the end of its last answer.", self.whole),
        ):
            lines += [*_head(name, "histogram", what), *histogram.lines(PREFIX + name)]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {what}", f"# TYPE {PREFIX}{name} {kind}"]


def _number(value: float) -> str:
    return f"{value:.10g}"
