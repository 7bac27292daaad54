"""Worker process of one backend for ``tele bench decode``: times decoding steps of the warm engine.

python -m telechat_twins.kernels.bench.decode pt '{"model": "telechat2-mini", "rows": 8, "length": 36, ...}'
{"rows": 8, "prompt": 16, "steps": 20}
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.bench.worker import Handle, answer_orders, bench_config
from telechat_twins.core.inference.engine import Engine
from telechat_twins.core.inference.pages import pool_size
from telechat_twins.core.inference.requests import Request
from telechat_twins.core.inference.runner import Runner, Step
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.model.quantize import quantizing
from telechat_twins.core.types import JsonObject
from telechat_twins.kernels.bench.contestant import Bench
from telechat_twins.kernels.bench.process import open_bench


class Timed:
    """A runner that records the duration of its last step, ``seconds``."""

    def __init__(self, runner: Runner) -> None:
        self.config, self.num_pages, self.page_size = runner.config, runner.num_pages, runner.page_size
        self._runner, self.seconds = runner, 0.0

    def run(self, step: Step) -> np.ndarray:
        started = time.perf_counter()
        logits = self._runner.run(step)
        self.seconds = time.perf_counter() - started
        return logits


def timed_steps(engine: Engine, runner: Timed, rows: int, prompt: int, count: int) -> dict[str, list[float]]:
    """Seconds of each of ``count`` decoding steps of ``rows`` sequences after prompts of ``prompt`` random tokens:
    "seconds" in total, "engine" outside the runner; "prompt": [seconds of all prompts, to their first tokens]. The
    engine must be idle."""
    random = np.random.default_rng(0)
    for _ in range(rows):
        ids = tuple(random.integers(0, engine.config.vocab_size, prompt).tolist())
        engine.submit(Request(prompt_ids=ids, max_new_tokens=count + rows + 1))
    began = time.perf_counter()
    while len(engine.step()) < rows:  # until every prompt is prefilled
        pass
    prefilled = time.perf_counter() - began
    seconds, outside = [], []
    for _ in range(count):
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
        outside.append(seconds[-1] - runner.seconds)
    engine.cancel_all()
    return {"seconds": seconds, "engine": outside, "prompt": [prefilled]}


def reading(bench: Bench) -> float:
    """Memory read bandwidth of this framework with all its threads, in bytes per second."""
    call, count = bench.read()
    return 3 * count / bench.seconds(call, 3)


def main(argv: list[str]) -> int:
    """Entry point of the worker: backend name and options as JSON."""

    def prepare() -> tuple[JsonObject, Handle]:
        name, options = argv[0], json.loads(argv[1])
        model = bench_config(options).model
        pages = options["rows"] * (pool_size(options["length"] + options["rows"] + 1) - 1) + 1
        make = backends.load(name, "generate").Runner

        def get(tensor: str) -> np.ndarray:
            return init_tensor(tensor, model, 1234)

        source = quantizing(model, get) if options["quantize"] == "int8" else get
        runner = Timed(make(model, source, pages, options["precision"]))
        engine, bench = Engine(runner, reuse=False), open_bench(name, {**options, "compile": False})

        def handle(order: JsonObject) -> JsonObject:
            found = timed_steps(engine, runner, order["rows"], order["prompt"], order["steps"])
            return {**found, "read": reading(bench)}

        return {"backend": backends.TITLES[name]}, handle

    return answer_orders(prepare)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
