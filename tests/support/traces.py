"""Judge of a trace in the Trace Event Format, as Perfetto's importer of JSON takes it."""

from __future__ import annotations

from numbers import Real
from typing import Any

PHASES = set("BEXiIbenstfPNODMVvRcC(")  # of the Trace Event Format
SECONDS = 600  # longer than any step here


def check_trace(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The complete events ("X") of a trace whose form is right; AssertionError otherwise. Times are in microseconds."""
    events = trace["traceEvents"]
    assert isinstance(events, list) and events
    complete = []
    for event in events:
        assert isinstance(event.get("name", ""), str) and event["ph"] in PHASES, event
        assert event.get("args") is None or isinstance(event["args"], dict), event
        if event["ph"] != "M":
            assert isinstance(event["ts"], Real) and not isinstance(event["ts"], bool), event
        if event["ph"] == "X":
            assert isinstance(event["dur"], Real) and 0 <= event["dur"] < SECONDS * 1e6, event
            assert "pid" in event and "tid" in event, event
            complete.append(event)
    assert complete
    return complete
