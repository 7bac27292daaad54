"""Training-step benchmark (``tele bench step``): contestants in separate processes that take turns.

A round is one turn of each contestant, and the order alternates from round to round. So ratios are taken between turns
that follow each other, under the same load of the machine.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from telechat_twins.core.bench.worker import TITLES, Worker, bar, bench_config, paired_ratios, spread
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.model.params import count_parameters
from telechat_twins.core.types import JsonObject

Seconds = list[list[float]]


def measure(options: JsonObject, names: list[str], steps: int, block: int) -> JsonObject:
    """Measure whole optimizer steps: one block for each contestant that is not counted, then blocks up to ``steps``."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, options)) for name in names}
        with bar(len(names) * (1 + -(-steps // block))) as shown:

            def turn(name: str, count: int) -> JsonObject:
                shown.set_postfix_str(TITLES[name])
                answer = workers[name].steps(count)
                shown.update()
                return answer

            losses = {name: turn(name, block)["loss"] for name in names}
            seconds = _rounds(names, steps, block, lambda name, count: turn(name, count)["seconds"])
        made = {name: worker.implementation for name, worker in workers.items()}
    return {
        **facts(options),
        "backends": {
            name: {"implementation": made[name], "loss_after_warm_up": losses[name], "seconds": seconds[name]}
            for name in names
        },
        "ratios": _ratios(names, seconds),
    }


def _rounds(names: list[str], steps: int, block: int, turn: Callable[[str, int], list[float]]) -> dict[str, Seconds]:
    """Results of ``turn(name, count)`` for each name in every round; the order is reversed from round to round."""
    seconds: dict[str, Seconds] = {name: [] for name in names}
    for number in range(-(-steps // block)):
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(turn(name, min(block, steps - number * block)))
    return seconds


def _ratios(names: list[str], seconds: dict[str, Seconds]) -> list[JsonObject]:
    """For each pair of contestants, the time of the first over that of the second."""
    return [
        {"of": first, "to": second, **spread(paired_ratios(seconds[first], seconds[second]))}
        for number, first in enumerate(names)
        for second in names[number + 1 :]
    ]


def to_markdown(result: JsonObject) -> str:
    """Markdown table with a row for each contestant, and the ratios."""
    tokens = result["tokens_per_step"]
    lines = [
        f"{task(result)}; {machine(result)}; contestants in turns, all warm.",
        "",
        "| backend | device | step, median | middle 80 % | tokens/s | model GFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for measured in result["backends"].values():
        times = _all(measured["seconds"])
        made = measured["implementation"]
        cells = [
            made["backend"],
            made["device"],
            f"{times['median'] * 1e3:.1f} ms",
            f"{times['low'] * 1e3:.1f} to {times['high'] * 1e3:.1f} ms",
            f"{tokens / times['median']:,.0f}",
            f"{result['flops_per_step'] / times['median'] / 1e9:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_ratio_lines(result, "step time")])


def _ratio_lines(result: JsonObject, what: str) -> list[str]:
    lines = [
        f"{_sentence(ratio['of'])} takes {ratio['median']:.2f} times {TITLES[ratio['to']]}'s {what} "
        f"(rounds: {ratio['low']:.2f} to {ratio['high']:.2f})."
        for ratio in result["ratios"]
    ]
    return ["", *lines] if lines else []


def _sentence(name: str) -> str:
    return TITLES[name][:1].upper() + TITLES[name][1:]


def _all(seconds: Sequence[Sequence[float]]) -> dict[str, float]:
    return spread([s for block in seconds for s in block])


def facts(options: JsonObject) -> JsonObject:
    """The options, the machine, and the sizes that follow from the options."""
    config = bench_config(options)
    tokens = config.train.global_batch * config.data.seq_len
    return {
        "options": options,
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": processor()},
        "parameters": count_parameters(config.model),
        "tokens_per_step": tokens,
        "flops_per_step": tokens * flops_per_token(config.model, config.data.seq_len),
    }


def task(result: JsonObject) -> str:
    """Description of the measured training step."""
    options = result["options"]
    return (
        f"{model_name(options)} ({result['parameters']:,} parameters), {options['precision']}, "
        f"{options['micro_batches']} x {options['micro_batch']} x {options['seq_len']} tokens a step"
    )


def model_name(options: JsonObject) -> str:
    """The measured model's preset or file, as code in Markdown."""
    return f"`{Path(options['model']).name}`"


def machine(result: JsonObject) -> str:
    return f"{result['machine']['cores']} cores of {result['machine']['processor']}"


def processor() -> str:
    """The processor's model name where the system reports it (Linux), else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
