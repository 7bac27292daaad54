"""One rank of a memory trial: the peak of its resident memory above a baseline, over real optimizer steps.

    tests/campaigns/plan_check/rank.py BACKEND FOLDER       (a rank, under msrun or torchrun, or a process of its own)

FOLDER/plan.json is the trial. The baseline is taken after a warm-up of the same layout on a model of few parameters: it
holds the frameworks, thread pools, communicators and kernels. The kernel's mark of the peak (VmHWM of
/proc/self/status) is reset before the trial's trainer is built, and read after its steps.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import sys
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.bench.worker import timed_steps
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.launch.worker import run_script
from telechat_twins.core.parallel.layout import parse_layout
from telechat_twins.core.types import JsonObject

STEPS = 2  # in the second, all optimizer vectors and buffers are in place from its beginning


def trial_config(trial: JsonObject) -> RunConfig:
    """The run of a trial: ``model`` (a mapping), ``layout``, lengths, precision, recomputation, adapters, freezing."""
    layout = parse_layout(trial["layout"])
    values: JsonObject = {
        "model": trial["model"],
        "data": {"sources": [{"path": "random tokens"}], "seq_len": trial["seq_len"]},
        "train": {
            "steps": 1_000,
            "global_batch": trial["micro_batch"] * trial["micro_batches"] * layout.dp,
            "micro_batch": trial["micro_batch"],
            "precision": trial["precision"],
            "recompute": trial["recompute"],
        },
        "optim": {"lr": 1e-4},
        "parallel": dataclasses.asdict(layout),
    }
    if trial.get("freeze"):
        values["train"]["freeze"] = trial["freeze"]
    if trial.get("lora"):
        values["lora"] = trial["lora"]
    return run_config_from_dict(values)


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that is given in kB, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def settle() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def steps_of(backend: str, config: RunConfig, count: int) -> None:
    """Build a trainer, run ``count`` optimizer steps, and let it go."""
    trainer = backends.load(backend, "train").Trainer(config)
    timed_steps(trainer, config, 0, count)


def measure(backend: str, trial: JsonObject) -> JsonObject:
    """Bytes of this rank: ``baseline``, and ``peak`` above it."""
    small = {**trial["model"], "hidden_size": 128, "ffn_hidden_size": 256, "vocab_size": 512, "head_dim": 0}
    steps_of(backend, trial_config({**trial, "model": small, "seq_len": 64}), 1)
    settle()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    baseline = status_bytes("VmRSS")
    steps_of(backend, trial_config(trial), STEPS)
    peak = status_bytes("VmHWM")
    settle()
    return {"baseline": baseline, "peak": peak - baseline, "left": status_bytes("VmRSS") - baseline}


def main() -> int:
    """Measure the trial; rank R writes rank_R.json."""
    backend, folder = sys.argv[1], Path(sys.argv[2])
    backends.load(backend, "train")  # prepares the process before the framework is used
    rank = backends.load(backend, "mesh").join()[0]
    found = measure(backend, json.loads((folder / "plan.json").read_text(encoding="utf-8")))
    (folder / f"rank_{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    backends.load(backend, "mesh").leave()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_script(main))
