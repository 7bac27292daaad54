"""Timeline of a simulated step: events, a trace that Perfetto and chrome://tracing open, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.files.pictures import save_picture
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

_WIDTH = 12.0  # inches of the picture


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
            chunk = f" chunk {event.chunk}" if layout.virtual > 1 else ""
            name = f"{event.name} {event.micro}{chunk}"
            row |= {"name": name, "args": {"micro": event.micro, "chunk": event.chunk}}
        rows.append(row)
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def write_trace(path: Path, layout: Layout, work: Work, step: StepTime, title: str) -> None:
    """Write ``trace`` as JSON."""
    write_text(path, json.dumps(trace(layout, work, step, title)) + "\n")


def draw(path: Path, layout: Layout, work: Work, step: StepTime, title: str) -> None:
    """Draw the step as a picture: a row for each pipeline rank; passes have the number of their micro-batch where it
    fits, and are the paler the later their chunk."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(_WIDTH, 1.5 + 0.4 * layout.pp), layout="constrained")
    axes = figure.subplots()
    found = events(layout, work, step)
    end = max(event.end for event in found)
    for event in found:
        pale = 0.45 * max(event.chunk, 0) / layout.virtual
        colour = tuple(pale + (1.0 - pale) * part for part in to_rgb(COLOURS[event.name]))
        span = (event.start, event.end - event.start)
        axes.broken_barh([span], (event.rank - 0.4, 0.8), facecolors=[colour], edgecolor="white", linewidth=0.3)
        if event.micro >= 0 and span[1] / end * _WIDTH > 0.09 * len(str(event.micro)):
            middle = event.start + span[1] / 2
            axes.text(middle, event.rank, str(event.micro), ha="center", va="center", fontsize=7, clip_on=True)
    names = [name for name in COLOURS if any(event.name == name for event in found)]
    axes.set_xlim(0.0, end)
    axes.set_ylim(layout.pp - 0.5, -0.5)
    axes.set_yticks(range(layout.pp))
    axes.set_ylabel("pipeline rank")
    axes.set_xlabel("seconds")
    axes.set_title(title if layout.virtual == 1 else f"{title}; chunk 0 darkest", fontsize=11)
    handles = [Patch(color=COLOURS[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    save_picture(figure, path, 120)
