"""Operator benchmark (``tele bench kernels``): every operator in every implementation, against the machine's limits.

Each framework has a process (kernels/bench/process.py). In a turn it calls its implementations one after another, and
also a plain copy and a plain read, both larger than any cache, and a plain matrix product of the same framework with
the same threads. The limit of an operator is the longest of three times: for its bytes at the copy's bandwidth, for the
bytes it reads at the read's, and for its floating-point operations at the product's rate.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from contextlib import ExitStack

from tqdm import tqdm

from telechat_twins.core.bench.cases import OPERATORS, SIZES, OperatorCost, work
from telechat_twins.core.bench.step import processor
from telechat_twins.core.bench.worker import TITLES, Worker, paired_ratios, spread
from telechat_twins.core.types import JsonObject

__all__ = ["OPERATORS", "SIZES", "kernels_to_markdown", "measure_kernels"]

ITEMSIZE = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2, "amp": 4}
BASE = "composite"  # the implementation that ratios refer to


def measure_kernels(
    names: list[str], operators: list[str], sizes: list[str], precision: str, calls: int, block: int, compiled: bool
) -> JsonObject:
    """Measure ``calls`` calls of each implementation, ``block`` a turn; the rows are those of ``summarise``."""
    rows: list[JsonObject] = []
    with ExitStack() as stack:
        options = {"precision": precision, "compile": compiled}
        workers = {
            name: stack.enter_context(Worker(name, options, module="telechat_twins.kernels.bench.process"))
            for name in names
        }
        made = {name: worker.implementation for name, worker in workers.items()}
        # A bar on a terminal; in a log a line every few seconds.
        with tqdm(total=len(sizes) * len(operators), unit="operator", mininterval=5, file=sys.stderr) as bar:
            for size, operator in itertools.product(sizes, operators):
                bar.set_postfix_str(f"{operator} {size}")
                turns: dict[str, list[JsonObject]] = {name: [] for name in names}
                for number in range(-(-calls // block)):
                    for name in names if number % 2 == 0 else reversed(names):
                        order = {"operator": operator, "size": size, "calls": min(block, calls - number * block)}
                        turns[name].append(workers[name].ask(order))
                limits = work(operator, SIZES[size], ITEMSIZE[precision])
                for name in names:
                    rows += summarise(name, operator, size, limits, turns[name])
                bar.update()
    return {
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": processor()},
        "precision": precision,
        "implementations": made,
        "rows": rows,
    }


def summarise(
    backend: str, operator: str, size: str, limits: dict[str, OperatorCost], turns: list[JsonObject]
) -> list[JsonObject]:
    """Table rows of an operator, one for each direction and implementation.

    A turn is {"copy": [bytes/s], "read": [bytes/s], "matmul": [flop/s], "contestants": {name: {"implementation": ...,
    "forward": [s], "backward": [s], "both": [s]}}}, the last two only where there is a gradient. Fractions of the limit
    are taken turn by turn, since the machine's bandwidth changes from minute to minute.
    """
    rows = []
    for direction, cost in limits.items():
        needs = {"copy": cost.bytes, "read": cost.read, "matmul": cost.flops}
        times = [{what: need / statistics.median(turn[what]) for what, need in needs.items()} for turn in turns]
        bound = max(needs, key=lambda what: statistics.median(turn[what] for turn in times))
        seconds = {
            name: [turn["contestants"][name][direction] for turn in turns]
            for name, contestant in turns[0]["contestants"].items()
            if contestant.get(direction)
        }
        for name, blocks in seconds.items():
            found = spread([s for block in blocks for s in block])
            shares = [max(turn.values()) / statistics.median(block) for turn, block in zip(times, blocks, strict=True)]
            row = {
                "backend": backend,
                "operator": operator,
                "size": size,
                "direction": direction,
                "contestant": name,
                "implementation": turns[0]["contestants"][name]["implementation"],
                **found,
                "bytes": cost.bytes,
                "flops": cost.flops,
                **{f"{what}_per_s": statistics.median(rate for turn in turns for rate in turn[what]) for what in needs},
                "bound": bound,
                "share": statistics.median(shares),
            }
            if name != BASE and BASE in seconds:
                row["times_composite"] = spread(paired_ratios(blocks, seconds[BASE]))
            rows.append(row)
    return rows


def kernels_to_markdown(result: JsonObject) -> str:
    """Markdown tables, one for each size, with a row for each implementation."""
    machine = result["machine"]
    lines = [
        f"{result['precision']}; {machine['cores']} cores of {machine['processor']}. "
        + "; ".join(
            f"{TITLES[name]}: {made['version']} on {made['device']}, {made['threads']} threads"
            for name, made in result["implementations"].items()
        )
        + ". Median of many calls, implementations in turns; `of the limit`: of the measured bandwidth of a copy or of "
        "reading, or of the matrix product, whichever binds; `times composite`: time over the composite form's, turn "
        "by turn.",
    ]
    for size in dict.fromkeys(row["size"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["size"] == size]
        lines += [
            "",
            f"Size `{size}`: {_shape(size)}.",
            "",
            "| operator | direction | backend | implementation | median | bound by | of the limit | times composite |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            ratio = row.get("times_composite")
            cells = [
                row["operator"],
                row["direction"],
                TITLES[row["backend"]],
                row["implementation"],
                f"{row['median'] * 1e3:.3f} ms",
                f"{row['matmul_per_s'] / 1e9:,.0f} GFLOP/s"
                if row["bound"] == "matmul"
                else f"{row['bound']} {row[row['bound'] + '_per_s'] / 1e9:.1f} GB/s",
                f"{100 * row['share']:.0f} %",
                "-" if ratio is None else f"{ratio['median']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shape(name: str) -> str:
    size = SIZES[name]
    return (
        f"{size.tokens} tokens, hidden {size.hidden}, ffn {size.ffn}, vocabulary {size.vocab}, {size.heads} heads of "
        f"{size.head_dim} with {size.kv_heads} kv heads, {size.parameters:,} parameters for adamw"
    )
