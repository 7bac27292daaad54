"""What one of two ranks does in test_ring_generation.py: every check of ``CHECKS``, results as results_<rank>.json.

    ring_generation_checks.py BACKEND FOLDER LENGTH            one rank; LENGTH of the long prompt
    python -m tests.multiproc.ring_generation_checks pt 32768  by hand: only the long prompt, on two ranks

Logits come together on every rank, so each rank has an engine of its own here that makes the steps of the other. What
one process says is computed by each rank alone, with a runner that knows no mesh.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from telechat_twins.core.backends import load
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.pages import PAGE_SIZE, pool_size
from telechat_twins.core.inference.requests import Request
from telechat_twins.core.inference.ring_pages import RankStep, RingBlock, pages_of_rank
from telechat_twins.core.inference.sampling import sampling_config
from telechat_twins.core.launch.launcher import launch
from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.parity.bounds import relative_frobenius
from tests.support.engine_support import Feed, finish, tokens_of
from tests.support.frameworks import golden_source

WORLD, PIECE, LENGTH = 2, 512, 8192
CHECKS: dict[str, Callable[[Any], Any]] = {}
DRAWN = sampling_config(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=11)


def check(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    CHECKS[run.__name__] = run
    return run


class Recorder:
    """A runner that keeps the logits it gave."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.logits = runner, []
        self.config, self.num_pages, self.page_size = runner.config, runner.num_pages, runner.page_size

    def run(self, step: Any) -> np.ndarray:
        self.logits.append(self.runner.run(step))
        return self.logits[-1]


def small_config() -> ModelConfig:
    return golden().config


@cache
def golden() -> Any:
    return golden_source("telechat2_gqa/weights.safetensors", "telechat2_gqa/config.json")


def runner(env: Any, pages: int, precision: str = "fp32", alone: bool = False) -> Any:
    make = load(env.backend, "generate").Runner
    return make(small_config(), golden().tensor, pages, precision, mesh=None if alone else env.mesh)


def ids(length: int, seed: int = 7) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, small_config().vocab_size, length).tolist())


def requests() -> list[Request]:
    """Prompts that begin alike, one within a page, one beyond the trained length of 64; greedy and drawn."""
    prompts = [ids(33) + ids(4, 1), ids(33) + ids(21, 2), ids(7, 3), ids(150, 4)]
    return [
        Request(prompt_ids=prompt, max_new_tokens=10, sampling=sampling, samples=1 + (at == 1))
        for at, (prompt, sampling) in enumerate(
            zip(prompts, (sampling_config(), DRAWN, sampling_config(), DRAWN), strict=True)
        )
    ]


def served(made: Any, asked: Sequence[Request], rescale: str = "request") -> tuple[list[list[int]], np.ndarray]:
    """Tokens of every sample, and the logits of all steps, one below the other; the prompts are asked for twice."""
    seen = Recorder(made)
    engine = Engine(seen, rescale=rescale, limits=EngineLimits(step_tokens=20, max_running=8))
    tokens = []
    for _ in range(2):
        numbers = [engine.submit(request) for request in asked]
        found = finish(engine)
        engine.pool.check()
        for number, request in zip(numbers, asked, strict=True):
            tokens += [tokens_of(found[number], sample) for sample in range(request.samples)]
    return tokens, np.concatenate(seen.logits)


def compared(env: Any, asked: Sequence[Request], pages: int, **more: Any) -> dict[str, Any]:
    """A ring beside one process: whether the tokens are the same, and how far the logits of all steps are apart."""
    precision = more.pop("precision", "fp32")
    ring, plain = (served(runner(env, pages, precision, alone), asked, **more) for alone in (False, True))
    return {"same": ring[0] == plain[0], "apart": relative_frobenius(ring[1], plain[1]), "rows": len(ring[1])}


@check
def engine_by_request(env: Any) -> dict[str, Any]:
    return compared(env, requests(), 60)


@check
def engine_by_step_short_of_pages(env: Any) -> dict[str, Any]:
    """So few pages that requests give way to others and are computed again."""
    return compared(env, requests(), pool_size(160) + 3, rescale="step")


@check
def one_token(env: Any) -> dict[str, Any]:
    """All of it on one page of one rank: the other has nothing to compute and no key."""
    return compared(env, [Request(prompt_ids=(5,), max_new_tokens=4)], 4)


@check
def in_float64(env: Any) -> dict[str, Any]:
    return compared(env, requests()[:2], 40, precision="fp64")


@check
def in_bfloat16(env: Any) -> dict[str, Any]:
    """How far a ring and one process are from float64, each, after every piece of a prompt."""
    asked = [Request(prompt_ids=ids(150), max_new_tokens=1)]
    (_, judge), (_, plain), (_, ring) = (
        served(runner(env, 20, precision, alone), asked)
        for precision, alone in (("fp64", True), ("bf16", True), ("bf16", False))
    )
    return {"plain": relative_frobenius(plain, judge), "ring": relative_frobenius(ring, judge), "rows": len(ring)}


@check
def cache_of_a_rank(env: Any) -> dict[str, Any]:
    made = runner(env, 61)
    shapes = [tuple(block.attn.core.k.shape) for block in made.model.layers.values()]
    return {"pages": [shape[0] for shape in shapes], "expected": pages_of_rank(61, WORLD), "whole": 61}


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


def faulty_share(env: Any, change: Callable[[RankStep], RankStep]) -> Any:
    generate = load(env.backend, "generate")
    real = generate.rank_step
    return changed(generate, "rank_step", lambda *a: change(real(*a)))


def one_key_too_far(share: RankStep) -> RankStep:
    def further(part: RingBlock) -> RingBlock:
        return part._replace(ranges=np.minimum(part.ranges + np.array([0, 1], np.int32), part.slots.shape[1]))

    return dataclasses.replace(share, hops=[[further(part) for part in parts] for parts in share.hops])


@check
def planted_hop_left_out(env: Any) -> dict[str, Any]:
    with faulty_share(env, lambda share: dataclasses.replace(share, hops=[share.hops[0], []])):
        return compared(env, [requests()[0]], 20)


@check
def planted_one_key_too_far(env: Any) -> dict[str, Any]:
    with faulty_share(env, one_key_too_far):
        return compared(env, [requests()[0]], 20)


@check
def planted_merge_without_log_sum_exp(env: Any) -> dict[str, Any]:
    ops = load(env.backend, "ops")
    real = ops.merge_blocks

    def averaged(out: Any, log_sum_exp: Any, more: Any, more_lse: Any) -> Any:
        return (out + more) * 0.5, real(out, log_sum_exp, more, more_lse)[1]

    with changed(ops, "merge_blocks", averaged):
        return compared(env, [requests()[0]], 20)


def long_config() -> ModelConfig:
    return load_model_config("telechat2-tiny")


def long_weights(name: str) -> np.ndarray:
    return init_tensor(name, long_config(), 3, scheme="strong")


def long_prompt_ids(length: int) -> list[int]:
    return np.random.default_rng(0).integers(0, long_config().vocab_size, length).tolist()


def needles(length: int) -> list[int]:
    """Positions from the trained length of 256 to the end, on both sides of pieces and pages."""
    return [255, 256, 511, 512, length // 3, length // 2 - 1, length // 2, length * 7 // 8 + 5, length - 1]


def uncached(backend: str, length: int) -> np.ndarray:
    """Logits at the needles of one float32 pass of one process over everything."""
    row = np.asarray([long_prompt_ids(length)], np.int32)
    batch = Batch(row, np.full_like(row, IGNORE), np.arange(length, dtype=np.int32)[None])
    return load(backend, "forward").run(long_config(), long_weights, batch, "fp32", False)["logits"][0][needles(length)]


@check
def long_prompt(env: Any) -> dict[str, Any]:
    """Far beyond the trained length, in pieces, from pages in a mixed order; logits at the needles in rows.npy."""
    made = load(env.backend, "generate").Runner(long_config(), long_weights, pool_size(env.length) + 9, mesh=env.mesh)
    started, fed, tokens, rows, at = time.perf_counter(), Feed(made, env.length), long_prompt_ids(env.length), [], 0
    for needle in needles(env.length):
        while at <= needle:
            size = min(PIECE, needle + 1 - at)
            row = fed.extend(tokens[at : at + size])
            at += size
        rows.append(row)
    np.save(env.folder / f"rows_{env.mesh.rank}.npy", np.stack(rows))
    keys = next(iter(made.model.layers.values())).attn.core.k
    return {"seconds": time.perf_counter() - started, "places": keys.shape[0] * PAGE_SIZE}


def main(backend: str, folder: str, length: str, *only: str) -> None:
    mesh = load(backend, "parallelize").open_mesh(small_config(), parse_layout(f"ring{WORLD}"))
    env = SimpleNamespace(backend=backend, mesh=mesh, folder=Path(folder), length=int(length))
    results: dict[str, Any] = {}
    for name in only or CHECKS:
        started = time.perf_counter()
        try:
            results[name] = CHECKS[name](env)
        except Exception as error:  # the result of this check; the others still run
            results[name] = {"error": f"{error}\n{''.join(traceback.format_exception(error)[-3:])}"}
        print(f"{name} {time.perf_counter() - started:.1f} s: {results[name]}", flush=True)
        Path(folder, f"results_{mesh.rank}.json").write_text(json.dumps(results))
    load(backend, "mesh").leave()


def by_hand(backend: str, length: str) -> int:
    folder = Path(tempfile.mkdtemp(prefix="ring-generation-"))
    code = launch(backend, [backend, str(folder), length, "long_prompt"], WORLD, folder / "logs", script=__file__)
    if not code:
        started = time.perf_counter()
        plain, rows = uncached(backend, int(length)), np.load(folder / "rows_0.npy", allow_pickle=False)
        print(f"one process, uncached: {time.perf_counter() - started:.1f} s")
        print(f"apart by {relative_frobenius(rows, plain):.1e} in relative Frobenius norm at {needles(int(length))}")
    return code


if __name__ == "__main__":
    if len(sys.argv) == 3:
        raise SystemExit(by_hand(*sys.argv[1:]))
    main(*sys.argv[1:])
