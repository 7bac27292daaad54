"""Timeline of a simulated step: events, a trace that Perfetto and chrome://tracing open, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.planner.time.pipeline import spans
from telechat_twins.core.planner.time.step import StepTime
from telechat_twins.core.planner.time.work import Work
from telechat_twins.core.types import JsonObject

# Kinds of events, with their colours in the picture.
COLOURS = {
    "forward": "#4c78a8",
    "backward": "#f58518",
    "gradient sums": "#b279a2",
    "update": "#54a24b",
    "weight gather": "#e45756",
}


class Event(NamedTuple):
    """``start`` and ``end`` in seconds of the step; ``micro`` and ``chunk`` are -1 outside the pipeline."""

    rank: int
    start: float
    end: float
    name: str
    micro: int
    chunk: int


def events(layout: Layout, work: Work, step: StepTime) -> list[Event]:
    """Events of each pipeline rank (of one data-parallel and tensor rank), by rank and time."""
    shape = layout.schedule, layout.pp, layout.virtual, work.micro_batches
    found = []
    timeline = spans(*shape, step.forward, step.backward, step.message)
    reduced = max(ranks[-1].end + tail.reduce for ranks, tail in zip(timeline, step.tails, strict=True))
    for rank, (ranks, tail) in enumerate(zip(timeline, step.tails, strict=True)):
        for (kind, micro, chunk), start, end in ranks:
            found.append(Event(rank, start, end, "forward" if kind == "F" else "backward", micro, chunk))
        # The norm of all gradients is where all ranks meet before they update.
        done = ranks[-1].end
        for name, start, seconds in (
            ("gradient sums", done, tail.reduce),
            ("update", reduced, tail.update),
            ("weight gather", reduced + tail.update, tail.gather),
        ):
            if seconds > 0.0:
                found.append(Event(rank, start, start + seconds, name, -1, -1))
    return found


def trace(layout: Layout, work: Work, step: StepTime, title: str) -> JsonObject:
    """The step in the Trace Event Format: a row for each pipeline rank, times in microseconds."""
    rows: list[JsonObject] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": title}}]
    for rank in range(layout.pp):
        rows.append(
            {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"pipeline rank {rank}"}}
        )
    for event in events(layout, work, step):
        row: JsonObject = {
            "ph": "X",
            "pid": 0,
            "tid": event.rank,
            "ts": event.start * 1e6,
            "dur": (event.end - event.start) * 1e6,
            "name": event.name,
            "cat": event.name,
        }
        if event.micro >= 0:
            row |= {"name": f"{event.name} {event.micro}", "args": {"micro": event.micro, "chunk": event.chunk}}
        rows.append(row)
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def write_trace(path: Path, layout: Layout, work: Work, step: StepTime, title: str) -> None:
    """Write ``trace`` as JSON."""
    write_text(path, json.dumps(trace(layout, work, step, title)) + "\n")


def draw(path: Path, layout: Layout, work: Work, step: StepTime, title: str) -> None:
    """Draw the step as a picture: a bar for each pipeline rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.2 + 0.4 * layout.pp), layout="constrained")
    axes = figure.subplots()
    found = events(layout, work, step)
    for name, colour in COLOURS.items():
        for rank in range(layout.pp):
            bars = [(e.start, e.end - e.start) for e in found if e.rank == rank and e.name == name]
            axes.broken_barh(
                bars,
                (rank - 0.4, 0.8),
                facecolors=colour,
                edgecolor="white",
                linewidth=0.3,
                label=name if rank == 0 and bars else None,
            )
    axes.set_yticks(range(layout.pp), [f"rank {rank}" for rank in range(layout.pp)])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(title)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=len(COLOURS), frameon=False)
    figure.savefig(path, dpi=120)
