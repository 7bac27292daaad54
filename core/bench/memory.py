"""Memory benchmark (``tele bench memory``): the peak of a training step of each contestant, against its estimate.

Each contestant trains in a process of its own. Its peak is that of the process's resident memory over construction and
steps, above what stood after the imports; on an accelerator the peak of the device's pool stands beside it.
"""

from __future__ import annotations

from telechat_twins.core.bench.step import facts, machine, task
from telechat_twins.core.bench.worker import TITLES, Worker, bench_config
from telechat_twins.core.planner.memory.estimate import estimate
from telechat_twins.core.planner.memory.executor import EXECUTORS, on_cpu
from telechat_twins.core.types import JsonObject


def measure_memory(options: JsonObject, names: list[str], steps: int) -> JsonObject:
    """``steps`` optimizer steps of each contestant in turn; bytes of each, and the estimates of the backends."""
    found = {}
    for name in names:
        with Worker(name, options) as worker:
            worker.steps(steps)
            found[name] = {"implementation": worker.implementation, **worker.ask({"memory": True})}
        found[name]["estimate"] = estimated(name, options, on_host=not found[name]["device"])
    return {**facts(options), "steps": steps, "contestants": found}


def estimated(name: str, options: JsonObject, on_host: bool) -> int | None:
    """`tele plan`'s bytes for the step, ``on_host``: on a CPU; None for a contestant that it does not describe."""
    if name not in EXECUTORS:
        return None
    config = bench_config(options)
    plan = estimate(
        config.model,
        config.data.seq_len,
        config.train.micro_batch,
        config.train.precision,
        fused_attention=True,
        micro_batches=options["micro_batches"],
        executor=on_cpu(EXECUTORS[name]) if on_host else EXECUTORS[name],
    )
    return int(plan["memory_bytes"]["total"])


def memory_to_markdown(result: JsonObject) -> str:
    """Markdown table with a row for each contestant."""
    found = result["contestants"]
    first = next(iter(found))
    lines = [
        f"{task(result)}; {machine(result)}; peak of {result['steps']} steps, each contestant in a process of its own.",
        "",
        f"| backend | imports | peak above them | device | tele plan | measured / plan | / {TITLES[first]} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found.values():
        used = _used(row)
        plan = row["estimate"]
        cells = [
            row["implementation"]["backend"],
            _mb(row["imports"]),
            _mb(row["peak"]),
            _mb(row["device"]) if row["device"] else "-",
            "-" if plan is None else _mb(plan),
            "-" if plan is None else f"{used / plan:.2f}",
            f"{used / _used(found[first]):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _used(row: JsonObject) -> int:
    """Bytes of the step where the model is: on the device, else in the process."""
    return int(row["device"] or row["peak"])


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
