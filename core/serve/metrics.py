"""Server metrics in Prometheus' text format (``/metrics``), counted in the event loop's thread."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

PREFIX = "tele_"
FIRST_TOKEN_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
NEXT_TOKEN_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
WHOLE_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)


class Histogram:
    """Prometheus histogram: the number of values up to each bound, and the sum of all values."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def mean(self) -> float:
        """Mean of the values; 0 before the first."""
        return self._sum / max(1, sum(self._counts))

    def lines(self, name: str) -> Iterable[str]:
        below = 0
        for bound, count in zip((*map(_number, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {_number(self._sum)}"
        yield f"{name}_count {below}"


class Metrics:
    """Counters and histograms of the server.

    ``requests``: finished requests by (endpoint, outcome). ``computed_tokens`` and ``cached_tokens``: prompt tokens of
    finished requests. ``generated_tokens`` count as they are generated.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.computed_tokens = self.cached_tokens = self.generated_tokens = 0
        self.first_token, self.next_token, self.whole = (
            Histogram(FIRST_TOKEN_BOUNDS_S),
            Histogram(NEXT_TOKEN_BOUNDS_S),
            Histogram(WHOLE_BOUNDS_S),
        )

    def text(self, now: Mapping[str, tuple[str, str, float]]) -> str:
        """Text of the metrics page; ``now``: further values, name -> (kind, help text, value)."""
        lines = _head("requests_total", "counter", "Finished requests by endpoint and outcome.")
        for (endpoint, outcome), count in sorted(self.requests.items()):
            lines.append(f'{PREFIX}requests_total{{endpoint="{endpoint}",outcome="{outcome}"}} {count}')
        for name, (kind, what, value) in now.items():
            lines += [*_head(name, kind, what), f"{PREFIX}{name} {_number(value)}"]
        lines += _head("prompt_tokens_total", "counter", "Prompt tokens of finished requests.")
        lines.append(f'{PREFIX}prompt_tokens_total{{source="computed"}} {self.computed_tokens}')
        lines.append(f'{PREFIX}prompt_tokens_total{{source="cache"}} {self.cached_tokens}')
        lines += _head("generated_tokens_total", "counter", "Generated tokens.")
        lines.append(f"{PREFIX}generated_tokens_total {self.generated_tokens}")
        for name, what, histogram in (
            ("first_token_seconds", "Time from the arrival of a request to its first token.", self.first_token),
            ("next_token_seconds", "Time between two tokens of an answer.", self.next_token),
            ("request_seconds", "Time from the arrival of a request to the end of its last answer.", self.whole),
        ):
            lines += [*_head(name, "histogram", what), *histogram.lines(PREFIX + name)]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {what}", f"# TYPE {PREFIX}{name} {kind}"]


def _number(value: float) -> str:
    return f"{value:.10g}"
