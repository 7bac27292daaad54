"""Decoding benchmark (``tele bench decode``): one token a step, for a single sequence and for a batch.

Contestants are the engine on each backend and, where the transformers library is installed, Hugging Face's ``generate``
with its cache, on a model of the same shapes in PyTorch (kernels/bench/hf.py), and on demand llama.cpp
(kernels/bench/llama_cpp.py). They run in turns, as in ``tele bench
step``. The limit of a step is the time to read the bytes that it must read, every weight matrix once and the keys and
values of each sequence, at the bandwidth measured in the same process.
"""

from __future__ import annotations

import importlib.util
import statistics
from contextlib import ExitStack

from telechat_twins.core import backends
from telechat_twins.core.bench.step import facts, machine, model_name
from telechat_twins.core.bench.worker import LLAMA_CPP, Worker, bar, bench_config, paired_ratios, spread
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.model.precision import PRECISION
from telechat_twins.core.model.quantize import LINEAR
from telechat_twins.core.types import JsonObject

HF = "hf"
TITLES = {**backends.TITLES, HF: "Hugging Face generate", LLAMA_CPP: LLAMA_CPP}
_MODULE = "telechat_twins.kernels.bench.decode"
_MODULES = {HF: "telechat_twins.kernels.bench.hf", LLAMA_CPP: "telechat_twins.kernels.bench.llama_cpp"}
_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

Turns = dict[tuple[str, int], list[JsonObject]]


def contestants(names: list[str]) -> tuple[list[str], list[str]]:
    """The contestants: ``names`` and, if transformers is installed, Hugging Face's; otherwise a note on its absence."""
    names = [name for name in names if name != HF]
    if importlib.util.find_spec("transformers") is not None:
        return [*names, HF], []
    return names, [f"{TITLES[HF]}: not measured (transformers is not installed here)."]


def measure_decode(
    options: JsonObject, names: list[str], rows: list[int], prompt: int, steps: int, block: int
) -> JsonObject:
    """Measure ``steps`` steps for each contestant and number of sequences in ``rows``, ``block`` steps a turn, after
    prompts of ``prompt`` tokens and one turn that is not counted."""
    names, notes = contestants(names)
    options = {**options, "rows": max(rows), "length": prompt + block}
    turns: Turns = {(name, count): [] for name in names for count in rows if _takes(name, count)}
    with ExitStack() as stack:
        modules = {name: _MODULES.get(name, _MODULE) for name in names}
        workers = {name: stack.enter_context(Worker(name, options, module=modules[name])) for name in names}
        made = {name: worker.implementation for name, worker in workers.items()}
        shown = stack.enter_context(bar(len(turns) * (1 + -(-steps // block))))
        for number in range(-1, -(-steps // block)):
            for name in names if number % 2 == 0 else reversed(names):
                for count in (count for count in rows if _takes(name, count)):
                    left = block if number < 0 else min(block, steps - number * block)
                    answer = workers[name].ask({"rows": count, "prompt": prompt, "steps": left})
                    shown.update()
                    if number >= 0:
                        turns[name, count].append(answer)
    config = bench_config(options).model
    # The bandwidth of the machine rather than of a framework: the highest one measured.
    read = max(statistics.median(turn["read"] for turn in blocks) for blocks in turns.values())
    table = []
    for (name, count), blocks in turns.items():
        table.append(
            {
                "contestant": name,
                "rows": count,
                **summarise(
                    blocks,
                    least_bytes(config, options["precision"], count, prompt + block // 2, _held(options, name)),
                    read,
                ),
                "ratios": {
                    **{
                        peer: _ratio(turns, (peer, count), (name, count))
                        if (peer, count) in turns and name != peer
                        else None
                        for peer in (HF, LLAMA_CPP)
                    },
                    **{
                        f"prompt {peer}": spread(paired_ratios(*_prompts(turns, (name, count), (peer, count))))
                        if (peer, count) in turns and name != peer
                        else None
                        for peer in (HF, LLAMA_CPP)
                    },
                    "one": _ratio(turns, (name, rows[0]), (name, count)) if count != rows[0] else None,
                },
            }
        )
    return {
        **facts(options),
        "prompt": prompt,
        "notes": notes,
        "implementations": made,
        "read_bytes_per_s": read,
        "rows": table,
    }


def _prompts(turns: Turns, *keys: tuple[str, int]) -> list[list[list[float]]]:
    return [[turn["prompt"] for turn in turns[key]] for key in keys]


def _takes(name: str, rows: int) -> bool:
    """llama.cpp is measured with one sequence."""
    return name != LLAMA_CPP or rows == 1


def _ratio(turns: Turns, first: tuple[str, int], second: tuple[str, int]) -> dict[str, float]:
    """Tokens per second of ``second`` over those of ``first``, turn by turn."""
    pairs = paired_ratios(*([turn["seconds"] for turn in turns[key]] for key in (first, second)))
    return spread([ratio * second[1] / first[1] for ratio in pairs])


def summarise(turns: list[JsonObject], least: int, read: float) -> JsonObject:
    """Statistics of one contestant. A turn is {"seconds": [...] of each step, "engine": [...] of these outside the
    model, "prompt": [seconds to the first tokens]}. ``least``: bytes that a step must read; ``read``: bytes that can be
    read in a second."""
    seconds = [s for turn in turns for s in turn["seconds"]]
    step = spread(seconds)
    prompt = spread([s for turn in turns for s in turn["prompt"]])
    found = {**step, "prompt": prompt, "bytes": least, "share": least / read / step["median"]}
    if "engine" in turns[0]:
        pairs = [(e, s) for turn in turns for e, s in zip(turn["engine"], turn["seconds"], strict=True)]
        found["engine_share"] = statistics.median(e / s for e, s in pairs)
    return found


def _held(options: JsonObject, name: str) -> str:
    return "none" if name == HF else options.get("quantize", "none")


def least_bytes(config: ModelConfig, precision: str, rows: int, length: int, quantize: str = "none") -> int:
    """Bytes that a step must read: all weights except the embedding (of which it reads one row a sequence), and the
    keys and values of ``length`` positions of each of ``rows`` sequences."""
    names = PRECISION[precision]
    weights = 0
    for name, spec in parameter_table(config).items():
        if quantize == "int8" and spec.kind in LINEAR:
            weights += spec.size + 4 * spec.shape[0]
        elif name != "embed.weight" or config.tied_embeddings:
            weights += spec.size * _BYTES[names.weight]
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * length
    return weights + rows * cache * _BYTES[names.compute]


def _spread(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def decode_to_markdown(result: JsonObject) -> str:
    """Markdown table with a row for each contestant and number of sequences."""
    options = result["options"]
    weights = ", the backends' weights in int8" if options.get("quantize") == "int8" else ""
    compared = [peer for peer in (HF, LLAMA_CPP) if peer == HF or peer in result["implementations"]]
    peers = [f"{'Hugging Face' if peer == HF else peer}'s" for peer in compared]
    heads, slower = [f"times {peer}" for peer in peers], [f"of {peer}" for peer in peers]
    lines = [
        f"{model_name(options)} ({result['parameters']:,} parameters), {options['precision']}{weights}, greedy, after "
        f"prompts of {result['prompt']} tokens; {machine(result)}; contestants in turns, all warm.",
        "",
        f"| contestant | sequences | a step, median | middle 80 % | tokens/s | {' | '.join(heads)} | times one "
        f"| of the reading limit | outside the model | prompt, median | {' | '.join(slower)} |",
        "|---" * (9 + 2 * len(heads)) + "|",
    ]
    for row in result["rows"]:
        one, ratios = row["ratios"]["one"], [row["ratios"][peer] for peer in compared]
        prompts = [row["ratios"][f"prompt {peer}"] for peer in compared]
        cells = [
            TITLES[row["contestant"]],
            row["rows"],
            f"{row['median'] * 1e3:.2f} ms",
            f"{row['low'] * 1e3:.2f} to {row['high'] * 1e3:.2f} ms",
            f"{row['rows'] / row['median']:.1f}",
            *map(_spread, ratios),
            "-" if one is None else f"{one['median']:.2f}",
            f"{100 * row['share']:.0f} %",
            f"{100 * row['engine_share']:.1f} %" if "engine_share" in row else "-",
            f"{row['prompt']['median'] * 1e3:.2f} ms",
            *map(_spread, prompts),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(
        [
            *lines,
            "",
            "`times`: tokens per second over those of the other, or of one sequence, turn by turn (range of the middle "
            "80 %). `of the reading limit`: the time to read a step's weights, keys and values at the bandwidth "
            f"measured alongside ({result['read_bytes_per_s'] / 1e9:.1f} GB/s), over the step's time. `outside the "
            "model`: scheduling, sampling and events. `prompt`: from the request to the first tokens of all sequences, "
            "and its share of the peer's time.",
            *result["notes"],
        ]
    )
