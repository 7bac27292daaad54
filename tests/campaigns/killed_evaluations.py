"""`python -m tests.campaigns.killed_evaluations`: kill runs around the evaluation of a checkpoint, go on elsewhere.

A run that keeps its best checkpoint by a held-out loss, ends by patience and scores tasks and samples at checkpoints is
killed by -9 at that of step 12: before its evaluation begins, in it, when its results are on the disk, or when it has
finished. It goes on with another backend or layout to its end, and is held against one that was never interrupted: the
same columns in the same steps, each score once, the same best checkpoint and counters, and every number within
TOLERANCE. Tasks need lm-evaluation-harness (extra ``eval``); without it only samples are evaluated.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.data.packed import PackedWriter
from telechat_twins.core.train.metrics import MEASURED, TASKS, read_metrics
from tests.campaigns.killed_runs import latest
from tests.campaigns.killing import family, finish, kill, leftovers, orphans, start, wait_until
from tests.support.data_support import VOCAB_SIZE, tiny_tokenizer
from tests.support.harness_support import write_tasks
from tests.support.packed import write_packed

STEP, SEQ_LEN = 12, 16
MOMENTS = ("before", "in", "results", "after")
PAIRS = ("ms-single/pt-single", "pt-single/ms-single", "ms-single/pt-tp2", "pt-tp2/pt-single", "pt-single/pt-single")
TOLERANCE = 2e-4  # relative, of losses, norms and scores in fp32; the same backend and layout: none
CONFIG = (
    f"model: {{preset: telechat2-tiny, num_layers: 2, vocab_size: {VOCAB_SIZE}}}\n"
    f"data: {{sources: [{{path: packed}}], seq_len: {SEQ_LEN}}}\n"
    "train: {steps: 40, global_batch: 4, micro_batch: 2}\n"
    "optim: {lr: 1e-2, warmup_steps: 2}\n"
    "checkpoint: {every: 12, keep_last: 2}\n"
    "eval: {sources: [{path: held}], every: 6, keep_best: true, patience: 2, "
)


def prepare(folder: Path) -> Path:
    """The run's config; its held-out text is noise, whose loss grows while the model learns the other."""
    write_packed(folder / "packed", VOCAB_SIZE, SEQ_LEN, tokenizer=tiny_tokenizer())
    random = np.random.default_rng(5)
    with PackedWriter(folder / "held", tiny_tokenizer(), "sft") as writer:
        for _ in range(8):
            writer.add_sequence(random.integers(10, VOCAB_SIZE, SEQ_LEN + 1), np.ones(SEQ_LEN + 1, bool), [0])
        writer.finish()
    more = "samples: [The quick, 中国], sample_tokens: 4}\n"
    if importlib.util.find_spec("lm_eval"):
        write_tasks(folder / "tasks", items=8, context=8)
        more = f"tasks: [made_choices, made_rolling], task_data: tasks/data, task_include: [tasks], {more}"
    file = folder / "run.yaml"
    file.write_text(CONFIG + more)
    return file


def words(where: str, config: Path, out: Path, *more: str) -> list[str]:
    backend, layout = where.split("-")
    return ["train", "--backend", backend, "--layout", layout, "--config", str(config), "--out", str(out), *more]


def facts(out: Path) -> dict[str, Any]:
    """What must not depend on interruptions."""
    rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(out)]
    said = collections.Counter(
        (row["step"], key)
        for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        for key in row
        if key.startswith(TASKS)
    )
    trainer = open_checkpoint(out).trainer or {}
    texts = {}
    for file in sorted(out.glob("evaluations/*/samples.jsonl")):
        texts[file.parent.name] = [row["text"] for row in map(json.loads, file.read_text().splitlines())]
    return {
        "rows": rows,
        "times a score is written": sorted(said.items()),
        "best": (out / "best").read_text(),
        "best so far": {k: trainer["held_out"][k] for k in ("step", "since")},
        "checkpoints": sorted(path.name for path in out.glob("step-*")),
        "finished": sorted(path.parent.name for path in out.glob("evaluations/*/finished")),
        "samples": {name: len(found) for name, found in texts.items()},
    }


def differences(found: dict[str, Any], wanted: dict[str, Any], exact: bool) -> list[str]:
    faults = [f"{n}: {found[n]}, not {wanted[n]}" for n in wanted if n != "rows" and found[n] != wanted[n]]
    steps = [[row["step"] for row in given["rows"]] for given in (found, wanted)]
    if steps[0] != steps[1]:
        return [*faults, f"steps: {steps[0]}, not {steps[1]}"]
    for mine, other in zip(found["rows"], wanted["rows"], strict=True):
        if set(mine) != set(other):
            faults.append(f"columns of step {mine['step']}: {sorted(set(mine) ^ set(other))}")
            continue
        for key, value in other.items():
            close = value is not None and math.isclose(mine[key], value, rel_tol=0.0 if exact else TOLERANCE)
            if mine[key] != value and not close:
                faults.append(f"step {mine['step']}: {key} {mine[key]}, not {value}")
    return faults


def reached(out: Path, moment: str) -> bool:
    folder = out / "evaluations" / f"step-{STEP:08d}"
    if moment == "before":
        return latest(out) == STEP
    names = {"in": "given.json", "results": "samples.jsonl", "after": "finished"}
    return (folder / names[moment]).exists()


def trial(config: Path, out: Path, first: str, then: str, moment: str, wait: float) -> list[str]:
    log = out.with_suffix(".log")
    process = start(words(first, config, out), log)
    if not wait_until(lambda: reached(out, moment), process):
        return [f"not reached: the run ended with {process.poll()} before; see {log}"]
    time.sleep(wait)
    known = [p for group in family(process).values() for p in group]
    kill(known[:1], "-9")
    process.wait()
    faults = orphans(str(out), known)
    code = finish(words(then, config, out, "--resume", "auto"), log, 900)
    return faults + ([f"not finished: code {code}; see {log}"] if code else leftovers(out, allowed_of(out)))


def allowed_of(out: Path) -> list[str]:
    """Locks and journals of `tele eval`, which stay."""
    return [
        path.relative_to(out).as_posix()
        for path in out.rglob(".*")
        if path.name == ".lock" or path.name.endswith((".journal", ".lock"))
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS, help="where it begins and where it goes on")
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS)
    parser.add_argument("--wait", type=float, default=0.0, help="seconds between the moment and the kill (0)")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="tele-killed-evaluations-"))
    config, whole, broken, count = prepare(folder), {}, 0, 0
    for pair in args.pairs:
        first, then = pair.split("/")
        if first not in whole:
            out = folder / f"whole-{first}"
            code = finish(words(first, config, out), out.with_suffix(".log"), 900)
            if code:
                raise SystemExit(f"the uninterrupted run ended with {code}; see {out.with_suffix('.log')}")
            whole[first] = facts(out)
            print(f"{first}: {whole[first]['times a score is written']}, {whole[first]['best so far']}", flush=True)
        for moment in args.moments:
            out = folder / f"{first}-{then}-{moment}"
            faults = trial(config, out, first, then, moment, args.wait)
            faults = faults or differences(facts(out), whole[first], first == then)
            count, broken = count + 1, broken + bool(faults)
            print(f"{count:>3}  {pair}, {moment}: {'; '.join(faults) or 'ok'}", flush=True)
    print(f"{count} kills, {broken} with a fault" + (f"; kept: {folder}" if broken else ""))
    return 1 if broken or not count else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
