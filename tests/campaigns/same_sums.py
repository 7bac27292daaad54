"""500 log-likelihoods of `tele eval`: whatever shares a step, in any order, in every layout and both backends the same.

    python -m tests.campaigns.same_sums [--precision fp64|fp32] [--items N] [--layouts L ...] [--backends B ...]

needs lm_eval 0.4.13. N questions of four choices after two shared examples, on a Tele-FLM with strong weights. Each row
is compared with a float64 run in numpy that shares no code with the product (tests/campaigns/float64_decoder.py):

batch N         as `tele eval --max-running N`
shuffled        the requests in another order
without reuse   no cached pages are shared
tp2, ...        `tele eval --layout` in processes of its own

All must be within 1e-5; in fp64 the exit code is 1 beyond 1e-9.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from telechat_twins.convert.source import open_model
from telechat_twins.core.backends import load
from telechat_twins.core.cli import main as tele
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.eval.adapter import EngineModel, Served
from telechat_twins.core.eval.harness import RunOptions, plan_tasks, require_harness, run_task
from telechat_twins.core.eval.journal import Journal
from telechat_twins.core.eval.results import read_items
from telechat_twins.core.eval.scorer import Likelihood, Pair, Scorer
from telechat_twins.core.eval.task_index import open_tasks
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.pages import pool_size
from tests.campaigns.float64_decoder import read_release
from tests.campaigns.harness import silent
from tests.campaigns.likelihoods import as_is, by_numpy
from tests.support.harness_support import write_llama, write_tasks

TASK = "made_choices"
LIMITS = {"fp32": 1e-5, "fp64": 1e-9}


class Asked(Exception):
    """The requests of a task, in place of their answers."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)


class Asking(EngineModel):
    def _scored(self, pairs: Sequence[Pair], what: str) -> list[Likelihood]:
        raise Asked(pairs)


def engine_of(folder: Path, backend: str, precision: str, running: int, reuse: bool = True) -> Engine:
    source, module = open_model(str(folder)), load(backend, "generate")
    longest, size = source.config.training_seqlen, module.short_page()
    runner = module.Runner(source.config, source.tensor, pool_size(16 * longest, size), precision, size)
    return Engine(runner, reuse=reuse, limits=EngineLimits(max_len=longest + 1, max_running=running, step_tokens=1024))


def pairs_of(folder: Path, tasks: Path) -> list[Pair]:
    """The requests of the task as the harness makes them."""
    config, tokenizer = open_model(str(folder)).config, load_tokenizer(folder, in_vocabulary=True)
    served = Served(config, tokenizer, config.training_seqlen, config.stop_ids)
    plans = plan_tasks([TASK], None)
    with Journal(tasks / "asked.jsonl", {}) as journal:
        model = Asking(served, Scorer(engine_of(folder, "pt", "fp32", 1)), journal, silent)
        try:
            run_task(plans[0], model, open_tasks(plans, [tasks]), RunOptions(data=tasks / "data", quiet=True))
        except Asked as asked:
            return asked.pairs
    raise AssertionError("the task asked for nothing")


def exact(folder: Path, pairs: Sequence[Pair]) -> np.ndarray:
    shape, weights = read_release(folder)
    scored = [(pair.context + pair.continuation, len(pair.context)) for pair in pairs]
    return np.array([one.sum() for one in by_numpy(shape, weights, scored, as_is)])


def in_process(folder: Path, pairs: Sequence[Pair], backend: str, precision: str) -> Iterator[tuple[str, np.ndarray]]:
    order = np.random.default_rng(2).permutation(len(pairs))
    for name, running, reuse, places in (
        ("batch 1", 1, True, range(len(pairs))),
        ("batch 32", 32, True, range(len(pairs))),
        ("batch 32, shuffled", 32, True, order),
        ("batch 32, shuffled, without reuse", 32, False, order),
    ):
        scorer = Scorer(engine_of(folder, backend, precision, running, reuse))
        sums = [one.logprob for one in scorer.likelihoods([pairs[place] for place in places])]
        found = np.empty(len(pairs))
        found[list(places)] = sums
        yield name, found


def by_layout(folder: Path, tasks: Path, backend: str, precision: str, layout: str, out: Path) -> np.ndarray:
    words = ["eval", "--backend", backend, "--checkpoint", str(folder), "--precision", precision, "--layout", layout]
    words += ["--tasks", TASK, "--include", str(tasks), "--data", str(tasks / "data"), "--out", str(out), "--quiet"]
    if tele(words):
        raise SystemExit(f"{backend} {layout}: see {out / 'logs'}")
    return np.array([answer[0] for row in read_items(out) for answer in row["answers"]])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", default="fp64", choices=list(LIMITS))
    parser.add_argument("--items", type=int, default=125)
    parser.add_argument("--layouts", nargs="*", default=["tp2", "pp2", "ring2"])
    parser.add_argument("--backends", nargs="+", choices=("ms", "pt"), default=["pt", "ms"])
    args = parser.parse_args()
    require_harness()
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="tele-sums-") as root:
        folder = write_llama(Path(root) / "model", gain=6.0)
        tasks = write_tasks(Path(root) / "tasks", args.items)
        pairs = pairs_of(folder, tasks)
        right = exact(folder, pairs)
        print(f"{len(pairs)} sums down to {right.min():.0f}, {args.precision}: largest error", flush=True)
        for backend in args.backends:
            layouts = (
                (layout, by_layout(folder, tasks, backend, args.precision, layout, Path(root) / f"{backend}-{layout}"))
                for layout in args.layouts
            )
            for name, sums in chain(in_process(folder, pairs, backend, args.precision), layouts):
                largest = float(np.abs(sums - right).max())
                worst = max(worst, largest)
                print(f"  {backend} {name}: {largest:.1e}", flush=True)
    return 0 if worst <= LIMITS[args.precision] else 1


if __name__ == "__main__":
    sys.exit(main())
