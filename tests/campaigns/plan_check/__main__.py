"""Predicted against measured peak memory of training: `make plan-check`, or `python -m tests.campaigns.plan_check`.

Each trial trains a model of some ten million parameters for two optimizer steps in a launch of its own, in both
frameworks; what is compared is the peak of each rank's resident memory above its baseline (rank.py) with the estimate
for that framework. Freed tensors are returned to the system at once (glibc's mmap threshold), so that the peak is what
was alive; the difference to a run with the allocator's own settings is fragmentation, and `--fragmentation` shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from telechat_twins.core.launch.launcher import launch
from telechat_twins.core.model.lora import LoraConfig
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.planner.memory.estimate import Work, ranks_of
from telechat_twins.core.planner.memory.executor import EXECUTORS, on_cpu
from telechat_twins.core.train.trainable import constant_names, run_table
from telechat_twins.core.types import JsonObject
from tests.campaigns.plan_check.rank import trial_config

SCRIPT = Path(__file__).parent / "rank.py"
LIMIT = 0.10
MODEL = {
    "preset": "telechat2-tiny",
    "hidden_size": 512,
    "ffn_hidden_size": 1408,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 64,
    "num_layers": 8,
    "vocab_size": 8192,
    "max_seqlen": 4096,
}
PLAIN = {
    "model": MODEL,
    "layout": "single",
    "seq_len": 1024,
    "micro_batch": 1,
    "micro_batches": 1,
    "precision": "fp32",
    "recompute": "none",
    "lora": None,
    "freeze": [],
}
LORA = {"rank": 16, "targets": ["q", "k", "v", "o", "gate", "up", "down"]}
FLM = {**MODEL, "preset": "flm-tiny", "num_kv_heads": 8}
# What differs from PLAIN. Layouts of 1, 2, 4 and 8 processes; every axis, precision and kind of recomputation.
TRIALS: tuple[JsonObject, ...] = (
    {},
    {"precision": "bf16"},
    {"precision": "amp"},
    {"recompute": "full", "micro_batch": 2},
    {"recompute": "selective", "seq_len": 2048},
    {"micro_batches": 3},
    {"lora": LORA, "precision": "bf16"},
    {"model": FLM},
    {"layout": "tp2"},
    {"layout": "tp2.nosp"},
    {"layout": "pp2", "micro_batches": 4},
    {"layout": "pp2.gpipe", "micro_batches": 4},
    {"layout": "pp2.vpp2", "micro_batches": 4},
    {"layout": "dp2"},
    {"layout": "dp2.nozero"},
    {"layout": "ring2", "seq_len": 2048},
    {"layout": "ulysses2", "seq_len": 2048},
    {"layout": "tp2.pp2", "micro_batches": 2, "precision": "bf16"},
    {"layout": "dp2.ring2", "seq_len": 2048},
    {"layout": "pp2.dp2.tp2", "micro_batches": 2},
    {"lora": LORA},
    {"lora": {"rank": 16, "targets": ["q", "v"], "dropout": 0.1}, "precision": "amp"},
    {"freeze": ["embed.weight", "layers.[0-3].*"]},
)


def main() -> int:
    """Run the trials, print the table; 1 when one is off by more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=("ms", "pt"), default=["ms", "pt"])
    parser.add_argument("--trials", type=int, nargs="+", metavar="N", help="numbers of trials; default: all")
    parser.add_argument("--fragmentation", action="store_true", help="leave the allocator its own settings")
    parser.add_argument("--out", metavar="F", help="write the rows as JSON")
    args = parser.parse_args()
    if not args.fragmentation:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    rows = []
    print(f"{'':>3} {'backend':<8}{'trial':<44}{'measured':>10}{'predicted':>10}{'':>8}")
    for number in args.trials or range(len(TRIALS)):
        for backend in args.backends:
            rows.append(row := compare(backend, number))
            print(
                f"{number:>3} {backend:<8}{row['trial']:<44}{row['measured'] / 1e6:>7.1f} MB"
                f"{row['predicted'] / 1e6:>7.1f} MB{row['error']:>+8.1%}",
                flush=True,
            )
            if args.out:
                Path(args.out).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    off = [row for row in rows if abs(row["error"]) > LIMIT]
    print(f"{len(rows) - len(off)} of {len(rows)} within {LIMIT:.0%}")
    return 1 if off else 0


def compare(backend: str, number: int) -> JsonObject:
    """A trial's fullest rank, measured and predicted."""
    trial = {**PLAIN, **TRIALS[number]}
    measured = [found["peak"] for found in run(backend, trial)]
    predicted = predict(backend, trial)
    worst = max(range(len(measured)), key=lambda rank: abs(predicted[rank] / measured[rank] - 1.0))
    name = " ".join(
        "flm" if key == "model" else str(key) if key == "lora" else f"{key} {value}"
        for key, value in TRIALS[number].items()
    )
    return {
        "backend": backend,
        "trial": name.replace("layout ", "").replace("micro_batch", "mb") or "single fp32",
        "measured": measured[worst],
        "predicted": predicted[worst],
        "error": predicted[worst] / measured[worst] - 1.0,
        "ranks": [measured, predicted],
    }


def run(backend: str, trial: JsonObject) -> list[JsonObject]:
    """What each rank of a launch of ``trial`` measured."""
    world = parse_layout(trial["layout"]).world
    folder = Path(tempfile.mkdtemp(prefix="plan-check-"))
    try:
        (folder / "plan.json").write_text(json.dumps(trial), encoding="utf-8")
        if world == 1:
            command = [sys.executable, str(SCRIPT), backend, str(folder)]
            code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        else:
            code = launch(backend, [backend, str(folder)], world, folder / "logs", script=SCRIPT)
        if code:
            raise RuntimeError(f"{backend} {trial['layout']}: exit code {code}")
        return [json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def predict(backend: str, trial: JsonObject) -> list[int]:
    """Bytes of each rank by the planner."""
    config = trial_config(trial)
    layout, lora = config.parallel, None if trial["lora"] is None else LoraConfig(**trial["lora"])
    work = Work(
        trial["seq_len"],
        trial["micro_batch"],
        trial["micro_batches"],
        trial["precision"],
        trial["recompute"],
        True,
        on_cpu(EXECUTORS[backend]),
    )
    constants = frozenset(constant_names(run_table(config), config))
    ranks = ranks_of(config.model, layout, work, lora, constants)
    return [ranks[layout.coord(rank).pp].total for rank in range(layout.world)]


if __name__ == "__main__":
    raise SystemExit(main())
