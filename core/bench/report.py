"""Markdown tables of the parallel benchmark."""

from __future__ import annotations

from telechat_twins.core import backends
from telechat_twins.core.bench.step import machine, task
from telechat_twins.core.bench.worker import spread
from telechat_twins.core.types import JsonObject


def layouts_to_markdown(result: JsonObject) -> str:
    """Markdown report: the machine, times and bytes, pipelines, rings, and disagreements with the formulas."""
    rows, cores, threads = result["rows"], result["machine"]["cores"], result["machine"]["threads"]
    largest = max(row["world"] for row in rows)
    crowded = f"; {largest} processes have to take turns on {cores} cores" if largest > cores else ""
    lines = [
        f"{task(result)}, the same in every layout; {machine(result)}; up to {largest} processes.",
        "",
        f"**Times are a picture of this machine, not of a cluster**: all processes share its {cores} cores and its "
        f"memory, through which their messages pass{crowded}. In every round a single process, with the machine to "
        "itself meanwhile, trained on the same batches; `times single` is the ratio to it, round by round (median; "
        "range of the middle 80 %). "
        + (
            f"Threads: {threads} a process (OMP_NUM_THREADS)."
            if threads
            else "Threads: all cores for the single process, an equal share of them for each of several."
        ),
        "",
        "| backend | layout | processes | step, median | middle 80 % | times single | handed to collectives "
        "| as the formula | on the wire | optimizer states |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    whole = 3 * (8 if result["options"]["precision"] == "fp64" else 4) * result["parameters"]
    for row in rows:
        times = spread([s for turn in row["seconds"] for s in turn])
        ratio, held = spread(row["ratios"]), max(row["states"]["held"])
        cells = [
            backends.TITLES[row["backend"]],
            row["layout"],
            row["world"],
            f"{times['median'] * 1e3:.1f} ms",
            f"{times['low'] * 1e3:.1f} to {times['high'] * 1e3:.1f}",
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            _megabytes(max(row["traffic"]["counted"])),
            "NO" if row["traffic"]["differs"] else "yes",
            _megabytes(max(row["traffic"]["wire"])),
            f"{_megabytes(held)} ({held / whole:.2f} of {_megabytes(whole)})",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "Bytes a step and rank, of the rank with the most. `handed to collectives` was counted, and is compared call "
        "for call and byte for byte with `expected_traffic` on every rank; `on the wire` is what ring "
        "algorithms make of it. Optimizer states: masters, m and v. The losses after the warm-up are the single "
        f"process's within {max(row['loss_difference'] for row in rows):.0e}.",
        *_forecasts(rows),
        *_pipelines(rows),
        *_rings(rows),
        *_disagreements(rows),
    ]
    return "\n".join(lines)


def _forecasts(rows: list[JsonObject]) -> list[str]:
    """Measured steps beside those that the planner forecasts, with the order in which layouts are fast."""
    known = [row for row in rows if row.get("forecast") is not None]
    if not known:
        return []
    lines = []
    for row in known:
        median = spread([s for turn in row["seconds"] for s in turn])["median"]
        found = row["forecast"]
        largest = sorted(found["breakdown"].items(), key=lambda one: -one[1])[:3]
        busy = max((spread(turns)["median"] for turns in row.get("processor", []) if turns), default=0.0)
        working = found.get("working")
        cells = [
            backends.TITLES[row["backend"]],
            row["layout"],
            f"{median * 1e3:.1f} ms",
            f"{found['seconds'] * 1e3:.1f} ms",
            f"{found['seconds'] / median - 1.0:+.0%}",
            f"{busy * 1e3:.1f} ms" if busy else "-",
            f"{working / busy - 1.0:+.0%}" if working and busy else "-",
            ", ".join(f"{name} {seconds / found['seconds']:.0%}" for name, seconds in largest),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        "",
        "| backend | layout | step, measured | forecast | error | on processors, busiest rank | forecast's error "
        "| largest parts of the forecast |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
        "",
        f"Forecast by `tele plan` for {', '.join(dict.fromkeys(row['forecast']['machine'] for row in known))}.",
        *_orders(known),
    ]


def _orders(rows: list[JsonObject]) -> list[str]:
    """Whether the forecast puts the layouts of each backend in the order of the measured times."""
    lines = []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        mine = {
            row["layout"]: (spread([s for turn in row["seconds"] for s in turn])["median"], row["forecast"]["seconds"])
            for row in rows
            if row["backend"] == backend
        }
        wrong = [
            f"{a} before {b}"
            for a, (true_a, found_a) in mine.items()
            for b, (true_b, found_b) in mine.items()
            # Times that differ by less than 5 % have no order.
            if found_a < found_b and true_a > 1.05 * true_b
        ]
        order = ", ".join(sorted(mine, key=lambda name: mine[name][1]))
        lines.append(
            f"{backends.TITLES[backend]}, fastest first by the forecast: {order}; "
            + (f"measured otherwise: {', '.join(wrong)}." if wrong else "as measured.")
        )
    return ["", *lines]


def _pipelines(rows: list[JsonObject]) -> list[str]:
    lines = []
    for row in rows:
        if row["pipeline"] is None:
            continue
        found, shares = row["pipeline"], spread(row["pipeline"]["measured"])
        stages = ", ".join(
            f"{f * 1e3:.1f} + {b * 1e3:.1f}" for f, b in zip(found["forward"], found["backward"], strict=True)
        )
        # These times are the host's; an accelerator waits in its own queue, unnoticed by the host.
        seen = row["device"].lower() == "cpu"
        cells = [
            backends.TITLES[row["backend"]],
            row["layout"],
            f"{shares['median']:.3f} ({shares['low']:.3f} to {shares['high']:.3f})" if seen else "only on CPUs",
            f"{found['formula']:.3f}",
            f"{found['simulated']:.3f}" if seen else "-",
            stages if seen else "-",
            " ".join(map(str, found["peak"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    return [
        "",
        "| backend | pipeline | bubble, measured | equal stages | stages as measured | forward + backward, ms a stage "
        "| graphs alive, by rank |",
        "|---|---|---|---|---|---|---|",
        *lines,
        "",
        "Bubble: share of the ranks' time, from each one's first action to the pipeline's last, in which they waited "
        "for other stages. `equal stages` is `core.parallel.schedule.bubble_formula`; `stages as measured` is "
        "`core.parallel.schedule.bubble` with the stage times beside it and messages that take no time.",
    ]


def _rings(rows: list[JsonObject]) -> list[str]:
    seen = {row["layout"]: row["ring"] for row in rows if row["ring"] is not None}
    if not seen:
        return []
    return [
        "",
        "| ring | query-key pairs a row, by ring rank | heaviest rank over mean | the same without zigzag |",
        "|---|---|---|---|",
        *(
            f"| {name} | {' '.join(f'{n:,.0f}' for n in ring['pairs'])} | {ring['heaviest']:.3f} "
            f"| {ring['heaviest_in_order']:.3f} |"
            for name, ring in seen.items()
        ),
    ]


def _disagreements(rows: list[JsonObject]) -> list[str]:
    lines = []
    for row in rows:
        where = f"{backends.TITLES[row['backend']]} {row['layout']}"
        lines += [f"- {where}: {line}" for line in row["traffic"]["differs"]]
        if row["states"]["held"] != row["states"]["formula"]:
            lines.append(
                f"- {where}: optimizer states held {row['states']['held']}, formula {row['states']['formula']}"
            )
    return ["", "Counted and computed disagree:", "", *lines] if lines else []


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"
