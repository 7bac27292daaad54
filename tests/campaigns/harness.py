"""The adapter against lm-evaluation-harness's own ``hf`` model, on an exported Tele-FLM that transformers opens.

    python -m tests.campaigns.harness [--precision fp32|fp64] [--items N] [--requests N] [--rounds N] [--shots N ...]

needs lm_eval 0.4.13 with datasets 4.8.5, pyarrow 21.0.0 and pandas 2.3.3, and transformers 5.24.0. Two parts:

agreement   three kinds of task (multiple choice, rolling, generation): log-likelihoods within 1e-5 (of up to 255
            tokens: 1e-6 of their size), the same choices and texts. In fp64 both sides are float64, hf with
            ``dtype=float64,softmax_dtype=float64``, where transformers keeps its rotary tables and norms in float32; so
            hf with these in float64, too, are judges of their own, and the last of them must be within 1e-8
throughput  N requests of multiple choice on a model of telechat2-mini's sizes, by all in turns with the same batch
            size and threads: requests a second by wall and by processor time, and the ratio of each round, which must
            be 3 in both backends. Four choices share a question; with five examples all questions share these, too
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from telechat_twins.convert.source import open_model
from telechat_twins.core.backends import load
from telechat_twins.core.data.tokenizer import load_tokenizer
from telechat_twins.core.eval.adapter import EngineModel, Served
from telechat_twins.core.eval.compare import compare_items
from telechat_twins.core.eval.harness import RunOptions, plan_tasks, require_harness, run_task
from telechat_twins.core.eval.journal import Journal
from telechat_twins.core.eval.results import items
from telechat_twins.core.eval.scorer import Scorer
from telechat_twins.core.eval.session import STEP_TOKENS
from telechat_twins.core.eval.task_index import open_tasks
from telechat_twins.core.inference.engine import Engine, EngineLimits
from telechat_twins.core.inference.pages import pool_size
from tests.support.harness_support import KINDS, WORDS, as_llama, write_llama, write_tasks

MINI = dict(hidden_size=512, ffn_hidden_size=1408, num_layers=8, num_heads=8, num_kv_heads=2)
MINI |= dict(training_seqlen=1024, base_seqlen=1024, max_seqlen=1024)
BATCH = 32
DTYPES = {"fp32": "float32", "fp64": "float64"}
Rows = list[dict]


@contextlib.contextmanager
def silent(_: str, __: int) -> Iterator[object]:
    class Bar:
        def update(self, n: int = 1) -> None:
            pass

    yield Bar()


def ours(
    folder: Path, journal: Journal, backend: str = "pt", max_running: int = 64, precision: str = "fp32"
) -> EngineModel:
    source = open_model(str(folder))
    tokenizer = load_tokenizer(folder, in_vocabulary=True)
    config, max_len = source.config, source.config.training_seqlen
    module = load(backend, "generate")
    size = module.short_page()  # as tele eval
    runner = module.Runner(config, source.tensor, pool_size(16 * max_len, size), precision, size)
    limits = EngineLimits(max_len=max_len + 1, max_running=max_running, step_tokens=STEP_TOKENS)
    engine = Engine(runner, tokenizer, limits=limits)
    return EngineModel(Served(config, tokenizer, max_len, config.stop_ids), Scorer(engine), journal, silent)


def in_float64(model: torch.nn.Module, norms: bool) -> None:
    """Give a Llama of transformers rotary tables, and with ``norms`` also norms, of float64 in place of float32."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)

    def tables(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = (position_ids[..., None].double() * frequency).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    def norm(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    model.model.rotary_emb.forward = tables
    for module in model.modules() if norms else ():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(norm, module)


def judges(llama: Path, precision: str) -> Iterator[tuple[str, HFLM, bool]]:
    """Models of the harness by name, and whether each is ``precision`` throughout."""
    # The prefix of a text without context and the end of text are the model's own; hf takes both from the tokenizer.
    options = {"pretrained": str(llama), "device": "cpu", "batch_size": BATCH, "max_length": 256}
    options |= {"dtype": DTYPES[precision], "softmax_dtype": DTYPES[precision]}
    yield "hf", HFLM(**options), precision == "fp32"
    for norms in (False, True) if precision == "fp64" else ():
        lm = HFLM(**options)
        in_float64(lm.model, norms)
        yield f"hf with float64 tables{' and norms' if norms else ''}", lm, norms


def agreement(root: Path, count: int, precision: str) -> bool:
    folder = write_llama(root / "model")
    llama = as_llama(folder, root / "llama")
    tasks = write_tasks(root / "tasks", count)
    plans = plan_tasks([f"made_{kind}" for kind in KINDS], None)
    manager = open_tasks(plans, [tasks])
    options = RunOptions(data=tasks / "data", quiet=True)
    mine: dict[tuple[str, str], Rows] = {}
    for plan in plans:
        for backend in ("pt", "ms"):
            with Journal(root / f"{backend}-{plan.name}.jsonl", {}) as journal:
                model = ours(folder, journal, backend, precision=precision)
                mine[plan.name, backend] = list(items(run_task(plan, model, manager, options)))
    good = True
    for judge, lm, throughout in judges(llama, precision):
        limit = (1e-8, 1e-10) if throughout and precision == "fp64" else (1e-5, 1e-6)
        for plan in plans:
            theirs = list(items(run_task(plan, lm, manager, options)))
            for backend in ("pt", "ms"):
                what = f"{plan.name}, {backend} against {judge}"
                good = agrees(what, theirs, mine[plan.name, backend], limit) and good
    return good


def agrees(what: str, theirs: Rows, mine: Rows, limit: tuple[float, float]) -> bool:
    """Print how far evaluations of a task are apart. ``limit``: of log-likelihoods, and as a share of their size."""
    (found,) = compare_items(theirs, mine).values()
    largest = found["largest_difference"]
    values = _likelihoods(theirs)
    scale = max(np.abs(values), default=1.0)
    # transformers turns every byte of a run of byte tokens that is not UTF-8 into a mark, line ends included, so that
    # no stop string is found in it; random weights write such runs.
    texts = [text for text in found["texts"] if "\ufffd" not in text["answers"][0][0]]
    for text in texts:
        print(f"  item {text['item']}: {text['answers'][0]!r} and {text['answers'][1]!r}")
    holds = not found["flipped"] and not texts and (largest is None or largest <= max(limit[0], limit[1] * scale))
    shown = f"{len(values)} log-likelihoods down to -{scale:.0f} differ by at most {largest:.1e}, " if values else ""
    print(
        f"{what}: {found['items']} items, {shown}{found['flipped']} choices and {len(texts)} texts differ: "
        f"{'holds' if holds else 'BROKEN'}",
        flush=True,
    )
    return holds


def _likelihoods(rows: Rows) -> list[float]:
    answers = [answer for row in rows for answer in row["answers"]]
    return [answer[0] if isinstance(answer, list) else answer for answer in answers if not isinstance(answer, str)]


def multiple_choice(count: int, shots: int) -> list[Instance]:
    """Questions of about 60 words with four answers each, after ``shots`` examples that all share."""
    rng = np.random.default_rng(0)

    def text(n: int) -> str:
        return " ".join(rng.choice(WORDS, n))

    def question() -> str:
        return f"Question: {text(60)}\nAnswer:"

    examples = "".join(f"{question()} {text(3)}\n\n" for _ in range(shots))
    requests = []
    for number in range(count // 4):
        context = examples + question()
        for choice in range(4):
            pair = (context, " " + text(int(rng.integers(1, 6))))
            requests.append(Instance("loglikelihood", {}, pair, choice, metadata=("made", number, 1)))
    return requests


def throughput(root: Path, count: int, shots: int, rounds: int, backends: Sequence[str]) -> float:
    """The least of the backends' median ratios to hf of requests per second of processor time, which other programs on
    the machine do not change."""
    folder, llama = root / "mini", root / "mini-llama"
    if not folder.exists():
        as_llama(write_llama(folder, **MINI), llama)
    requests = multiple_choice(count, shots)
    theirs = HFLM(pretrained=str(llama), device="cpu", batch_size=BATCH, max_length=1024, dtype="float32")
    wall: dict[str, list[float]] = {name: [] for name in (*backends, "hf")}
    used: dict[str, list[float]] = {name: [] for name in (*backends, "hf")}
    found: dict[str, list[tuple[float, bool]]] = {}
    for number in range(rounds):
        for name in (*backends, "hf"):
            with Journal(root / f"mini-{name}-{shots}-{number}.jsonl", {}) as journal:
                lm = theirs if name == "hf" else ours(folder, journal, name, max_running=BATCH)
                started, before = time.perf_counter(), time.process_time()
                found[name] = lm.loglikelihood(requests, disable_tqdm=True)
                wall[name].append(len(requests) / (time.perf_counter() - started))
                used[name].append(len(requests) / (time.process_time() - before))
            speeds = f"{wall[name][-1]:.1f} requests/s, {used[name][-1]:.1f} a CPU second"
            print(f"round {number}: {name} {speeds}", flush=True)
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    print(f"{len(requests)} requests, {shots} examples, batch size {BATCH}, {threads} threads, times hf:")
    least = []
    for name in backends:
        by_wall, by_cpu = ([a / b for a, b in zip(rate[name], rate["hf"], strict=True)] for rate in (wall, used))
        apart = max(abs(a[0] - b[0]) for a, b in zip(found[name], found["hf"], strict=True))
        shown = ", ".join(f"{ratio:.2f}" for ratio in by_cpu)
        least.append(statistics.median(by_cpu))
        print(
            f"  {name}: {least[-1]:.2f} by CPU time (rounds {shown}), {statistics.median(by_wall):.2f} by wall; "
            f"log-likelihoods differ by at most {apart:.1e}"
        )
    return min(least)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--precision", default="fp32", choices=list(DTYPES), help="of the agreement, on both sides")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 5], help="examples that all share")
    parser.add_argument("--backends", nargs="+", choices=("ms", "pt"), default=["pt", "ms"])
    args = parser.parse_args()
    require_harness()
    with tempfile.TemporaryDirectory(prefix="tele-harness-") as folder:
        good = not args.items or agreement(Path(folder), args.items, args.precision)
        if args.requests:
            ratios = [
                throughput(Path(folder), args.requests, shots, args.rounds, args.backends) for shots in args.shots
            ]
            good = min(ratios) >= 3 and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
