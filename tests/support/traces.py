"""Judge of a trace in the Trace Event Format (JSON), strict where Perfetto would drop or misplace an event.

What must hold of each kind of event is what Perfetto's importer (src/trace_processor/importers/json in its repository)
asks of it before it makes a row of it: it counts the others as failures, and shows slices of one thread only where they
nest. Perfetto itself, a program that its Python package downloads, is not run here.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NoReturn

Event = dict[str, Any]

SECONDS = 600  # longer than any step here
LARGEST_ID = 2**32  # of a process or thread; the importer keeps 32 bits
INSTANT_SCOPES = {"g", "p", "t"}
ROUNDING = 0.002  # microseconds by which torch's profiler, which writes nanoseconds as decimals, may let slices overlap


def check_trace(path: Path) -> list[Event]:
    """The complete events ("X") of a trace whose form is right; AssertionError otherwise. Times are in microseconds."""
    trace = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_json)
    assert isinstance(trace, dict) and trace.get("displayTimeUnit", "ns") in ("ms", "ns")
    events = trace["traceEvents"]
    assert isinstance(events, list) and events
    open_slices: dict[tuple[Any, Any], int] = defaultdict(int)
    for event in events:
        _check_event(event)
        thread = (event.get("pid"), event.get("tid"))
        open_slices[thread] += {"B": 1, "E": -1}.get(event["ph"], 0)
        assert open_slices[thread] >= 0, f"ends what has not begun: {event}"
    assert not any(open_slices.values()), "slices that never end"
    complete = [event for event in events if event["ph"] == "X"]
    assert complete
    _check_nesting(complete)
    return complete


def _no_json(text: str) -> NoReturn:
    raise AssertionError(f"{text} is no JSON")


def _check_event(event: Event) -> None:
    phase = event["ph"]
    assert phase in KINDS, event
    assert isinstance(event.get("name", ""), str) and isinstance(event.get("cat", ""), str), event
    assert event.get("args") is None or isinstance(event["args"], dict), event
    for key in ("pid", "tid"):
        number = event.get(key, 0)
        assert isinstance(number, str) or type(number) is int and 0 <= number < LARGEST_ID, event
    if phase != "M":
        assert _time(event.get("ts")), event
    KINDS[phase](event)


def _time(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0  # type: ignore[arg-type]


def _complete(event: Event) -> None:
    assert _time(event.get("dur")) and event["dur"] < SECONDS * 1e6, event
    assert "pid" in event and "tid" in event, event


def _asynchronous(event: Event) -> None:
    assert "pid" in event and ("id" in event or event.get("id2")), event


def _instant(event: Event) -> None:
    assert event.get("s", "t") in INSTANT_SCOPES, event
    assert ("pid" in event) if event.get("s") == "p" else event.get("s") == "g" or "tid" in event, event


def _flow(event: Event) -> None:
    number = event.get("id")
    assert type(number) is int and number >= 0 or isinstance(number, str) and int(number, 16) >= 0, event


def _counter(event: Event) -> None:
    assert event.get("args") and all(type(value) in (int, float) for value in event["args"].values()), event


def _named(event: Event) -> None:
    if event["name"] in ("thread_name", "process_name"):
        assert isinstance(event["args"]["name"], str) and event["args"]["name"], event


def _synchronous(event: Event) -> None:
    assert "pid" in event and "tid" in event, event


KINDS = {
    **dict.fromkeys("X", _complete),
    **dict.fromkeys("BE", _synchronous),
    **dict.fromkeys("ben", _asynchronous),
    **dict.fromkeys("iIR", _instant),
    **dict.fromkeys("stf", _flow),
    "C": _counter,
    "M": _named,
}


def _check_nesting(complete: list[Event]) -> None:
    """The slices of one thread lie apart or one inside the other."""
    threads = defaultdict(list)
    for event in complete:
        threads[event["pid"], event["tid"]].append(event)
    for slices in threads.values():
        slices.sort(key=lambda event: (event["ts"], -event["dur"]))
        ends: list[float] = []
        for event in slices:
            while ends and ends[-1] <= event["ts"] + ROUNDING:
                ends.pop()
            end = event["ts"] + event["dur"]
            assert not ends or end <= ends[-1] + ROUNDING, f"begins inside a slice and ends after it: {event}"
            ends.append(end)
